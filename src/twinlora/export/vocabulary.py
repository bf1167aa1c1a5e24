"""A tokenizer as GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`), from its tokenizer.json.

llama.cpp knows the rules that cut a text before merging (`tokenizer.ggml.pre`) by name alone. The name is found here by
what the rules are; whether the result cuts texts as the tokenizer does is for the parity gate to say.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from twinlora.errors import ModelError

__all__ = ["add_vocabulary"]

_END = r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
# What cuts a text, as listed by `_cuts`: the name that llama.cpp has for it.
_NAMES = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_CONTRACTIONS + _END,): "llama-bpe",
    ((_CONTRACTIONS + _END).replace("{1,3}", ""),): "qwen2",
    (_CASES + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",): "tekken",
}


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, stop: set[int]) -> None:
    """Write tokens, types, merges or scores, special tokens and the chat template. `size` is the embedding's rows.

    Raises ModelError for a tokenizer of another kind.
    """
    if not tokenizer.is_fast:
        raise ModelError("GGUF: the tokenizer has no tokenizer.json; save it as a fast tokenizer and try again")
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: a tokenizer of type {model['type']} is not supported; expected BPE")
    if len(tokenizer) > size:
        raise ModelError(f"GGUF: the tokenizer has {len(tokenizer)} tokens, the embedding {size} rows")
    if not model["merges"]:
        raise ModelError("GGUF: the tokenizer has no merges, and llama.cpp does not load such a one")
    tokens, types = _tokens(tokenizer, size, model)
    pieces = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _cut_name(document.get("pre_tokenizer"), tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prefixes_space(document))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _add_special(writer, tokenizer, stop)


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int, model: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The text and the type of every row of the embedding; rows without a token are unused."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(size):
        text = texts.get(index)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        if text == model.get("unk_token") and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """llama.cpp merges the pair with the highest score of what it becomes: earlier merges first."""
    order: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        order.setdefault(left + right, rank)
    return [-float(order[token]) if token in order else -1e6 for token in tokens]


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a sequence, or the one there is."""
    if part is None:
        return []
    return [step for member in part[key] for step in _steps(member, key)] if part["type"] == "Sequence" else [part]


def _prefixes_space(document: dict[str, Any]) -> bool:
    for step in _steps(document.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return str(step.get("prepend_scheme", "always")) != "never"
    return False


def _cut_name(part: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    cuts = []
    for step in _steps(part, "pretokenizers"):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            cuts.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step.get("individual_digits"):
            cuts.append("digits")
        elif step["type"] == "ByteLevel" and step.get("use_regex", True):
            cuts.append("words")
        elif step["type"] != "ByteLevel":
            cuts.append(step["type"])
    name = _NAMES.get(tuple(cuts))
    if name is None:
        raise ModelError(
            f"GGUF: {type(tokenizer).__name__} cuts texts by rules that have no name here: {cuts}; "
            f"known: {', '.join(_NAMES.values())}"
        )
    return name


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stop: set[int]) -> None:
    begins, ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begins is not None:
        writer.add_bos_token_id(begins)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    others = sorted(stop - {ends})
    places = [writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id]  # all end an answer
    for add, token in zip(places, [*([] if ends is None else [ends]), *others], strict=False):
        add(token)
    plain = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(begins is not None and plain[0] == begins)
    writer.add_add_eos_token(ends is not None and plain[-1] == ends)
    if tokenizer.chat_template:
        writer.add_chat_template(str(tokenizer.chat_template))

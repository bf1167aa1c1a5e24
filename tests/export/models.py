"""Tiny random models of every family that GGUF files are written for, and a tokenizer made as SentencePiece's are."""

from pathlib import Path

import torch
import transformers as t
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import TEMPLATE

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = SHAPE | {"tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 32}
NARROW = {k: v for k, v in SHAPE.items() if k != "head_dim"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 256, "factor": 2.0,
}  # fmt: skip
FAMILIES = {
    "llama": t.LlamaConfig(**SHAPE),
    "llama3": t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-linear": t.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}),
    "mistral": t.MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": t.Qwen2Config(**NARROW, use_sliding_window=False),
    "qwen3": t.Qwen3Config(**SHAPE),
    "gemma2": t.Gemma2Config(**GEMMA, attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
    "gemma3": t.Gemma3TextConfig(**(GEMMA | {"num_hidden_layers": 7})),
    "phi3": t.Phi3Config(**NARROW, sliding_window=None),
    "phi3-longrope": t.Phi3Config(
        **(NARROW | {"max_position_embeddings": 512}), sliding_window=None, original_max_position_embeddings=256,
        rope_parameters=LONGROPE,
    ),
}  # fmt: skip


def write_family(name: str, directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model whose norms and biases are random too, so that nothing can be left out unseen."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 0.0 if key.endswith("bias") or "gemma" in name else 1.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def bytes_tokenizer(end: str = "<|im_end|>", cuts: str = "words") -> PreTrainedTokenizerFast:
    """Byte-level BPE with some merges, and ChatML whose turns end with `end`. `cuts`: words, digits, or a pattern."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("o", "r"), ("w", "or"), ("Ġ", "wor"), ("Ġwor", "d"), ("s", "a"), ("sa", "y")]
    merges += [("1", "2"), ("12", "3"), ("123", "4"), ("'", "S"), ("Ċ", "Ċ")]  # that the rules allow or part
    words = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts in ("words", "digits"))
    first = pre_tokenizers.Digits(individual_digits=True) if cuts == "digits" else None
    if cuts not in ("words", "digits"):
        first = pre_tokenizers.Split(Regex(cuts), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_only]) if first else bytes_only
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in ("<|im_start|>", end, "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token=end, pad_token="<|pad|>",
        chat_template=TEMPLATE.replace("<|im_end|>", end),
    )  # fmt: skip


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """BPE as SentencePiece makes it: words begin with ▁, bytes stand for what is unknown."""
    merges = [("▁", "w"), ("o", "r"), ("▁w", "or"), ("▁wor", "d"), ("▁", "s"), ("a", "b"), ("ab", "ab")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789", "\n"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *(a + b for a, b in merges)]
    table = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=table, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="<unk>",
        chat_template="{{ bos_token }}" + TEMPLATE,
    )  # fmt: skip

"""Rows to token ids and a loss mask, by the model's own chat template.

Text is tokenised in the pieces in which inference meets it: what the model is given, then what it must answer. So the
prompt's tokens in training are the tokens at inference, whatever merges would join across the border. Loss falls on
the assistant's words and on the token that ends the turn, on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from twinlora.data.formats import Row
from twinlora.errors import DataError

__all__ = ["Example", "encode_prompt", "encode_row", "encode_rows", "render_prompt"]

_SHOWN = 10


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model is trained to say it."""

    ids: list[int]
    trained: list[bool]
    where: str

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.trained[1:])  # nothing predicts the first token


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "this model has no chat template, so it cannot be trained on `messages`; "
            "give `prompt` and `completion` rows, or a model with a template"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=generation_prompt, tokenize=False)
    except Exception as error:  # templates raise jinja2 errors of many kinds, also on purpose
        raise DataError(f"the model's chat template refuses these messages: {error}") from None
    return str(text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` up to the first end-of-turn token, which is appended where the template writes none."""
    eos = tokenizer.eos_token_id
    if eos in ids:
        return ids[: ids.index(eos) + 1]
    return [*ids, eos] if eos is not None else ids


def render_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """The text a model is given for `row`, up to where it must answer."""
    if not row.messages:
        return row.prompt
    return _render(tokenizer, row.messages[:-1], generation_prompt=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Token ids of `render_prompt`; a plain prompt gets the special tokens that the tokenizer adds."""
    if not row.messages:
        return list(tokenizer(row.prompt)["input_ids"])
    return _ids(tokenizer, render_prompt(tokenizer, row))


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Example]:
    """One example; or one for each assistant turn where the template rewrites earlier turns (Qwen3 drops reasoning)."""
    if not row.messages:
        prompt = _without_eos(tokenizer, list(tokenizer(row.prompt)["input_ids"]))
        answer = _end_of_turn(tokenizer, _ids(tokenizer, row.completion))
        return [Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), row.where)]
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    prompts = [_render(tokenizer, row.messages[:i], generation_prompt=True) for i in turns]
    wholes = [_render(tokenizer, row.messages[: i + 1], generation_prompt=False) for i in turns]
    if any(not whole.startswith(prompt) for prompt, whole in zip(prompts, wholes, strict=True)):
        # The template does not write a turn as it prompts for it: train on what inference will see.
        answers = [str(row.messages[i]["content"]) for i in turns]
        return [_one_turn(tokenizer, p, a, row.where) for p, a in zip(prompts, answers, strict=True)]
    if any(not later.startswith(earlier) for earlier, later in zip(wholes, prompts[1:], strict=False)):
        return [
            _one_turn(tokenizer, prompt, whole[len(prompt) :], row.where)
            for prompt, whole in zip(prompts, wholes, strict=True)
        ]
    return [_whole_chat(tokenizer, prompts, wholes, row.where)]


def _without_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Tokenizers that close every text with an end token must not close the prompt."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id else ids


def _one_turn(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str) -> Example:
    before, after = _ids(tokenizer, prompt), _end_of_turn(tokenizer, _ids(tokenizer, answer))
    return Example(before + after, [False] * len(before) + [True] * len(after), where)


def _whole_chat(tokenizer: PreTrainedTokenizerBase, prompts: list[str], wholes: list[str], where: str) -> Example:
    ids: list[int] = []
    trained: list[bool] = []
    done = ""
    for index, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        given = _ids(tokenizer, prompt[len(done) :])
        said = _ids(tokenizer, whole[len(prompt) :])
        answer = _end_of_turn(tokenizer, said)
        rest = said[len(answer) :] if index < len(prompts) - 1 else []
        ids += given + answer + rest
        trained += [False] * len(given) + [True] * len(answer) + [False] * len(rest)
        done = whole
    return Example(ids, trained, where)


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> list[Example]:
    """Every row as examples. Raises DataError that lists the rows that are too long or train nothing."""
    examples: list[Example] = []
    problems: list[str] = []
    for row in rows:
        try:
            encoded = encode_row(tokenizer, row)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        for example in encoded:
            if len(example.ids) > max_length:
                problems.append(f"{row.where}: {len(example.ids)} tokens")
        examples += encoded
    if problems:
        longest = max(len(example.ids) for example in examples)
        listed = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{len(problems)} row(s) are longer than max_length {max_length}\n  {listed}{more}\n"
            f"shorten them, or give --max-length {longest}"
        )
    return examples

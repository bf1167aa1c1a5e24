"""Rows to token ids and a loss mask, by the model's own chat template.

Text is tokenised in the pieces in which inference meets it: what the model is given, then what it must answer. So the
prompt's tokens in training are the tokens at inference, whatever merges would join across the border. Loss falls on
the assistant's words and on the token that ends the turn, on nothing else; in a plain text, on every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from twinlora.data.formats import Row, says_something
from twinlora.errors import DataError

__all__ = [
    "Example",
    "answer_opening",
    "encode_chat",
    "encode_prompt",
    "encode_row",
    "encode_text",
    "render_prompt",
]

_MARK = "⟦answer⟧"


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model is trained to say it."""

    ids: list[int]
    trained: list[bool]
    where: str
    weight: float = 1.0  # how often it is seen in an epoch

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.trained[1:])  # nothing predicts the first token


def _render(tokenizer: PreTrainedTokenizerBase, row: Row, count: int, *, generation_prompt: bool) -> str:
    """The first `count` messages of `row` as the template writes them."""
    if not tokenizer.chat_template:
        raise DataError(
            "this model has no chat template, so it cannot be trained on chats; give `prompt` and `completion` rows "
            "(for Alpaca: --columns prompt=instruction,completion=output), or a model with a template"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(row.messages[:count]),
            tools=list(row.tools) or None,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
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
    return _render(tokenizer, row, len(row.messages) - 1, generation_prompt=True)


def answer_opening(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """What the template puts before the words of the last answer, and so is trained: Qwen3's empty reasoning."""
    if not row.messages:
        return ""
    marked = replace(row, messages=(*row.messages[:-1], {**row.messages[-1], "content": _MARK}))
    prompt, said = render_prompt(tokenizer, row), _render(tokenizer, marked, len(row.messages), generation_prompt=False)
    opening, found, _ = said.removeprefix(prompt).partition(_MARK)
    return opening if said.startswith(prompt) and found else ""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Token ids of `render_prompt`; a plain prompt gets the special tokens that the tokenizer adds."""
    if not row.messages:
        return encode_text(tokenizer, row.prompt)
    return _ids(tokenizer, render_prompt(tokenizer, row))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text to go on from, with the special tokens that the tokenizer puts before it."""
    return _without_eos(tokenizer, list(tokenizer(text)["input_ids"]))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of a chat that the model must answer. Raises DataError if the template refuses it."""
    row = Row("chat", messages=tuple(messages))
    return _ids(tokenizer, _render(tokenizer, row, len(messages), generation_prompt=True))


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Example]:
    """One example; or one for each assistant turn where the model sees earlier turns otherwise than it said them.

    So it is with templates that rewrite history (Qwen3 drops reasoning), and where tokens would join across a turn's
    border. Either way the tokens before an answer are `encode_prompt` of the chat up to it. A row with nothing to say
    gives no example.
    """
    if row.messages:
        return _chat(tokenizer, row)
    if row.text.strip():
        ids = _closed(tokenizer, list(tokenizer(row.text)["input_ids"]))
        return [Example(ids, [True] * len(ids), row.where, row.weight)]
    if not row.completion.strip():
        return []
    return [_example(row, encode_prompt(tokenizer, row), _end_of_turn(tokenizer, _ids(tokenizer, row.completion)))]


def _without_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Tokenizers that close every text with an end token must not close the prompt."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id else ids


def _closed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` with one begin token at most, and an end token."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:2] == [begin, begin]:  # the text spells it, and the tokenizer adds it
        ids = ids[1:]
    return ids if end is None or ids[-1] == end else [*ids, end]


def _example(row: Row, given: list[int], answer: list[int]) -> Example:
    return Example(given + answer, [False] * len(given) + [True] * len(answer), row.where, row.weight)


def _chat(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Example]:
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    spoken = [says_something(row.messages[i]) for i in turns]
    if not any(spoken):
        return []
    prompts = [_render(tokenizer, row, i, generation_prompt=True) for i in turns]
    wholes = [_render(tokenizer, row, i + 1, generation_prompt=False) for i in turns]
    follows = all(whole.startswith(prompt) for prompt, whole in zip(prompts, wholes, strict=True))
    if follows:
        example, last_prompt = _whole_chat(tokenizer, prompts, wholes, spoken, row)
        if len(turns) == 1 or last_prompt == _ids(tokenizer, prompts[-1]):
            return [example]
        answers = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
    elif any(row.messages[i].get("tool_calls") for i in turns):
        raise DataError("the model's chat template does not write a tool call as it prompts for one")
    else:  # a turn is not written as it is prompted for: train on what inference will see
        answers = [str(row.messages[i]["content"]) for i in turns]
    return [
        _example(row, _ids(tokenizer, prompt), _end_of_turn(tokenizer, _ids(tokenizer, answer)))
        for prompt, answer, says in zip(prompts, answers, spoken, strict=True)
        if says
    ]


def _whole_chat(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], wholes: list[str], spoken: list[bool], row: Row
) -> tuple[Example, list[int]]:
    """All turns as one example, piece by piece; and its tokens up to the last answer."""
    ids: list[int] = []
    trained: list[bool] = []
    done = ""
    last_prompt: list[int] = []
    for index, (prompt, whole, says) in enumerate(zip(prompts, wholes, spoken, strict=True)):
        given = _ids(tokenizer, prompt[len(done) :])
        said = _ids(tokenizer, whole[len(prompt) :])
        answer = _end_of_turn(tokenizer, said)
        rest = said[len(answer) :] if index < len(prompts) - 1 else []
        last_prompt = ids + given
        ids = last_prompt + answer + rest
        trained += [False] * len(given) + [says] * len(answer) + [False] * len(rest)
        done = whole
    return Example(ids, trained, row.where, row.weight), last_prompt

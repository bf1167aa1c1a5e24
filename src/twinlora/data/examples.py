"""All rows to examples that fit. What is too long is an error, is cut or is left out; so is what trains nothing.

Whatever is not as the rows say is counted and said in a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from twinlora.data.formats import Row
from twinlora.data.sources import Note, listed
from twinlora.data.template import Example, encode_row
from twinlora.errors import DataError

__all__ = ["Advice", "Overlong", "encode_each", "encode_rows", "truncate"]

Overlong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class Advice:
    """What an error says to type: the flags of the verb that reads the rows. {longest}: tokens of the longest row."""

    overlong: str
    untrained: str


_TRAINING = Advice(
    "give --max-length {longest}, --overlong drop, or --overlong truncate (keeps the answer and the end of the prompt)",
    "mend them, or leave them out with --allow-untrained",
)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    *,
    overlong: Overlong = "error",
    allow_untrained: bool = False,
    advice: Advice = _TRAINING,
    note: Note = lambda text: None,
) -> list[Example]:
    """Every row as examples of at most `max_length` tokens, each with a trained one.

    Raises DataError that lists the rows that are too long (unless `overlong` says what to do with them) and those with
    nothing to train on (unless they are allowed; then they are left out), and says what to type by `advice`.
    """
    encoded, refused = encode_each(tokenizer, rows)
    if refused:
        raise DataError("\n".join(listed(places, f"cannot be trained: {why}") for why, places in refused.items()))
    examples = [example for several in encoded for example in several]
    untrained = [row.where for row, several in zip(rows, encoded, strict=True) if not several]
    if len(examples) > len(rows) - len(untrained):
        note(f"data: {len(rows):,} rows → {len(examples):,} examples, because the chat template rewrites earlier turns")
    long = [example for example in examples if len(example.ids) > max_length]
    problems = [_too_long(long, max_length, advice.overlong)] if long and overlong == "error" else []
    if untrained and not allow_untrained:
        problems.append(f"{listed(untrained, 'with nothing to train on')}\n{advice.untrained}")
    if problems:
        raise DataError("\n".join(problems))
    if untrained:
        note(f"data: left out because they train nothing: {len(untrained):,} rows")
    if long:
        examples = _shortened(examples, max_length, overlong, tokenizer.bos_token_id, note)
    if not examples:
        raise DataError(f"data: none of {len(rows):,} rows is left to train on")
    return examples


def encode_each(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> tuple[list[list[Example]], dict[str, list[str]]]:
    """The examples of each row that train something; and by reason the places of rows that the template refuses."""
    encoded: list[list[Example]] = []
    refused: dict[str, list[str]] = {}
    for row in rows:
        try:
            encoded.append([example for example in encode_row(tokenizer, row) if example.trained_tokens])
        except DataError as error:
            encoded.append([])
            refused.setdefault(str(error), []).append(row.where)
    return encoded, refused


def _too_long(long: list[Example], max_length: int, advice: str) -> str:
    longest = max(len(example.ids) for example in long)
    places = [f"{example.where}: {len(example.ids):,} tokens" for example in long]
    return f"{listed(places, f'longer than max_length {max_length:,}')}\n{advice.format(longest=longest)}"


def _shortened(
    examples: list[Example], max_length: int, overlong: Overlong, bos: int | None, note: Note
) -> list[Example]:
    """`examples` without the long ones, or with them cut, and a line that says how many."""
    if overlong == "drop":
        kept = [example for example in examples if len(example.ids) <= max_length]
        note(
            f"data: left out because they are longer than {max_length:,} tokens: {len(examples) - len(kept):,} examples"
        )
        return kept
    cut = [truncate(example, max_length, bos) for example in examples]
    shorter = sum(a is not b for a, b in zip(examples, cut, strict=True))
    answers = sum(_answer(a) > _answer(b) for a, b in zip(examples, cut, strict=True))
    note(
        f"data: cut to {max_length:,} tokens: {shorter:,} examples; the end of the answer is lost in {answers:,}, "
        "only what comes first in the others"
    )
    return [example for example in cut if example.trained_tokens]


def _answer(example: Example) -> int:
    """Tokens of the last answer."""
    return next((n for n, trained in enumerate(reversed(example.trained)) if not trained), len(example.ids))


def truncate(example: Example, max_length: int, bos: int | None = None) -> Example:
    """The end of `example`; if its last answer does not fit, the start of that answer after one token of the prompt.

    A begin token stays first. Of two tokens or more at least one is trained.
    """
    size, answer = len(example.ids), _answer(example)
    if size <= max_length:
        return example
    begin = min(size - max_length, max(size - answer - 1, 0))
    chosen = list(range(begin, begin + max_length))
    if begin > 0 and example.ids[0] == bos and max_length > 2:
        # The begin token takes the place of one of the prompt, or of an answer that does not fit anyway.
        begin = min(size - max_length + 1, size - answer - 1)
        chosen = [0, *range(begin, begin + max_length - 1)]
    return replace(example, ids=[example.ids[i] for i in chosen], trained=[example.trained[i] for i in chosen])

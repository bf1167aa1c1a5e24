"""What would be trained, in figures: the facts behind `twinlora data check`."""

from __future__ import annotations

import bisect
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from twinlora.data.examples import encode_each
from twinlora.data.formats import Row
from twinlora.data.sources import Data
from twinlora.data.template import Example

__all__ = ["Bin", "Check", "Piece", "Sample", "check"]

_SHOWN = 10  # places of each finding
_EDGES = [1, *(edge for power in range(1, 40) for edge in (2**power, 3 * 2 ** (power - 1)))]  # 1 2 3 4 6 8 12 16 24 …
_ODD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2028\u2029\ufeff\ufffd\ue000-\uf8ff]")


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample's text that is trained, or is not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Bin:
    """Examples of `low` to `high` tokens, both counted in."""

    low: int
    high: int
    examples: int


@dataclass(frozen=True)
class Sample:
    """One example as text."""

    where: str
    pieces: list[Piece]


@dataclass
class Check:
    """Figures over all rows. Places are those of the first ten rows of a finding; counts are of all."""

    sources: list[dict[str, object]]
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    max_length: int = 0
    median: int = 0
    longest: int = 0
    longest_at: str = ""
    histogram: list[Bin] = field(default_factory=list)
    overlong: int = 0
    overlong_at: list[str] = field(default_factory=list)
    refused: int = 0  # rows that the model's template cannot write
    refused_at: list[str] = field(default_factory=list)
    untrained: int = 0
    untrained_at: list[str] = field(default_factory=list)
    duplicates: int = 0
    duplicates_at: list[str] = field(default_factory=list)
    contradictions: int = 0  # rows that ask what an earlier row asks, and answer otherwise
    contradictions_at: list[str] = field(default_factory=list)
    eval_rows: int = 0
    eval_overlap: int = 0  # held-out rows that ask what a training row asks
    eval_overlap_at: list[str] = field(default_factory=list)
    end_token: str | None = None
    end_trained: int = 0  # examples whose last token is that one, trained
    odd_rows: int = 0
    odd: dict[str, int] = field(default_factory=dict)  # name of a character or token: rows
    odd_at: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def check(tokenizer: PreTrainedTokenizerBase, data: Data, held_out: Data, *, max_length: int, samples: int) -> Check:
    """Encode every row as training would, and count."""
    rows = data.rows
    found = Check([_source(source) for source in data.sources], rows=len(rows), max_length=max_length)
    encoded, reasons = encode_each(tokenizer, rows)
    examples = [example for several in encoded for example in several]
    refused = [f"{place}: {reason}" for reason, places in reasons.items() for place in places]
    found.refused, found.refused_at = len(refused), refused[:_SHOWN]
    _lengths(found, examples)
    unusable = {place for places in reasons.values() for place in places}
    empty = (row.where for row, several in zip(rows, encoded, strict=True) if not several)
    untrained = [where for where in empty if where not in unusable]
    found.untrained, found.untrained_at = len(untrained), untrained[:_SHOWN]
    _repetitions(found, rows)
    if held_out.sources:
        asked = {_question(row) for row in rows}
        seen = [row.where for row in held_out.rows if _question(row) in asked]
        found.eval_rows, found.eval_overlap, found.eval_overlap_at = len(held_out.rows), len(seen), seen[:_SHOWN]
    _endings(found, tokenizer, examples)
    _odd_characters(found, tokenizer, rows)
    step = max(1, len(examples) // max(samples, 1))
    found.samples = [Sample(e.where, _pieces(tokenizer, e)) for e in examples[::step][:samples]]
    return found


def _source(source: object) -> dict[str, object]:
    kept = ("source", "form", "container", "sha256", "weight", "unused")
    return {name: getattr(source, name) for name in kept} | {"rows": len(source.rows)}  # type: ignore[attr-defined]


def _lengths(found: Check, examples: Sequence[Example]) -> None:
    found.examples = len(examples)
    found.tokens = sum(len(example.ids) for example in examples)
    found.trained_tokens = sum(example.trained_tokens for example in examples)
    if examples:
        longest = max(examples, key=lambda example: len(example.ids))
        found.longest, found.longest_at = len(longest.ids), longest.where
    long = [f"{e.where}: {len(e.ids):,} tokens" for e in examples if len(e.ids) > found.max_length]
    found.overlong, found.overlong_at = len(long), long[:_SHOWN]
    found.median = sorted(len(example.ids) for example in examples)[len(examples) // 2] if examples else 0
    bins = Counter(bisect.bisect_right(_EDGES, len(example.ids)) for example in examples)
    span = range(min(bins), max(bins) + 1) if bins else range(0)
    found.histogram = [Bin(_EDGES[i - 1], _EDGES[i] - 1, bins[i]) for i in span]


def _repetitions(found: Check, rows: Sequence[Row]) -> None:
    first: dict[str, str] = {}
    answers: dict[str, tuple[str, str]] = {}
    twice: list[str] = []
    otherwise: list[str] = []
    for row in rows:
        whole, question = json.dumps(row.to_json(), sort_keys=True), _question(row)
        if whole in first:
            twice.append(f"{row.where} = {first[whole]}")
            continue
        first[whole] = row.where
        answer, where = answers.setdefault(question, (row.answer, row.where))
        if answer != row.answer:
            otherwise.append(f"{row.where} ≠ {where}")
    found.duplicates, found.duplicates_at = len(twice), twice[:_SHOWN]
    found.contradictions, found.contradictions_at = len(otherwise), otherwise[:_SHOWN]


def _question(row: Row) -> str:
    """What a row asks, white space aside."""
    asked = json.dumps(row.messages[:-1], sort_keys=True) if row.messages else row.prompt or row.text
    return " ".join(asked.split())


def _endings(found: Check, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
    end = tokenizer.eos_token_id
    found.end_token = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else None
    found.end_trained = sum(example.ids[-1] == end and example.trained[-1] for example in examples)


def _odd_characters(found: Check, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> None:
    """Characters that seldom are meant, and the model's own control tokens spelled in chats and prompts."""
    special = [token for token in tokenizer.all_special_tokens if len(token) > 2]
    control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    counts: Counter[str] = Counter()
    places: list[str] = []
    for row in rows:
        text = "\n".join([row.prompt, row.completion, row.text, *(str(m["content"]) for m in row.messages)])
        names = {unicodedata.name(c, f"U+{ord(c):04X}") for c in _ODD.findall(text)}
        names |= set(control.findall("" if row.text else text))
        counts.update(names)
        if names:
            places.append(f"{row.where}: {', '.join(sorted(names))}")
    found.odd_rows, found.odd, found.odd_at = len(places), dict(counts.most_common()), places[:_SHOWN]


def _pieces(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Piece]:
    """The text of `example`, cut where trained tokens begin and end."""
    pieces: list[Piece] = []
    begin = 0
    for i in range(1, len(example.ids) + 1):
        if i == len(example.ids) or example.trained[i] != example.trained[begin]:
            pieces.append(Piece(str(tokenizer.decode(example.ids[begin:i])), example.trained[begin]))
            begin = i
    return pieces

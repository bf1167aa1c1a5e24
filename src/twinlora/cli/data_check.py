"""`twinlora data check`: what exactly would be trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from twinlora.cli.console import carry_out, out
from twinlora.config import DataCheckOptions
from twinlora.reporter import Reporter

if TYPE_CHECKING:
    from twinlora.data.check import Bin, Check, Sample

Finding = tuple[bool, str, Sequence[str]]  # good or not, in words, where

_BAR = 32  # cells of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"
_PLACES = 3  # shown of each finding
_SAMPLE = 600  # characters of a piece of a sample


def run(options: DataCheckOptions) -> None:
    """Read and encode the rows, then show the figures."""
    carry_out(options, _check, _show, asdict)


def _check(options: DataCheckOptions, reporter: Reporter) -> Check:
    from twinlora.data import sources
    from twinlora.data.check import check
    from twinlora.model.load import load_tokenizer, resolve

    source = resolve(options.model, weights=False)
    data = sources.read(options.data, columns=options.columns, note=reporter.note)
    held_out = sources.read(options.eval, columns=options.columns, note=reporter.note)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    return check(tokenizer, data, held_out, max_length=options.max_length, samples=options.samples)


def _show(found: Check) -> None:
    share = found.trained_tokens / found.tokens if found.tokens else 0
    out.print(
        f"{found.rows:,} rows, {found.examples:,} examples, {found.tokens:,} tokens, "
        f"{found.trained_tokens:,} of them trained ({share:.1%})\n"
    )
    _show_histogram(found.histogram)
    if found.longest:
        out.print(f"  median {found.median:,}, longest {found.longest:,} at {found.longest_at}\n", markup=False)
    for good, text, places in _findings(found):
        out.print(f"[{'green' if good else 'yellow'}]{'✓' if good else '!'}[/] ", end="")
        out.print(text, markup=False)
        for place in places[:_PLACES]:
            out.print(f"    {place}", markup=False, style="dim")
    for sample in found.samples:
        _show_sample(sample)


def _show_histogram(bins: Sequence[Bin]) -> None:
    most = max((one.examples for one in bins), default=1)
    width = max((len(f"{one.low}–{one.high}") for one in bins), default=0)
    for filled, group in itertools.groupby(bins, key=lambda one: one.examples > 0):
        for one in group if filled else []:
            label = f"{one.low}–{one.high}".rjust(width)
            out.print(f"  {label} tokens  [cyan]{_bar(one.examples / most)}[/cyan] {one.examples:,}")
        if not filled:
            out.print(f"  {'⋮'.rjust(width)}")


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(_BAR)


def _findings(found: Check) -> list[Finding]:
    """Each question with its answer: good or not, in words, and where."""
    limit, held_out = f"longer than max_length {found.max_length:,}", f"of {found.eval_rows:,} held-out rows"
    names = ", ".join(f"{name} ({count:,})" for name, count in list(found.odd.items())[:5])
    findings = [
        _finding(
            found.overlong, f"example is {limit}", f"examples are {limit}", f"no example is {limit}", found.overlong_at
        ),
        _finding(
            found.untrained, "row has nothing to train on", "rows have nothing to train on",
            "no other row is empty" if found.refused else "every row trains something", found.untrained_at,
        ),
        _ending(found),
        _finding(
            found.duplicates, "row is a copy of an earlier one", "rows are copies of an earlier one",
            "no row stands there twice", found.duplicates_at,
        ),
        _finding(
            found.contradictions, "row asks what an earlier one asks and answers otherwise",
            "rows ask what an earlier one asks and answer otherwise", "no row contradicts another",
            found.contradictions_at,
        ),
        _finding(
            found.odd_rows, f"row with unusual characters: {names}", f"rows with unusual characters: {names}",
            "no unusual characters", found.odd_at,
        ),
    ]  # fmt: skip
    if found.refused:
        findings.insert(
            0, _finding(found.refused, "row cannot be trained", "rows cannot be trained", "", found.refused_at)
        )
    if found.eval_rows:
        one, many = f"{held_out} asks what a training row asks", f"{held_out} ask what a training row asks"
        findings.append(
            _finding(found.eval_overlap, one, many, f"none {held_out} is trained on", found.eval_overlap_at)
        )
    return findings


def _finding(count: int, one: str, many: str, none: str, places: Sequence[str]) -> Finding:
    return count == 0, f"{count:,} {one if count == 1 else many}" if count else none, places


def _ending(found: Check) -> Finding:
    if not found.examples:
        return False, "nothing is trained", []
    if not found.end_token:
        return False, "this tokenizer names no end token, so the model will not learn to stop", []
    part = (
        f"all {found.examples:,}"
        if found.end_trained == found.examples
        else f"only {found.end_trained:,} of {found.examples:,}"
    )
    return found.end_trained == found.examples, f"the end of turn {found.end_token} is trained in {part} examples", []


def _show_sample(sample: Sample) -> None:
    """The text of an example; what is trained is green on a terminal that has styles, in ⟦brackets⟧ elsewhere."""
    out.print(f"\n{sample.where}", markup=False, style="bold")
    for piece in sample.pieces:
        text = piece.text
        if len(text) > _SAMPLE:
            text = f"{text[: _SAMPLE // 2]} … {len(text) - _SAMPLE:,} characters … {text[-_SAMPLE // 2 :]}"
        if piece.trained and out.color_system is None:
            text = f"⟦{text}⟧"
        out.print(text, markup=False, style="bold green" if piece.trained else "dim", end="")
    out.print()

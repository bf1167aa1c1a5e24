"""`twinlora compare`."""

from __future__ import annotations

from collections.abc import Callable

from twinlora.cli.console import as_typed, carry_out, figures_table, out, print_table
from twinlora.config import CompareOptions
from twinlora.evaluate.report import BASE, MethodResult, Report, Score


def run(options: CompareOptions) -> None:
    """Compare, then print the table and the verdict."""
    from twinlora.evaluate.compare import compare

    carry_out(options, compare, lambda report: _show(report, options), lambda report: report.model_dump(mode="json"))


def _show(report: Report, options: CompareOptions) -> None:
    show(report)
    out.print(f"report: {options.output / 'report.html'}", markup=False)
    for command in report.next_commands:
        out.print(f"next:   {as_typed(command)}", markup=False)


def show(report: Report) -> None:
    """The figures of a report as a table with a column for each way, and its verdict."""
    from twinlora.evaluate.scores import title_of
    from twinlora.evaluate.verdict import peak_bytes

    table = figures_table("", *(way.method for way in report.ways), gap=2)

    def row(title: str, cell: Callable[[MethodResult], str]) -> None:
        table.add_row(title, *(cell(way) for way in report.ways))

    def tuned(cell: Callable[[MethodResult], str]) -> Callable[[MethodResult], str]:
        return lambda way: "" if way.method == BASE else cell(way)

    for name in report.ways[0].scores:
        row(title_of(name), lambda way, name=name: _score(way.scores[name]))  # type: ignore[misc]
    row("test loss", lambda way: f"{way.test_loss:.3f}")
    row("general text", lambda way: _general(way))
    row("tokens/s", tuned(lambda way: f"{way.tokens_per_second or 0:,.0f}"))
    row("peak memory", tuned(lambda way: f"{peak_bytes(way) / 1e9:.2f} GB"))
    row("base weights", lambda way: f"{way.base_weight_bytes / 1e6:,.0f} MB")
    row("to keep", tuned(lambda way: f"{way.artefact_bytes / 1e6:,.1f} MB"))
    print_table(table)
    for line in (report.verdict.sentence, *report.verdict.notes):
        out.print(line, markup=False)


def _score(score: Score) -> str:
    return f"{score.value:.1%} ({100 * score.low:.1f}–{100 * score.high:.1f})"


def _general(way: MethodResult) -> str:
    """The loss on general text, before → after."""
    after = f"{way.general.after:.3f}"
    return after if way.method == BASE else f"{way.general.before:.3f} → {after}"

"""`twinlora compare`."""

from __future__ import annotations

from twinlora.cli.console import as_typed, out, print_json
from twinlora.config import CompareOptions
from twinlora.evaluate.report import Report
from twinlora.reporter import ConsoleReporter


def run(options: CompareOptions) -> None:
    """Compare, then print the table and the verdict."""
    from twinlora.evaluate.compare import compare

    reporter = ConsoleReporter()
    try:
        report = compare(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(report.model_dump(mode="json"))
        return
    show(report)
    out.print(f"report: {options.output / 'report.html'}", markup=False)
    for command in report.next_commands:
        out.print(f"next:   {as_typed(command)}", markup=False)


def show(report: Report) -> None:
    """The figures of a report as a table, and its verdict."""
    from rich.table import Table

    from twinlora.evaluate.scores import title_of
    from twinlora.evaluate.verdict import peak_bytes

    table = Table(box=None, pad_edge=False, header_style="dim")
    others = [name for name in report.ways[0].scores if name != report.metric]
    titles = ("", f"{title_of(report.metric)} (95 %)", *map(title_of, others), "test loss", "general text")
    for title in (*titles, "tokens/s", "peak", "base", "adapter"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for way in report.ways:
        score = way.scores[report.metric]
        tuned = (
            [f"{way.tokens_per_second or 0:,.0f}", f"{peak_bytes(way) / 1e9:.2f} GB"]
            if way.trained_tokens
            else ["", ""]
        )
        table.add_row(
            way.method,
            f"{score.value:.1%} ({100 * score.low:.1f}–{100 * score.high:.1f})",
            *(f"{way.scores[name].value:.1%}" for name in others),
            f"{way.test_loss:.3f}",
            f"{way.general.before:.3f} → {way.general.after:.3f}" if way.trained_tokens else f"{way.general.after:.3f}",
            *tuned,
            f"{way.base_weight_bytes / 1e6:,.0f} MB",
            f"{way.artefact_bytes / 1e6:,.1f} MB" if way.artefact_bytes else "",
        )
    out.print(table)
    for line in (report.verdict.sentence, *report.verdict.notes):
        out.print(line, markup=False)

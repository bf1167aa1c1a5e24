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

    from twinlora.evaluate.verdict import peak_bytes

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "exact match (95 %)", "test loss", "tokens/s", "peak", "base", "adapter"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for way in report.ways:
        score = way.exact_match
        tuned = (
            [f"{way.tokens_per_second or 0:,.0f}", f"{peak_bytes(way) / 1e9:.2f} GB"]
            if way.trained_tokens
            else ["", ""]
        )
        table.add_row(
            way.method,
            f"{score.value:.1%} ({100 * score.low:.1f}–{100 * score.high:.1f})",
            f"{way.test_loss:.3f}",
            *tuned,
            f"{way.base_weight_bytes / 1e6:,.0f} MB",
            f"{way.artefact_bytes / 1e6:,.1f} MB" if way.artefact_bytes else "",
        )
    out.print(table)
    out.print(report.verdict.sentence, markup=False)

"""`twinlora eval`."""

from __future__ import annotations

from typing import Any

from twinlora.cli.console import out, print_json, print_table
from twinlora.config import EvalOptions
from twinlora.reporter import ConsoleReporter


def run(options: EvalOptions) -> None:
    """Measure, then print the figures."""
    from twinlora.evaluate.evaluate import evaluate

    reporter = ConsoleReporter()
    try:
        result = evaluate(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(result)
        return
    show(result)
    if options.output:
        out.print(f"rows: {options.output}", markup=False)


def show(result: dict[str, Any]) -> None:
    """A line a figure: its value and its 95 % interval; the fields of JSON below their mean."""
    from rich.table import Table

    from twinlora.evaluate.scores import METRICS, title_of

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (f"{result['rows']} rows", "", "95 % interval"):
        table.add_column(title, justify="right" if not title else "left", no_wrap=True)
    for name, digits in (("loss", 4), ("perplexity", 2)):
        if name in result:
            low, high = (f"{end:.{digits}f}" for end in result[f"{name}_interval"])
            table.add_row(name, f"{result[name]:.{digits}f}", f"{low} to {high}")
    for name in METRICS:
        if figure := result.get(name.replace("-", "_")):
            hits = f"  ({figure['hits']} of {figure['rows']})" if "hits" in figure else ""
            interval = f"{figure['low']:.1%} to {figure['high']:.1%}{hits}"
            table.add_row(title_of(name), f"{figure['value']:.1%}", interval)
            for field, share in figure.get("fields", {}).items():
                table.add_row(f"  {field}", f"{share:.1%}")
    print_table(table)

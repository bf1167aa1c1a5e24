"""`twinlora adapter combine`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from twinlora.cli.console import out, print_json, print_table
from twinlora.config import AdapterCombineOptions
from twinlora.reporter import ConsoleReporter


def run(options: AdapterCombineOptions) -> None:
    """Write the adapter, then print what it is and how it does."""
    from twinlora.export.combine import combine

    reporter = ConsoleReporter()
    try:
        result = combine(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Ranks, and the losses if there are any."""
    ranks = ", ".join(map(str, result["ranks"]))
    out.print(f"{result['layers']} layers of rank {ranks}, {result['parameters'] / 1e6:.2f} M parameters")
    if "energy_lost" in result:
        out.print(f"{result['energy_lost']:.2%} of the updates' squared norm is lost")
    if result["losses"]:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
        table.add_column("adapter", no_wrap=True)
        table.add_column("held-out loss", justify="right", no_wrap=True)
        for path, loss in result["losses"].items():
            table.add_row(path, f"{loss:.4f}")
        print_table(table)
    out.print(f"written: {result['adapter']}", markup=False)

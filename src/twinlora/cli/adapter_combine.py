"""`twinlora adapter combine`."""

from __future__ import annotations

from typing import Any

from twinlora.cli.console import carry_out, figures_table, out, print_table
from twinlora.config import AdapterCombineOptions


def run(options: AdapterCombineOptions) -> None:
    """Write the adapter, then print what it is and how it does."""
    from twinlora.export.combine import combine

    carry_out(options, combine, show)


def show(result: dict[str, Any]) -> None:
    """Ranks, and the losses if there are any."""
    ranks = ", ".join(map(str, result["ranks"]))
    out.print(f"{result['layers']} layers of rank {ranks}, {result['parameters'] / 1e6:.2f} M parameters")
    if "energy_lost" in result:
        out.print(f"{result['energy_lost']:.2%} of the updates' squared norm is lost")
    if result["losses"]:
        table = figures_table("adapter", "held-out loss")
        for path, loss in result["losses"].items():
            table.add_row(path, f"{loss:.4f}")
        print_table(table)
    out.print(f"written: {result['adapter']}", markup=False)

"""`twinlora export`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from twinlora.cli.console import carry_out, figures_table, out, print_table
from twinlora.config import ExportOptions


def run(options: ExportOptions) -> None:
    """Write an artefact, then print how it compares with the trained model."""
    from twinlora.export.ship import export

    carry_out(options, export, show)


def show(record: dict[str, Any]) -> None:
    """The candidates of a merge, the gate's figures beside their limits, and what it costs to run."""
    for table in (_candidates(record["choice"]), _parity(record["parity"]), _edge(record.get("edge"))):
        if table is not None:
            print_table(table)
            out.print()
    if record.get("edge"):
        estimates = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in record["edge"]["phones"].items())
        out.print(f"estimate for a phone, half of its memory bandwidth, one pass over the file a token: {estimates}")
    out.print(f"written: {record['output']}", markup=False)


def _candidates(choice: dict[str, Any] | None) -> Table | None:
    if choice is None:
        return None
    table = figures_table("folded into", "held-out loss", "mean KL", "")
    table.add_row("(trained)", f"{choice['trained_loss']:.4f}", "0", "")
    for name, found in choice["candidates"].items():
        kept = "kept" if name == choice["base"] else ""
        table.add_row(name, f"{found['loss']:.4f}", f"{found['kl']:.4g}", kept)
    return table


def _parity(parity: dict[str, Any] | None) -> Table | None:
    if parity is None:
        return None
    limits = parity["limits"]
    table = figures_table(
        f"{parity['runtime']}, {parity['positions']} tokens of {parity['rows']} rows", "mean", "limit", "worst"
    )
    table.add_row("KL, nats", f"{parity['kl_mean']:.3g}", f"{limits['kl']:g}", f"{parity['kl_max']:.3g}")
    error, worst = parity["log_prob_error_mean"], parity["log_prob_error_max"]
    table.add_row("log p error, nats", f"{error:.3g}", f"{limits['log_prob']:g}", f"{worst:.3g}")
    table.add_row("top-1 agreement", f"{parity['top1_agreement']:.1%}", f"{limits['top1']:.0%}", "")
    table.add_row("prompt, tokens", parity["template"], "", "")
    table.add_row("stop tokens", parity["stop_tokens"], "", "")
    return table


def _edge(edge: dict[str, Any] | None) -> Table | None:
    if edge is None:
        return None
    table = figures_table("in llama.cpp here", "file", "peak memory", "reading", "writing")
    for name, cost in edge["measured"].items():
        table.add_row(
            name,
            f"{cost['file_bytes'] / 1e6:.0f} MB",
            f"{cost['peak_rss_bytes'] / 1e6:.0f} MB",
            f"{cost['prompt_tokens_per_second']:.0f} tokens/s",
            f"{cost['new_tokens_per_second']:.0f} tokens/s",
        )
    return table

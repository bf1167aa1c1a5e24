"""`twinlora train`."""

from __future__ import annotations

import shlex
from typing import Any

from twinlora.cli.console import as_typed, carry_out, out
from twinlora.config import TrainOptions
from twinlora.reporter import Reporter


def run(options: TrainOptions) -> None:
    """Fine-tune, then print the run's record."""
    carry_out(options, _train, lambda record: show(record, options))


def _train(options: TrainOptions, reporter: Reporter) -> dict[str, Any]:
    from twinlora.train.loop import train

    return train(options, reporter).record


def show(record: dict[str, Any], options: TrainOptions) -> None:
    """Where the run ended, and how to talk to what it left."""
    where = record.get("adapter") or record.get("model")
    loss = "" if record["eval_loss"] is None else f", held-out loss {record['eval_loss']:.4f}"
    out.print(
        f"{record['steps']} steps, loss {record['loss']:.4f}{loss}, {record['tokens_per_second'] or 0:,.0f} tokens/s, "
        f"peak {record['peak_rss_bytes'] / 1e9:.2f} GB"
    )
    out.print(f"saved: {where}", markup=False)
    if options.method != "full":
        precision = [] if options.method == "lora" else ["--precision", "auto"]
        command = shlex.join(["twinlora", "chat", "--model", options.model, *precision, "--adapter", f"mine={where}"])
        out.print(f"next:  {as_typed(command)}", markup=False)

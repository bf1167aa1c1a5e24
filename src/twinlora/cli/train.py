"""`twinlora train`."""

from __future__ import annotations

from twinlora.cli.console import as_typed, out, print_json
from twinlora.config import TrainOptions
from twinlora.reporter import ConsoleReporter


def run(options: TrainOptions) -> None:
    """Fine-tune, then print the run's record."""
    from twinlora.train.loop import train

    reporter = ConsoleReporter()
    try:
        record = train(options, reporter).record
    finally:
        reporter.close()
    if options.json_output:
        print_json(record)
        return
    where = record.get("adapter") or record.get("model")
    loss = "" if record["eval_loss"] is None else f", held-out loss {record['eval_loss']:.4f}"
    out.print(
        f"{record['steps']} steps, loss {record['loss']:.4f}{loss}, {record['tokens_per_second'] or 0:,.0f} tokens/s, "
        f"peak {record['peak_rss_bytes'] / 1e9:.2f} GB"
    )
    out.print(f"saved: {where}", markup=False)
    if options.method != "full":
        precision = "" if options.method == "lora" else " --precision auto"
        command = f"twinlora chat --model {options.model}{precision} --adapter mine={where}"
        out.print(f"next:  {as_typed(command)}", markup=False)

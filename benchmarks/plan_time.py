"""Predicted against measured time of a training step on this machine, for the cells of plan_memory.py.

    python benchmarks/plan_time.py --model DIR [--scratch DIR] [--output benchmarks/results/plan_time.json]

Before each cell the rates are measured: products, attention, copies, steps of two small models of its own, nothing of any cell (each time
anew, because a rented machine's speed changes within minutes). Then the cell is predicted from its configuration and these
rates, and measured in a process of its own that loads the checkpoint as training does: the median of its steps after one or two
that do not count. Run it on a quiet machine, with all of its cores.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import plan_memory

_SECONDS, _LEAST, _MOST = 8.0, 5, 60  # of steps of a cell that count
_LONG = 6.0  # seconds from which on a step counts after one before it, and three will do


def measure(connection: Any, directory: str, cell: Any) -> None:
    """The body of a cell's process: seconds of each step."""
    from twinlora import machine
    from twinlora.model.load import resolve

    machine.keep_freed_memory()
    step = plan_memory.stepper(resolve(directory), cell)
    begun = time.perf_counter()
    step()
    long = time.perf_counter() - begun > _LONG
    if not long:
        step()
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < (3 if long else _LEAST) or (time.perf_counter() < end and len(seconds) < _MOST):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    connection.send(seconds)


def calibrate(connection: Any) -> None:
    """In a process of its own: the rates, and how long they took."""
    import torch

    from twinlora.plan import calibrate
    from twinlora.reporter import Reporter

    start = time.perf_counter()
    rates = calibrate.measure(torch.device("cpu"), Reporter())
    connection.send((rates, time.perf_counter() - start))


def in_process(body: Any, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=body, args=(theirs, *arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def compare(directory: str, name: str, shape: str, cell: Any) -> dict[str, Any]:
    """One cell: predicted here, measured in a process of its own."""
    from transformers import AutoConfig

    from twinlora.plan.simulate import simulate

    counts = simulate(AutoConfig.from_pretrained(directory), cell).counts
    tokens = sum(cell.lengths)
    rates, calibration = in_process(calibrate)
    predicted = rates.step_seconds(counts, tokens)
    seconds = in_process(measure, directory, cell)
    measured = statistics.median(seconds)
    row = {"model": name, "method": cell.method, "shape": shape, "checkpointing": cell.checkpointing}
    row |= {"predicted": predicted, "by_kind": rates.seconds_by_kind(counts, tokens), "measured": measured}
    row |= {"steps": seconds, "error": predicted / measured - 1}
    row |= {"calibration_seconds": calibration, "overhead": rates.overhead, "slowdown": rates.slowdown}
    print(
        f"{name:<10} {cell.method:<6} {shape:<9} {'checkpointing' if cell.checkpointing else '':<13} "
        f"predicted {predicted:7.3f} s, measured {measured:7.3f} s ({row['error']:+.1%})",
        flush=True,
    )
    return row


def main() -> None:
    args = plan_memory.arguments(__doc__)
    from transformers import AutoConfig

    models = {Path(args.model).name: args.model}
    if args.scratch:
        plan_memory.write_billion(args.scratch / "llama-1b")
        models["llama-1b"] = str(args.scratch / "llama-1b")
    document: dict[str, Any] = harness.facts() | {"cells": []}
    try:
        for name, directory in models.items():
            layers = AutoConfig.from_pretrained(directory).num_hidden_layers
            for shape, cell in plan_memory.cells(args.methods.split(","), layers):
                if re.search(args.only, f"{name} {cell.method} {shape} {cell.checkpointing}"):
                    document["cells"].append(compare(directory, name, shape, cell))
                    if args.output:
                        args.output.write_text(json.dumps(document, indent=1))
    finally:
        if args.scratch:
            shutil.rmtree(args.scratch / "llama-1b")
    errors = [abs(cell["error"]) for cell in document["cells"]]
    print(f"error: median {statistics.median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()

"""Predicted against measured time of a training step on this machine, for the cells of plan_memory.py.

    python benchmarks/plan_time.py --model DIR [--scratch DIR] [--output benchmarks/results/plan_time.json]

For each cell the rates are measured anew: products, attention, copies, steps of two small models of its own, nothing of any cell. The
cell is predicted from its configuration and these rates. It runs in a process of its own that loads the checkpoint as
training does, and is timed between the turns of the calibration, since a rented machine's speed changes within minutes: the
median of its steps, of which the first one or two do not count. Run it on a quiet machine, with all of its cores.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import plan_memory

_SECONDS, _LEAST, _MOST = 4.0, 2, 30  # of steps of a cell that count, after each turn of the calibration
_LONG = 6.0  # seconds from which on a step counts after one before it, and one a turn will do


def measure(connection: Any, directory: str, cell: Any) -> None:
    """The body of a cell's process: seconds of some steps, each time it is asked; the first time nothing but readiness."""
    from twinlora import machine
    from twinlora.model.load import resolve

    machine.keep_freed_memory()
    step = plan_memory.stepper(resolve(directory), cell)
    begun = time.perf_counter()
    step()
    long = time.perf_counter() - begun > _LONG
    if not long:
        step()
    connection.send([])
    while connection.recv():
        seconds: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(seconds) < (1 if long else _LEAST) or (time.perf_counter() < end and len(seconds) < _MOST):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        connection.send(seconds)


def calibrate(connection: Any) -> None:
    """The body of the calibration's: after every turn it waits for the cell; at the end the rates, and how long they took."""
    import torch

    from twinlora import machine
    from twinlora.plan import calibrate
    from twinlora.reporter import Reporter

    machine.keep_freed_memory()
    start, waited = time.perf_counter(), 0.0

    class Turns(Reporter):
        def progress(self, stage: str, number: int, total: int, text: str = "") -> None:
            nonlocal waited
            if number % (total // calibrate.TURNS) == 0:
                begun = time.perf_counter()
                connection.send(None)
                connection.recv()
                waited += time.perf_counter() - begun

    rates = calibrate.measure(torch.device("cpu"), Turns())
    connection.send((rates, time.perf_counter() - start - waited))


@contextlib.contextmanager
def process(body: Any, *arguments: Any) -> Iterator[Any]:
    """`body(connection, …)` in a process of its own; our end of the connection."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    running = context.Process(target=body, args=(theirs, *arguments))
    running.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        running.kill()
        running.join()


def timed(directory: str, cell: Any) -> tuple[Any, float, list[float]]:
    """The rates, the seconds that they took, and those of the cell's steps."""
    seconds: list[float] = []
    with process(measure, directory, cell) as steps:
        steps.recv()
        with process(calibrate) as calibration:
            while (found := calibration.recv()) is None:
                steps.send(True)
                seconds += steps.recv()
                calibration.send(None)
    return *found, seconds


def compare(directory: str, name: str, shape: str, cell: Any) -> dict[str, Any]:
    """One cell: predicted here, measured in a process of its own."""
    from transformers import AutoConfig

    from twinlora.plan.simulate import simulate

    counts = simulate(AutoConfig.from_pretrained(directory), cell).counts
    tokens = sum(cell.lengths)
    rates, calibration, seconds = timed(directory, cell)
    predicted = rates.step_seconds(counts, tokens)
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

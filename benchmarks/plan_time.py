"""Predicted against measured time of a training step on this machine, for the cells of plan_memory.py.

    python benchmarks/plan_time.py --model DIR [--scratch DIR] [--output benchmarks/results/plan_time.json]

For each model, method and choice of recomputing, the rates are measured anew: products, attention, copies, steps of two
small models of its own, nothing of any cell. The cells are predicted from their configuration and these rates. They run in
a process of their own that loads the checkpoint as training does, and are timed between the turns of the calibration, since
a rented machine's speed changes within minutes: the median of a cell's steps, of which the first one or two do not count,
nor those of the first seconds after the calibration had the machine: its caches are then full of other things.
Run it on a quiet machine, with all of its cores.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import plan_memory

_SECONDS, _LEAST, _MOST = 4.0, 2, 30  # of steps of a cell that count, after each turn of the calibration
_WARM = 4.0  # seconds of steps that do not count, after each turn of the calibration
_LONG = 6.0  # seconds from which on a step counts after one before it, and one a turn will do


def measure(connection: Any, directory: str, cells: list[Any]) -> None:
    """The body of a process of cells: seconds of some steps of each, when it is asked; before that, that it is ready."""
    from twinlora import machine
    from twinlora.model.load import resolve

    machine.keep_freed_memory()
    steps = plan_memory.steppers(resolve(directory), cells)
    long = []
    for step in steps:
        begun = time.perf_counter()
        step()
        long.append(time.perf_counter() - begun > _LONG)
        if not long[-1]:
            step()
    connection.send(None)
    while connection.recv():
        timed(steps[0], 1, _WARM)
        connection.send([timed(step, 1 if slow else _LEAST) for step, slow in zip(steps, long, strict=True)])


def timed(step: Callable[[], None], least: int, at_least: float = _SECONDS) -> list[float]:
    """Seconds of some steps, at least so many."""
    seconds: list[float] = []
    end = time.perf_counter() + at_least
    while len(seconds) < least or (time.perf_counter() < end and len(seconds) < _MOST):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


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


def in_turns(directory: str, cells: list[Any]) -> tuple[Any, float, list[list[float]]]:
    """The rates, the seconds that they took, and those of each cell's steps."""
    seconds: list[list[float]] = [[] for _ in cells]
    with process(measure, directory, cells) as steps:
        steps.recv()
        with process(calibrate) as calibration:
            while (found := calibration.recv()) is None:
                steps.send(True)
                seconds = [every + new for every, new in zip(seconds, steps.recv(), strict=True)]
                calibration.send(None)
    return *found, seconds


def compare(directory: str, name: str, cells: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Cells of one model that differ in their rows: predicted here, measured in a process of their own."""
    from transformers import AutoConfig

    from twinlora.plan.simulate import simulate

    config = AutoConfig.from_pretrained(directory)
    rates, calibration, seconds = in_turns(directory, [cell for _, cell in cells])
    rows = []
    for (shape, cell), steps in zip(cells, seconds, strict=True):
        counts, tokens = simulate(config, cell).counts, sum(cell.lengths)
        predicted, measured = rates.step_seconds(counts, tokens), statistics.median(steps)
        row = {"model": name, "method": cell.method, "shape": shape, "checkpointing": cell.checkpointing}
        row |= {"predicted": predicted, "by_kind": rates.seconds_by_kind(counts, tokens), "measured": measured}
        row |= {"steps": steps, "error": predicted / measured - 1}
        row |= {"calibration_seconds": calibration, "overhead": rates.overhead, "slowdown": rates.slowdown}
        rows.append(row)
        print(
            f"{name:<10} {cell.method:<6} {shape:<9} {'checkpointing' if cell.checkpointing else '':<13} "
            f"predicted {predicted:7.3f} s, measured {measured:7.3f} s ({row['error']:+.1%})",
            flush=True,
        )
    return rows


def main() -> None:
    args = plan_memory.arguments(__doc__).parse_args()
    from transformers import AutoConfig

    models = {Path(args.model).name: args.model}
    if args.scratch:
        plan_memory.write_billion(args.scratch / "llama-1b")
        models["llama-1b"] = str(args.scratch / "llama-1b")
    document: dict[str, Any] = harness.facts() | {"cells": []}
    try:
        for name, directory in models.items():
            layers = AutoConfig.from_pretrained(directory).num_hidden_layers
            groups: dict[Any, list[tuple[str, Any]]] = {}
            for shape, cell in plan_memory.cells(args.methods.split(","), layers):
                if re.search(args.only, f"{name} {cell.method} {shape} {cell.checkpointing}"):
                    groups.setdefault((cell.method, cell.checkpointing), []).append((shape, cell))
            for cells in groups.values():
                document["cells"] += compare(directory, name, cells)
                if args.output:
                    args.output.write_text(json.dumps(document, indent=1))
    finally:
        if args.scratch:
            shutil.rmtree(args.scratch / "llama-1b")
    errors = [abs(cell["error"]) for cell in document["cells"]]
    print(f"error: median {statistics.median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()

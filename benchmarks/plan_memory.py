"""Predicted against measured memory of a training step on a CPU.

    python benchmarks/plan_memory.py --model DIR [--scratch DIR] [--output benchmarks/results/plan_memory.json]
    python benchmarks/plan_memory.py … --measured FILE…    # predict anew what earlier runs have measured

The prediction is `plan.simulate` on the configuration alone. What is measured does not know it: each cell is a process of
its own that loads the checkpoint as training does, and then

- `step`: the tensors alive before a step (Python's own list of them), plus the largest sum of the allocations and frees
  that torch.profiler records while it runs, plus what the C++ kernels hold (glibc's count of bytes in use, before and
  after calls at the cell's shapes);
- `rss`: the largest resident set of another step (VmHWM), less the resident set before the model was loaded, when the
  libraries had run a step of a tiny model. Its prediction adds the products that oneDNN compiles (plan/overhead.py) and what the
  pool of large tensors loses to holes (numerics/pool.py).

Of a cell that several earlier runs have measured the median counts.

Models: the one given, and with --scratch a random llama of 1B parameters, written there and removed at the end. One thread.
A cell that the machine's free memory does not hold is skipped, and said so.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import re
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import torch

SHAPES = {"1x512": (512,), "16 short": (96, 80, 72, 64, 61, 60, 55, 52, 50, 48, 45, 44, 40, 33, 32, 20), "2x1024": (1024, 1024)}  # fmt: skip
BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
NAMES = ("model", "method", "shape", "checkpointing")  # of a cell

# Method hybrid: how the linear layers of a block are stored.
MIX = {
    "self_attn.q_proj": "nf4-64-dq256", "self_attn.k_proj": "16bit", "self_attn.v_proj": "16bit",
    "self_attn.o_proj": "int8-64", "mlp.gate_proj": "nf3-64-dq256", "mlp.up_proj": "nf4-64-dq256",
    "mlp.down_proj": "int8-64",
}  # fmt: skip


def live_tensor_bytes() -> int:
    """Storages of all tensors that Python knows, once each."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def kernel_bytes(config: Any, lengths: tuple[int, ...]) -> int:
    """What the attention kernels keep after calls at the shapes of a cell: in use after them, less before."""
    from twinlora import machine
    from twinlora.numerics import ops

    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads

    def call(q: torch.Tensor, k: torch.Tensor, starts: list[int]) -> None:
        rotation = (torch.ones(len(q), size).bfloat16(), torch.zeros(len(q), size).bfloat16())
        ops.attention(q, k, k, starts, 1.0, None, rotation).sum().backward()

    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    q = torch.ones(starts[-1], heads, size).bfloat16().requires_grad_()
    k = torch.ones(starts[-1], shared, size).bfloat16()
    torch.zeros(8, requires_grad=True).sum().backward()
    gc.collect()
    before = machine.heap_bytes()
    call(q, k, starts)
    q.grad = None
    gc.collect()
    return machine.heap_bytes() - before


def largest_sum(profile: Any) -> int:
    """The most bytes that were allocated and not yet freed, of those recorded."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def ready(source: Any, cell: Any) -> tuple[Any, bool, bool]:
    """The model as `train` prepares it; whether its head is plain and its rows may be packed."""
    from twinlora.adapters.lora import attach
    from twinlora.model import forward, swap
    from twinlora.model.load import load_model
    from twinlora.model.recompute import recompute_activations
    from twinlora.numerics.formats import NF4Format

    quantize = NF4Format() if cell.method == "qlora" else dict(cell.precision) or None
    model = load_model(source, quantize=quantize, dtype=cell.dtype)
    if cell.method == "full":
        model.requires_grad_(True)
    else:
        attach(model, cell.lora)
    if cell.checkpointing:
        recompute_activations(model, True)
    model.train()
    swap.replace_blocks(model)
    return model, forward.has_plain_head(model), forward.packing_refusal(model, 256) is None


def stepper(source: Any, cell: Any) -> Any:
    """A function that trains one step."""
    return steppers(source, [cell])[0]


def steppers(source: Any, cells: list[Any]) -> list[Any]:
    """Functions that train one step each of one model, of cells that differ in their rows alone."""
    from twinlora.adapters.lora import trainable_parameters
    from twinlora.config import OptimizerOptions
    from twinlora.data.packing import make_batch
    from twinlora.data.template import Example
    from twinlora.train.optim import MasterAdamW
    from twinlora.train.step import train_step

    model, plain, packed = ready(source, cells[0])
    optimizer = MasterAdamW(trainable_parameters(model), OptimizerOptions())
    optimizer.reserve()
    optimizer.discard_gradients()

    def prepare(cell: Any) -> Any:
        rows = [Example([5] * n, [False] + [True] * (n - 1), "") for n in cell.lengths] * cell.micro_batches
        batch = make_batch(rows, sum(cell.lengths), packed=packed)
        assert len(batch.micro_batches) == cell.micro_batches

        def step() -> None:
            result = train_step(model, batch, optimizer, lr=1e-5, max_grad_norm=1.0, plain_head=plain)
            result.loss.item()

        return step

    return [prepare(cell) for cell in cells]


def measure(connection: Any, directory: str, cell: Any) -> None:
    """The body of a cell's process."""
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    from twinlora import machine
    from twinlora.model.load import resolve

    torch.set_num_threads(1)
    machine.keep_freed_memory()
    config = AutoConfig.from_pretrained(directory)
    held = kernel_bytes(config, cell.lengths)
    with tempfile.TemporaryDirectory() as tiny:
        small = LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=320
        )
        LlamaForCausalLM(small).bfloat16().save_pretrained(tiny)
        precision = mix(2) if cell.precision else {}
        stepper(resolve(tiny), dataclasses.replace(cell, lengths=(64,), rank=4, precision=precision))()
    gc.collect()
    before = machine.held_bytes()
    step = stepper(resolve(directory), cell)
    step()
    gc.collect()
    machine.reset_peaks(torch.device("cpu"))
    step()
    rss = machine.peak_rss_bytes() - before
    gc.collect()
    alive = live_tensor_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    connection.send({"step": alive + largest_sum(profile) + held, "alive": alive, "kernels": held, "rss": rss})


def mix(layers: int) -> dict[str, str]:
    return {f"model.layers.{i}.{name}": stored for i in range(layers) for name, stored in MIX.items()}


def cells(methods: list[str], layers: int) -> list[tuple[str, Any]]:
    from twinlora.plan.simulate import Cell

    return [
        (name, Cell(method=method, lengths=lengths, checkpointing=checkpointing, precision=precision))
        for method in methods
        for name, lengths in SHAPES.items()
        for checkpointing in (False, True)
        for precision in [mix(layers) if method == "hybrid" else {}]
    ]


def apart(directory: str, cell: Any) -> dict[str, Any]:
    """What a process of its own measures of a cell."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, directory, cell))
    process.start()
    theirs.close()
    found: dict[str, Any] = ours.recv()
    process.join()
    return found


def compare(directory: str, name: str, shape: str, cell: Any, measured: dict[Any, Any]) -> dict[str, Any]:
    """One cell: predicted here, measured in a process of its own unless earlier ones have."""
    from transformers import AutoConfig

    from twinlora import machine
    from twinlora.plan.overhead import overhead
    from twinlora.plan.simulate import simulate

    label = f"{name:<10.10} {cell.method:<6} {shape:<9} {'checkpointing' if cell.checkpointing else '':<13}"
    predicted = simulate(AutoConfig.from_pretrained(directory), cell)
    resident = predicted.peak_bytes + predicted.fragmentation + overhead().compiled(predicted.products)
    expected = {"step": predicted.peak_bytes, "rss": resident}
    row = dict(zip(NAMES, (name, cell.method, shape, cell.checkpointing), strict=True))
    earlier = measured.get(tuple(row.values()))
    if earlier:
        sizes = [every["rss"] for every in earlier]
        found = earlier[-1] | {"rss": statistics.median(sizes), "processes": sizes}
    else:
        free = machine._proc_kib("/proc/meminfo", "MemAvailable")
        if 1.08 * expected["rss"] > free:
            print(f"{label} skipped: needs {expected['rss'] / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", flush=True)
            return {}
        found = apart(directory, cell)
    errors = {key: expected[key] / found[key] - 1 for key in expected}
    row |= {
        "predicted": expected,
        "by_cause": predicted.by_cause,
        "fragmentation": predicted.fragmentation,
        "measured": found,
        "error": errors,
    }
    print(
        label + f" step {expected['step'] / 1e6:8.1f} MB, measured {found['step'] / 1e6:8.1f} ({errors['step']:+.1%}); "
        f"rss {expected['rss'] / 1e6:8.1f} MB, measured {found['rss'] / 1e6:8.1f} ({errors['rss']:+.1%})",
        flush=True,
    )
    return row


def write_billion(directory: Path) -> None:
    """A random llama of 1B parameters."""
    from transformers import LlamaConfig

    from twinlora.plan.probe import random_llama

    random_llama(LlamaConfig(**BILLION), torch.bfloat16).save_pretrained(directory)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What may be asked of either benchmark on the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--methods", default="lora,qlora,hybrid,full")
    parser.add_argument("--only", default="", help="a regular expression that cells' names match, to run a few")
    parser.add_argument("--output", type=Path)
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--measured", type=Path, nargs="+", default=[], help="earlier outputs, not to measure again")
    args = parser.parse_args()
    from transformers import AutoConfig

    torch.set_num_threads(1)
    measured: dict[Any, list[dict[str, Any]]] = {}
    for file in args.measured:
        for cell in json.loads(file.read_text())["cells"]:
            measured.setdefault(tuple(cell[key] for key in NAMES), []).append(cell["measured"])
    models = {Path(args.model).name.removesuffix("-instruct"): args.model}
    if args.scratch:
        write_billion(args.scratch / "llama-1b")
        models["llama-1b"] = str(args.scratch / "llama-1b")
    document: dict[str, Any] = harness.facts() | {"cells": []}
    try:
        for name, directory in models.items():
            for shape, cell in cells(args.methods.split(","), AutoConfig.from_pretrained(directory).num_hidden_layers):
                if re.search(args.only, f"{name} {cell.method} {shape} {cell.checkpointing}"):
                    document["cells"] += filter(None, [compare(directory, name, shape, cell, measured)])
                    if args.output:
                        args.output.write_text(json.dumps(document, indent=1))
    finally:
        if args.scratch:  # 2 GB
            shutil.rmtree(args.scratch / "llama-1b")
    worst = {key: max(abs(cell["error"][key]) for cell in document["cells"]) for key in ("step", "rss")}
    print(f"largest error: step {worst['step']:.1%}, rss {worst['rss']:.1%}")


if __name__ == "__main__":
    main()

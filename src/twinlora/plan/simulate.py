"""The memory and the work of a training step, from a configuration alone: `simulate(config, cell)`.

The trainer's own `train_step` runs on the real architecture, with our blocks, adapters and optimiser, over fake
tensors. Causes come from where in the step a tensor is made, not from formulas.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from twinlora.adapters.lora import LoraLinear, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import OptimizerOptions
from twinlora.data.packing import Batch, make_micro_batch
from twinlora.data.template import Example
from twinlora.errors import ConfigError
from twinlora.model.linear import QuantLinear
from twinlora.model.load import weight_bytes
from twinlora.numerics import pool
from twinlora.numerics.formats import DENSE, Format, parse
from twinlora.numerics.target import simulating
from twinlora.numerics.workspace import WEIGHT
from twinlora.plan import work
from twinlora.plan.build import Proof, build, prove, require_family, signatures, with_layers
from twinlora.plan.fold import Fold, aligned, extrapolate, fold, unfolded
from twinlora.plan.ledger import Event, Ledger, Peak, Segment
from twinlora.plan.observe import Observed, observe
from twinlora.plan.targets import Target, TargetName
from twinlora.plan.work import Counts
from twinlora.train.step import train_step

__all__ = ["Cell", "Counts", "Simulated", "larger", "simulate"]

PlannedMethod = Literal["full", "lora", "int8", "qlora", "hybrid"]


@dataclass(frozen=True)
class Cell:
    """One way to train, on one batch shape. `lengths` are the rows of a micro-batch, of which `trained_tokens` carry
    loss; a step has `micro_batches` of them."""

    method: PlannedMethod = "lora"
    lengths: tuple[int, ...] = (512,)
    trained_tokens: int | None = None  # None: all that can
    micro_batches: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    adapter: LoraConfig = field(default_factory=LoraConfig)  # all of it but rank and targets
    precision: Mapping[str, str] = field(default_factory=dict)  # hybrid: linear layer -> its format, or 16bit
    block_size: int = 64
    double_quant: bool = True
    checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16
    target: TargetName = "cpu"
    fused: bool = True
    packing: bool = True

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter, or None for method full."""
        if self.method == "full":
            return None
        return dataclasses.replace(self.adapter, rank=self.rank, target=self.targets)

    def formats(self) -> dict[str, Format | None]:
        """How linear layers are stored, by name (None: in 16 bit); "" stands for all that are not named. Raises
        ConfigError."""
        if self.method in ("full", "lora"):
            return {}
        if self.method == "hybrid":
            return {layer: _format(name) for layer, name in self.precision.items()}
        nested = "-dq256" if self.double_quant and self.method == "qlora" else ""
        return {"": _format(f"{'nf4' if self.method == 'qlora' else self.method}-{self.block_size}{nested}")}


def _format(name: str) -> Format | None:
    """The format of that name, None for 16 bit. Raises ConfigError."""
    return None if name == DENSE else parse(name)


def larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Of two moments, as bytes by cause, the one with more bytes."""
    return max(one, other, key=lambda causes: sum(causes.values()))


@dataclass(frozen=True)
class Simulated:
    """The largest moments of a step, in bytes by ledger.CAUSES; the work of the whole step."""

    passing: dict[str, int]  # of the forward and backward passes
    update: dict[str, int]  # of the optimiser's step, which does not grow with the tokens
    counts: Counts
    trainable_parameters: int
    total_parameters: int  # of the base
    weight_bytes: int  # of the base as stored
    gradient_bytes: int  # of all gradients, which wait while another micro-batch passes
    kernel_bytes: int = 0  # of the workspace, what compiled kernels keep outside of torch's allocator
    products: int = 0  # shapes of 16-bit products, for overhead.py
    fragmentation: int = 0  # on a CPU what the pool takes beyond the peak (numerics/pool.py), which does not include it

    @property
    def by_cause(self) -> dict[str, int]:
        """What the largest moment of all consists of."""
        return larger(self.passing, self.update)

    @property
    def peak_bytes(self) -> int:
        """The bytes of that moment."""
        return sum(self.by_cause.values())


@dataclass(frozen=True)
class _Run:
    """One simulated number of layers."""

    peaks: dict[Segment, Peak]
    log: list[Event]
    alive: int  # bytes before the step
    kept: dict[str, int]  # buffers of kernels, by name
    products: int
    work: Counts
    sizes: dict[str, int]  # trainable, total, bytes of weights and gradients


def simulate(config: PretrainedConfig, cell: Cell) -> Simulated:
    """Simulate a step. Raises ModelError for a family that is not tested, AdapterError for a target that matches
    nothing, ConfigError for a batch or a method that cannot be."""
    require_family(config)
    proof = prove(config, cell.dtype, cell.lora, fused=cell.fused)
    plan = fold(_layers(config, cell))
    with torch.random.fork_rng(devices=[]):
        whole = config.num_hidden_layers
        runs = [_run(with_layers(config, n), cell, proof, n, plan.period, whole) for n in plan.sizes]
    small, large = runs[0], runs[-1]
    passing: dict[str, int] = {}
    update: dict[str, int] = {}
    for segment, found in small.peaks.items():
        by_cause = extrapolate(found.by_cause, large.peaks[segment].by_cause, plan.times)
        if segment[0] == "optimiser":
            update = larger(update, by_cause)
        else:
            passing = larger(passing, by_cause)
    peak = sum(larger(passing, update).values())
    fragmentation = _fragmentation(runs, plan, peak) if cell.target == "cpu" else 0
    for moment in (passing, update):
        moment["workspace"] += sum(large.kept.values())
    outside = sum(size for name, size in large.kept.items() if not name.startswith(WEIGHT))
    sizes = extrapolate(small.sizes, large.sizes, plan.times)
    counts = Counts(work.extrapolate(small.work.calls_of, large.work.calls_of, plan.times))
    return Simulated(
        passing, update, counts, **sizes, kernel_bytes=outside, products=large.products, fragmentation=fragmentation
    )


def _fragmentation(runs: list[_Run], plan: Fold, peak: int) -> int:
    """Bytes that the pool of this machine's process takes for the step beyond its peak."""
    small, large = runs[0], runs[-1]
    alive = small.alive + plan.times * (large.alive - small.alive)
    extent = pool.extent(unfolded(large.log, plan.period, max(0, plan.times - 1)))
    return max(0, extent - (peak - alive))


def _layers(config: PretrainedConfig, cell: Cell) -> list[Any]:
    """What each layer is: equal ones are simulated once."""
    kinds = signatures(config, max(cell.lengths))
    chosen, lora = cell.adapter.layers, cell.lora
    named = [*(lora.target if lora else ()), *cell.adapter.exclude]
    named += [*cell.adapter.rank_pattern, *cell.adapter.modules_to_save]
    beyond = chosen is not None and max(chosen, default=0) >= len(kinds)  # an error, found when targets are resolved
    if beyond or any(character.isdigit() for name in named for character in name):
        return [(i, kind) for i, kind in enumerate(kinds)]  # layers are told apart by their number
    stored: list[list[tuple[str, str]]] = [[] for _ in kinds]
    for name, precision in cell.precision.items():
        if found := re.match(r"(?:[^.\d]+\.)*(\d+)\.(.+)", name):
            stored[int(found[1])].append((found[2], precision))
    return [(kind, chosen is None or i in chosen, sorted(stored[i])) for i, kind in enumerate(kinds)]


def _shortened(lora: LoraConfig | None, layers: int) -> LoraConfig | None:
    """Without the numbers of layers that a shorter model lacks; a number that the whole model lacks stays an error."""
    if lora is None or lora.layers is None:
        return lora
    return dataclasses.replace(lora, layers=tuple(i for i in lora.layers if i < layers))


def _run(config: PretrainedConfig, cell: Cell, proof: Proof, layers: int, period: int, whole: int) -> _Run:
    ledger = Ledger(Target(cell.target))
    ledger.sees_workspace = False  # before the step, where all but what is alive is forgotten
    lora = _shortened(cell.lora, layers) if layers < whole else cell.lora
    with simulating(cell.target), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        model, parameters = build(
            config,
            proof,
            dtype=cell.dtype,
            lora=lora,
            formats=cell.formats(),
            checkpointing=cell.checkpointing,
            fused=cell.fused,
        )
        trained = trainable_parameters(model)
        with ledger.within(("build", None), "optimiser"):
            optimizer = Observed(ledger, trained, OptimizerOptions(), scaled=cell.dtype == torch.float16)
            optimizer.reserve()  # as before a run's first step
            optimizer.discard_gradients()
        _assign(ledger, model, trained if lora else {})
        observe(model, ledger)
        with ledger.within(("batch", None), "activations"):
            batch = _batch(cell, packed=cell.packing and proof.packed)
        ledger.start()
        alive = ledger.total
        train_step(model, batch, optimizer, lr=1e-4, max_grad_norm=1.0, plain_head=proof.plain_head)
    first, again = ledger.work.get(0, {}), ledger.work.get(1, {})
    rest = ledger.work.get(None, {})
    return _Run(
        peaks=aligned(ledger.peaks, layers, period),
        log=ledger.log,
        alive=alive,
        kept=ledger.kept,
        products=len(ledger.products),
        work=Counts.sum([(first, 1), (again, cell.micro_batches - 1), (rest, 1)]),
        sizes={
            "trainable_parameters": sum(p.numel() for p in trained.values()),
            "total_parameters": parameters,
            "weight_bytes": weight_bytes(model),
            "gradient_bytes": sum(p.nbytes for p in trained.values()),
        },
    )


def _assign(ledger: Ledger, model: PreTrainedModel, adapter: Mapping[str, Tensor]) -> None:
    """What was made while the model was built is its weights, except for these."""
    for parameter in adapter.values():
        ledger.assign(parameter, "adapter")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            for tensor in module.quantized.tensors[1:]:
                ledger.assign(tensor, "quantisation constants")
        elif isinstance(module, LoraLinear):
            for value in (*module.parameters(recurse=False), *vars(module).values()):
                if isinstance(value, Tensor):
                    ledger.assign(value, "adapter")


def _batch(cell: Cell, *, packed: bool) -> Batch:
    """Micro-batches of the cell's shape; two stand for any number, since each further one repeats the second."""
    left = sum(length - 1 for length in cell.lengths) if cell.trained_tokens is None else cell.trained_tokens
    rows = []
    for length in cell.lengths:
        trained = min(left, length - 1)
        rows.append(Example([0] * length, [False] * (length - trained) + [True] * trained, ""))
        left -= trained
    if left > 0:
        raise ConfigError(f"trained_tokens {cell.trained_tokens}: rows of {cell.lengths} tokens have fewer")
    count = min(cell.micro_batches, 2)
    micro = [make_micro_batch(rows, packed=packed) for _ in range(count)]
    return Batch(micro, [], sum(part.trained_tokens for part in micro))

"""Training steps of small models with random weights, really run and watched: what a machine's rates come from."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from twinlora.adapters.lora import attach, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import OptimizerOptions
from twinlora.data.packing import make_batch
from twinlora.data.template import Example
from twinlora.model import swap
from twinlora.model.load import load_model, quiet, resolve
from twinlora.numerics.formats import DENSE
from twinlora.plan.simulate import Cell, simulate
from twinlora.plan.targets import TargetName
from twinlora.plan.work import Counts, Kind, of
from twinlora.train.optim import MasterAdamW
from twinlora.train.step import train_step

__all__ = ["FULL", "MIXED", "PLAIN", "TINY", "WIDE", "Probe", "Step", "Watch", "random_llama", "steps"]

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A model, whose layers have these formats in turn, and the rows of its batches; LoRA of that rank, or without one
    all weights are trained."""

    config: LlamaConfig
    batches: tuple[tuple[int, ...], ...]
    rank: int | None = 16
    formats: tuple[str, ...] = (DENSE,)

    def precision(self) -> Mapping[str, str] | None:
        """The format of each linear layer."""
        layers, kinds = range(self.config.num_hidden_layers), self.formats
        if set(kinds) == {DENSE}:
            return None
        return {f"model.layers.{i}.{linear}": kinds[i % len(kinds)] for i in layers for linear in _LINEARS}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, shared: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=vocabulary,
    )  # fmt: skip


TINY = Probe(_llama(128, 256, 4, 2, 2, 320), ((64,),), 4)

# A call's operands are as large as in a model of 100 M and in one of 1,000 M parameters, for few tokens and for many,
# in short rows and in long ones.
MIXED = Probe(
    _llama(768, 2048, 8, 12, 4, 8192),
    ((512,), (48, 80) * 6, (1536,)),
    formats=(DENSE, "nf4-64-dq256", "int8-64", "nf3-64-dq256"),
)
WIDE = Probe(_llama(2048, 8192, 2, 32, 8, 8192), ((320,),), formats=(DENSE, "nf4-64-dq256"))
FULL = Probe(_llama(1024, 3072, 2, 16, 4, 8192), ((384,),), None)
# In the other type of arithmetic.
PLAIN = Probe(_llama(512, 1536, 4, 8, 4, 4096), ((128,),), formats=MIXED.formats)


class Watch(TorchDispatchMode):
    """The calls that are made while it is entered: what each counts as, and its seconds until `wait` returns."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._wait = wait
        self.calls: list[tuple[tuple[Kind, ...], float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self._wait()
        seconds = time.perf_counter() - start
        made = out if isinstance(out, (tuple, list)) else (out,)
        if kinds := tuple(kind for kind, calls in of(func, args, kwargs or {}, made) for _ in range(calls)):
            self.calls.append((kinds, seconds))
        return out


def random_llama(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of random weights, made in `dtype`."""
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.tie_weights()  # which is part of the initialisation that was left out
    return model


class Step:
    """A step of a probe: what it does as a plan counts it, and the calls that it makes, with the seconds they took."""

    def __init__(self, cell: Cell, config: LlamaConfig, train: Callable[[], object], device: torch.device) -> None:
        self._cell, self._config, self._train = cell, config, train
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.tokens = sum(cell.lengths)
        self.calls: list[tuple[Kind, ...]] = []  # of a step
        self._seconds: dict[tuple[Kind, ...], list[float]] = {}

    @cached_property
    def counts(self) -> Counts:
        """What a plan counts."""
        return simulate(self._config, self._cell).counts

    def run(self) -> float:
        """Train a step, and wait until it is done: seconds."""
        start = time.perf_counter()
        self._train()
        self._wait()
        return time.perf_counter() - start

    def look_within(self) -> None:
        """Run it once with its calls seen and timed, one of several times."""
        with Watch(self._wait) as watch:
            self._train()
        self.calls = [kinds for kinds, _ in watch.calls]
        for kinds, seconds in watch.calls:
            self._seconds.setdefault(kinds, []).append(seconds)

    @property
    def seconds_of(self) -> dict[tuple[Kind, ...], float]:
        """Of every call that there is, the median of its seconds."""
        return {kinds: statistics.median(seconds) for kinds, seconds in self._seconds.items()}


def steps(probe: Probe, device: torch.device, dtype: torch.dtype) -> Iterator[Step]:
    """The steps of a probe's model, one for each batch; all of them have been run."""
    precision = probe.precision()
    with tempfile.TemporaryDirectory() as directory:
        quiet(random_llama(probe.config, dtype).save_pretrained, save_directory=directory)
        model = load_model(resolve(directory), quantize=precision, dtype=dtype, device=device)
    if probe.rank is None:
        model.requires_grad_(True)
        cell = Cell(method="full")
    else:
        attach(model, LoraConfig(rank=probe.rank))
        cell = Cell(method="hybrid" if precision else "lora", precision=precision or {}, rank=probe.rank)
    swap.replace_blocks(model.train())
    optimizer = MasterAdamW(trainable_parameters(model), OptimizerOptions())
    for lengths in probe.batches:
        rows = [Example([5] * length, [False] + [True] * (length - 1), "") for length in lengths]
        batch = make_batch(rows, sum(lengths), packed=True, device=device)

        def train(batch: Any = batch) -> None:
            train_step(model, batch, optimizer, lr=1e-5, max_grad_norm=1.0, plain_head=True).loss.item()

        target: TargetName = "cuda" if device.type == "cuda" else "cpu"
        made = Step(replace(cell, lengths=lengths, dtype=dtype, target=target), probe.config, train, device)
        made.run()
        yield made

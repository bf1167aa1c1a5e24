"""A training step of a small model with random weights, really run, for what calls timed alone do not show."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import DENSE
from twinlora.plan import work
from twinlora.plan.simulate import Cell, simulate
from twinlora.plan.speed import sort
from twinlora.train.optim import MasterAdamW
from twinlora.train.step import train_step

__all__ = ["SMALL", "TINY", "WIDE", "Probe", "Step", "Watch", "random_llama"]

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A model, and the tokens of the one row of its batch; LoRA of that rank over layers that have these formats in
    turn."""

    config: LlamaConfig
    tokens: int
    rank: int
    formats: tuple[str, ...] = (DENSE,)

    def precision(self) -> Mapping[str, str] | None:
        """The format of each linear layer."""
        layers, kinds = range(self.config.num_hidden_layers), self.formats
        if set(kinds) == {DENSE}:
            return None
        return {f"model.layers.{i}.{linear}": kinds[i % len(kinds)] for i in layers for linear in _LINEARS}


# One takes little but the time around its calls; of the other two a call's operands are as large as in a model of 100 M
# and in one of 1,000 M parameters.
TINY = Probe(
    LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, vocab_size=320),
    64,
    4,
)
SMALL = Probe(
    LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=8192,
    ),
    512,
    16,
    (DENSE, "nf4-64-dq256", "int8-64", "nf3-64-dq256"),
)  # fmt: skip
WIDE = Probe(
    LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=8192,
    ),
    512,
    16,
    (DENSE, "nf4-64-dq256"),
)  # fmt: skip


class Watch(TorchDispatchMode):
    """The operations that are done while it is entered: their kinds, and the seconds within each sort of them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[work.Kind] = []
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        made = out if isinstance(out, (tuple, list)) else (out,)
        found = [kind for kind, calls in work.of(func, args, kwargs or {}, made) for _ in range(calls)]
        if found:
            name = sort(found[0])
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.kinds += found
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
    """A step of a probe: what it does as a plan counts it, its operations as they run (a plan counts those that the
    reference computes by their parts), and the seconds that pass within them."""

    def __init__(self, probe: Probe, device: torch.device, dtype: torch.dtype) -> None:
        self._probe, self._device, self._dtype = probe, device, dtype
        self.tokens = probe.tokens
        with tempfile.TemporaryDirectory() as directory:
            random_llama(probe.config, dtype).save_pretrained(directory)
            self._model = load_model(resolve(directory), quantize=probe.precision(), dtype=dtype, device=device)
        attach(self._model, LoraConfig(rank=probe.rank))
        swap.replace_blocks(self._model.train())
        self._optimizer = MasterAdamW(trainable_parameters(self._model), OptimizerOptions())
        row = Example([5] * probe.tokens, [False] + [True] * (probe.tokens - 1), "")
        self._batch = make_batch([row], probe.tokens, packed=True, device=device)
        self.run()
        self.kinds: list[work.Kind] = []
        self._within: dict[str, list[float]] = {}

    @cached_property
    def counts(self) -> work.Counts:
        """What a plan counts."""
        precision = self._probe.precision()
        cell = Cell(
            method="hybrid" if precision else "lora", precision=precision or {}, rank=self._probe.rank,
            lengths=(self.tokens,), dtype=self._dtype, target="cuda" if self._device.type == "cuda" else "cpu",
        )  # fmt: skip
        return simulate(self._probe.config, cell).counts

    def run(self, _: int = 0) -> None:
        """Train a step, and wait until it is done."""
        done = train_step(self._model, self._batch, self._optimizer, lr=1e-5, max_grad_norm=1.0, plain_head=True)
        done.loss.item()

    def look_within(self) -> None:
        """Run it once with its operations seen and timed, one of several times."""
        with Watch() as watch:
            self.run()
        self.kinds = watch.kinds
        for name, seconds in watch.seconds.items():
            self._within.setdefault(name, []).append(seconds)

    @property
    def within(self) -> dict[str, float]:
        """Seconds within each sort of operations: the median of those times."""
        return {name: statistics.median(times) for name, times in self._within.items()}

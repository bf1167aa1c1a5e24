"""A training step of a small model with random weights, really run, for what calls timed alone do not show."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from twinlora.adapters.lora import attach, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import OptimizerOptions
from twinlora.data.packing import make_batch
from twinlora.data.template import Example
from twinlora.model import swap
from twinlora.model.load import load_model, resolve
from twinlora.train.optim import MasterAdamW
from twinlora.train.step import train_step

__all__ = ["SMALL", "TINY", "Probe", "step_of"]


@dataclass(frozen=True)
class Probe:
    """A model, and the tokens of the one row of its batch; LoRA of that rank."""

    config: LlamaConfig
    tokens: int
    rank: int


# One takes little but the time around its calls, the other enough that its calls come close to a real model's.
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
)  # fmt: skip


def step_of(probe: Probe, device: torch.device) -> Callable[[], None]:
    """A function that trains one step, and waits until it is done."""
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(probe.config).bfloat16().save_pretrained(directory)
        model = load_model(resolve(directory), device=device)
    attach(model, LoraConfig(rank=probe.rank))
    swap.replace_blocks(model.train())
    optimizer = MasterAdamW(trainable_parameters(model), OptimizerOptions())
    row = Example([5] * probe.tokens, [False] + [True] * (probe.tokens - 1), "")
    batch = make_batch([row], probe.tokens, packed=True, device=device)

    def step() -> None:
        train_step(model, batch, optimizer, lr=1e-5, max_grad_norm=1.0, plain_head=True).loss.item()

    return step

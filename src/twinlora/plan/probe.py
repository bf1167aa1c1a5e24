"""A training step of a tiny model, really run: what is measured of it is what a step takes beside its work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

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

__all__ = ["CONFIG", "RANK", "TOKENS", "tiny_step"]

TOKENS, RANK = 64, 4
CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, vocab_size=320
)  # fmt: skip


def tiny_step(device: torch.device) -> Callable[[], None]:
    """A function that trains one step of LoRA on a batch of one row, and waits until it is done."""
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(directory)
        model = load_model(resolve(directory), device=device)
    attach(model, LoraConfig(rank=RANK))
    swap.replace_blocks(model.train())
    optimizer = MasterAdamW(trainable_parameters(model), OptimizerOptions())
    row = Example([5] * TOKENS, [False] + [True] * (TOKENS - 1), "")
    batch = make_batch([row], TOKENS, packed=True, pad_id=0, device=device)

    def step() -> None:
        train_step(model, batch, optimizer, lr=1e-5, max_grad_norm=1.0, plain_head=True).loss.item()

    return step

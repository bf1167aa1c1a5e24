"""The longest micro-batch runs once before the first step, so that memory runs out then and not after an hour."""

from __future__ import annotations

import torch

from twinlora.config import TrainOptions
from twinlora.data.packing import make_micro_batch, split
from twinlora.data.template import Example
from twinlora.model.forward import loss_sum
from twinlora.train.inputs import Inputs
from twinlora.train.memory import Memory, size_of
from twinlora.train.optim import MasterAdamW
from twinlora.train.prepare import Prepared
from twinlora.train.rng import restore_rng, rng_state

__all__ = ["largest_part", "longest_micro_batch", "rehearse"]


def longest_micro_batch(
    inputs: Inputs, steps: int, options: TrainOptions, limit: int, *, packed: bool
) -> list[Example]:
    """Of all steps, split into micro-batches of at most `limit` tokens, that with the most tokens, fill included."""
    parts = (largest_part(inputs.step_examples(step, options), limit, packed=packed) for step in range(steps))
    return max(parts, key=lambda part: size_of(part, packed=packed))


def largest_part(examples: list[Example], limit: int, *, packed: bool) -> list[Example]:
    """The largest of the micro-batches that `examples` are split into."""
    return max(split(examples, limit, packed=packed), key=lambda part: size_of(part, packed=packed))


def rehearse(
    prepared: Prepared,
    part: list[Example],
    optimizer: MasterAdamW,
    memory: Memory,
    *,
    device: torch.device,
) -> None:
    """Forward and backward over `part`, beside the optimiser's state and other micro-batches' gradients.

    Changes nothing: gradients are discarded, the random generators are put back.
    """
    rng = rng_state(device)
    optimizer.reserve()
    micro = make_micro_batch(part, packed=prepared.packed, device=device)
    try:
        with memory.saving():
            loss = loss_sum(prepared.model, micro, plain_head=prepared.plain_head)
        loss.backward()
    finally:
        optimizer.discard_gradients()
        restore_rng(rng, device)

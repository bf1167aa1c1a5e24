"""The longest micro-batch runs once before the first step, so that memory runs out then and not after an hour."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from twinlora.config import TrainOptions
from twinlora.data.packing import make_micro_batch, split
from twinlora.data.template import Example
from twinlora.errors import OutOfMemory
from twinlora.model.forward import loss_sum
from twinlora.train.inputs import Inputs
from twinlora.train.optim import MasterAdamW
from twinlora.train.prepare import Prepared
from twinlora.train.rng import restore_rng, rng_state

__all__ = ["explain_memory", "longest_micro_batch", "rehearse"]


def longest_micro_batch(inputs: Inputs, steps: int, options: TrainOptions, *, packed: bool) -> list[Example]:
    """The micro-batch with the most tokens, fill included, of all steps."""
    longest: tuple[int, list[Example]] = (0, [])
    for step in range(steps):
        for part in split(inputs.step_examples(step, options), options.micro_batch_tokens, packed=packed):
            longest = max(longest, (_size(part, packed=packed), part), key=lambda found: found[0])
    return longest[1]


def _size(part: list[Example], *, packed: bool) -> int:
    lengths = [len(example.ids) for example in part]
    return sum(lengths) if packed else max(lengths) * len(lengths)


def rehearse(
    prepared: Prepared, part: list[Example], optimizer: MasterAdamW, *, pad_id: int, device: torch.device
) -> None:
    """Forward and backward over `part`, beside the optimiser's state and other micro-batches' gradients.

    Changes nothing: gradients are discarded, the random generators are put back.
    """
    rng = rng_state(device)
    optimizer.reserve()
    micro = make_micro_batch(part, packed=prepared.packed, pad_id=pad_id, device=device)
    try:
        loss_sum(prepared.model, micro, plain_head=prepared.plain_head).backward()
    finally:
        optimizer.discard_gradients()
        restore_rng(rng, device)


@contextlib.contextmanager
def explain_memory(part: list[Example], options: TrainOptions, *, packed: bool) -> Iterator[None]:
    """Turn running out of memory into an OutOfMemory that says how large `part` is and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; on the CPU it has no class
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        longest = max(part, key=lambda example: len(example.ids))
        if len(part) > 1:
            advice = [f"--micro-batch-tokens (now {options.micro_batch_tokens})"]
        else:  # one row is never split
            advice = [f"--max-length (now {options.max_length}) and leave out longer rows"]
        if not options.gradient_checkpointing:
            advice.append("or add --gradient-checkpointing")
        raise OutOfMemory(
            f"out of memory; the largest micro-batch has {_size(part, packed=packed)} tokens in {len(part)} row(s), "
            f"the longest of {len(longest.ids)} tokens ({longest.where})\n"
            f"  {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            f"lower {', '.join(advice)}"
        ) from None

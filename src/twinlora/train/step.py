"""The training step: everything that happens between two updates, and nothing else.

It reads no tensor's value, so that it runs as it is on fake tensors; checks and logging are the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinlora.data.packing import Batch
from twinlora.model.forward import loss_sum
from twinlora.train.optim import MasterAdamW

__all__ = ["StepResult", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """On the device: mean loss of the trained tokens, and the gradient norm before clipping, both float32 []."""

    loss: Tensor
    grad_norm: Tensor


def train_step(
    model: PreTrainedModel,
    batch: Batch,
    optimizer: MasterAdamW,
    *,
    lr: float,
    max_grad_norm: float,
    plain_head: bool,
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepResult:
    """Forward and backward over the micro-batches, then one update. `saving()` is what a forward pass runs under.

    Each micro-batch's summed loss is divided by the trained tokens of the whole batch: a token weighs the same however
    the batch was split.
    """
    total = torch.zeros((), dtype=torch.float32, device=batch.micro_batches[0].input_ids.device)
    for micro in batch.micro_batches:
        with saving():
            loss = loss_sum(model, micro, plain_head=plain_head) / batch.trained_tokens
        optimizer.backward(loss)
        total += loss.detach()
    grad_norm = optimizer.step(lr, max_grad_norm)
    return StepResult(total, grad_norm)

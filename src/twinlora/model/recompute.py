"""Gradient checkpointing (arXiv 1604.06174): activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from twinlora.errors import ModelError

__all__ = ["recompute_activations"]


def recompute_activations(model: PreTrainedModel, enabled: bool) -> None:
    """Let each decoder layer keep its input alone and run again in the backward pass. Raises ModelError.

    What transformers' `activation_checkpointing_enable` (before 5.2x `gradient_checkpointing_enable`) sets on layers,
    without its gradient of the embeddings, which the form of checkpointing without re-entry does not need.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"gradient_checkpointing: {type(model).__name__} does not support it; use --gradient-checkpointing off"
        )
    again = partial(checkpoint, use_reentrant=False)
    for module in model.modules():
        if isinstance(getattr(module, "gradient_checkpointing", None), bool):
            layer: Any = module
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = enabled, again

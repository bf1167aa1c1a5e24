"""Padding-free causal attention: many sequences side by side in one row of tokens, none sees another.

A `Layout` says where the sequences lie; the arithmetic is the op `attention`. Registered with transformers under the
name `twinlora`; without a layout (generation, padded batches) it is transformers' own SDPA path.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from twinlora.numerics import ops

__all__ = ["NAME", "Layout", "register"]

NAME = "twinlora"


class Layout:
    """Sequences of `lengths` (host integers) side by side in one row of tokens."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.device = torch.device(device)
        self.starts = [0, *itertools.accumulate(lengths)]

    @property
    def tokens(self) -> int:
        """The row's length T."""
        return self.starts[-1]

    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 [1, T]."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None].to(self.device)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    layout: Layout | None = kwargs.pop("layout", None)
    if layout is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ops.attention(q, k, v, layout.starts, scale, kwargs.get("sliding_window"))[None], None


def register() -> None:
    """Make `attn_implementation="twinlora"` known to transformers, with its mask function. Idempotent."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)

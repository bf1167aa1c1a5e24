"""Padding-free causal attention: many sequences side by side in one row of tokens, none sees another.

A `Layout` says where the sequences lie; the arithmetic is the op `attention`. Registered with transformers under the
name `twinlora`; without a layout (generation, padded batches) it is transformers' own SDPA path.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from twinlora.numerics import ops

__all__ = ["NAME", "NO_MASK_SHAPE", "Layout", "Rotation", "choose", "register"]

NAME = "twinlora"
# transformers passes a four-dimensional mask on untouched; ours is empty, since the layout says who sees whom.
NO_MASK_SHAPE = (1, 1, 1, 0)
Rotation = tuple[Tensor, Tensor]  # cos and sin [T, D]


class Layout:
    """Sequences of `lengths` (host integers) side by side in one row of tokens."""

    one_pass = False  # made for one pass over the model and gone with it

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.device = torch.device(device)
        self.starts = [0, *itertools.accumulate(lengths)]
        self.seen: dict[str, Any] = {}  # scale and window of the last pass through transformers' interface
        self._rotation: tuple[tuple[Tensor, Tensor], Rotation] | None = None  # tables as they came, and by token

    @property
    def tokens(self) -> int:
        """The row's length T."""
        return self.starts[-1]

    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 [1, T]."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None].to(self.device)

    def rotation(self, tables: tuple[Tensor, Tensor]) -> Rotation:
        """cos and sin [T, D] of tables [1, T, D]; in one pass made once for the layers that share them."""
        if self._rotation is not None and self._rotation[0] is tables:
            return self._rotation[1]
        cos, sin = (table.view(self.tokens, table.shape[-1]) for table in tables)
        if self.one_pass:
            self._rotation = tables, (cos, sin)
        return cos, sin

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, scale: float, window: int | None
    ) -> Tensor:
        """Attention of model layer `layer`: q [T, H, D], k and v [T, K, D], before rotation -> [T, H, D]."""
        return ops.attention(q, k, v, self.starts, scale, window, rotation)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    layout: Layout | None = kwargs.pop("layout", None)
    if layout is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out
    assert type(layout) is Layout, "a cache is filled by our own attention blocks only"
    # Under autocast the rotation leaves query and key wider than value.
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layout.seen = {"scale": scale, "window": window}
    return ops.attention(q, k, v, layout.starts, scale, window)[None], None


def register() -> None:
    """Make `attn_implementation="twinlora"` known to transformers, with its mask function. Idempotent."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def choose(model: PreTrainedModel) -> None:
    """Let `model` attend by our function, where its architecture takes one (soft-capped scores are not ours)."""
    if model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None:
        model.set_attn_implementation(NAME)

"""Initial factors other than random: from the base's own weight (PiSSA), or from what quantising it lost (LoftQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinlora.adapters.lora import lora_layers
from twinlora.adapters.targets import LayerConfig
from twinlora.model.linear import FrozenLinear

__all__ = ["loftq", "pissa"]

_EXACT = 2048  # up to this many rows or columns the decomposition is exact, above it is randomised


def _principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], of equal weight, with B·A the best approximation of `matrix` [out, in] of that rank."""
    if min(matrix.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=8)
        vh = v.T
    root = s[:rank].sqrt()
    lacking = rank - len(root)  # a narrow layer has fewer components than that: the others start at 0
    return F.pad(root[:, None] * vh[:rank], (0, 0, 0, lacking)), F.pad(u[:, :rank] * root, (0, lacking))


@torch.no_grad()
def pissa(model: nn.Module) -> None:
    """Let every adapter of `model` start at the principal components of its base (arXiv 2404.02948).

    The paper takes them out of the base; here the base stays, and a frozen copy of them is subtracted, so that the
    result is a plain LoRA of twice the rank on the untouched base.
    """
    for layer in lora_layers(model).values():
        a, b = _principal(layer.base.dense_weight(torch.float32) / layer.scale, layer.rank)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        layer.start_A, layer.start_B = (nn.Parameter(x.contiguous(), requires_grad=False) for x in (a, b))


@torch.no_grad()
def loftq(weight: Tensor, quantized: FrozenLinear, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """A and B that make up for what quantising `weight` lost (arXiv 2310.08659; one iteration, the base stays NF4)."""
    matrix = weight.float().T if quantized.fan_in_fan_out else weight.float()
    return _principal((matrix - quantized.dense_weight(torch.float32)) / config.scale, config.rank)

"""Several adapters as one, and one in a lower rank. The methods are PEFT's (`add_weighted_adapter`), by its names.

    linear, ties, dare_linear, dare_ties    work on A and B apart, which must be of one rank: rough, but of that rank
    svd, ties_svd, dare_linear_svd, …       work on the products s·B·A, and cut the result to a rank
    cat                                     is exact: all A below, all B beside each other; ranks add up

TIES (arXiv 2306.01708) keeps each adapter's largest entries, elects a sign for each place and averages those that have
it. DARE (arXiv 2311.03099) keeps entries at random and scales them up. `density` is the share that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twinlora.adapters.read import AdapterFile
from twinlora.errors import AdapterError

__all__ = ["METHODS", "Factors", "combine", "compress", "energy_lost"]

METHODS = (
    "svd", "linear", "cat", "ties", "dare_linear", "dare_ties", "ties_svd", "dare_linear_svd", "dare_ties_svd",
)  # fmt: skip
Factors = tuple[Tensor, Tensor]  # A [r, in], B [out, r]; the update is B·A


class _Part(NamedTuple):
    """One adapter's update of a layer, weight · scale · B·A."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float


def _part(adapter: AdapterFile, name: str, weight: float) -> _Part:
    a, b = adapter.tensors[name]
    return _Part(a.float(), b.float(), adapter.configs[name].scale, weight)


def combine(
    adapters: Sequence[AdapterFile],
    weights: Sequence[float],
    method: str,
    *,
    rank: int | None = None,
    density: float = 1.0,
    seed: int = 0,
) -> dict[str, Factors]:
    """Σ weight · adapter, layer by layer; a layer that some lack is combined of the others. `rank`: of the methods that
    cut; default: the highest there is.

    Raises AdapterError for DoRA, whole modules, shapes that differ, and ranks that differ where one is needed.
    """
    _require_plain(adapters)
    generator = torch.Generator().manual_seed(seed)
    highest = rank or max(config.rank for adapter in adapters for config in adapter.configs.values())
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.tensors))
    found: dict[str, Factors] = {}
    for name in names:
        parts = [
            _part(adapter, name, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.tensors
        ]
        if len({(part.b.shape[0], part.a.shape[1]) for part in parts}) > 1:
            raise AdapterError(f"{name}: the adapters are for layers of different shapes")
        found[name] = _layer(name, parts, method, highest, density, generator)
    return found


def _require_plain(adapters: Sequence[AdapterFile]) -> None:
    lines = [f"{a.directory}: a DoRA, whose update is not B·A" for a in adapters if a.magnitudes]
    lines += [f"{a.directory}: trained whole modules ({', '.join(a.modules)})" for a in adapters if a.modules]
    if lines:
        listed = "\n  ".join(lines)
        raise AdapterError(
            f"what cannot be combined or cut to a rank:\n  {listed}\nfold it into its base instead: twinlora merge DIR"
        )


def _layer(
    name: str, parts: list[_Part], method: str, rank: int, density: float, generator: torch.Generator
) -> Factors:
    if method in ("cat", "svd"):
        a = torch.cat([part.a * part.scale * part.weight for part in parts])
        b = torch.cat([part.b for part in parts], dim=1)
        return (a, b) if method == "cat" else _cut(a, b, rank)
    if method.endswith("_svd"):
        weights = torch.tensor([part.weight for part in parts])
        updates = [part.scale * (part.b @ part.a) for part in parts]
        return _cut_dense(_mix(method.removesuffix("_svd"), updates, weights, density, generator), rank)
    if len({len(part.a) for part in parts}) > 1:
        raise AdapterError(f"{name}: {method} needs adapters of one rank; choose svd, cat or {method}_svd")
    shares = [part.scale * part.weight for part in parts]
    roots = torch.tensor([math.sqrt(abs(share)) for share in shares])
    signs = torch.tensor([1.0 if share >= 0 else -1.0 for share in shares])
    a = _mix(method, [part.a for part in parts], roots * signs, density, generator)
    return a, _mix(method, [part.b for part in parts], roots, density, generator)


def _mix(method: str, tensors: list[Tensor], weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Σ weight · tensor, of what pruning and electing leave."""
    if method.startswith("dare"):
        kept = [_random(tensor, density, generator) for tensor in tensors]
    elif method == "ties":
        kept = [_largest(tensor, density) for tensor in tensors]
    else:
        kept = tensors
    stacked = torch.stack(kept)
    weighted = stacked * weights.view(-1, *[1] * tensors[0].dim())
    if not method.endswith("ties"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the entries, by magnitude; others are 0."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return (flat * mask).view_as(tensor)


def _random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability `density`, scaled so that the mean stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _cut(a: Tensor, b: Tensor, rank: int) -> Factors:
    """The best B·A of that rank, from QR decompositions of both factors: the product is never made."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(s))
    return vh[:kept] @ q_a.T, q_b @ (u[:, :kept] * s[:kept])


def _cut_dense(update: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


def compress(adapter: AdapterFile, rank: int) -> dict[str, Factors]:
    """Every update s·B·A as the nearest one of at most that rank. Raises AdapterError for DoRA and whole modules."""
    return combine([adapter], [1.0], "svd", rank=rank)


def energy_lost(adapter: AdapterFile, factors: dict[str, Factors]) -> float:
    """Share of the squared norm of all updates that is not in `factors`."""
    lost = whole = 0.0
    for name, (a, b) in adapter.tensors.items():
        scale, (cut_a, cut_b) = adapter.configs[name].scale, factors[name]
        left, right = torch.cat([scale * b.float(), -cut_b], dim=1), torch.cat([a.float(), cut_a])
        lost += float(((left.T @ left) * (right @ right.T)).sum())
        whole += float(((b.float().T @ b.float()) * (a.float() @ a.float().T)).sum()) * scale**2
    return max(0.0, lost / whole) if whole else 0.0

"""What an adapter on disk is: sizes, norms, where it comes from, and what can load it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twinlora.adapters.loaders import found_in, refused, setting
from twinlora.adapters.passport import Passport
from twinlora.adapters.passport import read as read_passport
from twinlora.adapters.read import CONFIG, WEIGHTS, AdapterFile

__all__ = ["Inspection", "Layer", "Loader", "inspect"]


@dataclass(frozen=True)
class Layer:
    """One adapted layer. Norms are Frobenius norms; `update_norm` is that of scale · B·A."""

    name: str
    rank: int
    scale: float
    shape: tuple[int, int]  # [out, in]
    a_norm: float
    b_norm: float
    update_norm: float


@dataclass(frozen=True)
class Loader:
    """Whether a program loads the adapter as it was trained; `detail` says with which setting, or why not."""

    name: str
    loads: bool
    detail: str = ""


@dataclass(frozen=True)
class Inspection:
    """Everything that can be told without the base model."""

    directory: str
    base_model: str | None
    dora: bool
    rslora: bool
    layers: list[Layer]
    modules: dict[str, int]  # trained as a whole: name and parameters
    parameters: int
    bytes: int
    dtypes: list[str]
    does_nothing: bool
    passport: Passport | None
    loaders: list[Loader]


def inspect(adapter: AdapterFile) -> Inspection:
    """Look at an adapter. Raises AdapterError for a damaged passport."""
    layers = [_layer(adapter, name) for name in adapter.tensors]
    modules = {name: sum(t.numel() for t in parts.values()) for name, parts in adapter.modules.items()}
    tensors = [*(t for pair in adapter.tensors.values() for t in pair), *adapter.magnitudes.values()]
    tensors += [t for parts in adapter.modules.values() for t in parts.values()]
    return Inspection(
        directory=str(adapter.directory),
        base_model=adapter.options.get("base_model_name_or_path"),
        dora=bool(adapter.magnitudes),
        rslora=bool(adapter.options.get("use_rslora")),
        layers=layers,
        modules=modules,
        parameters=sum(t.numel() for t in tensors),
        bytes=sum((adapter.directory / name).stat().st_size for name in (WEIGHTS, CONFIG)),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        # DoRA's magnitudes and whole modules act without B.
        does_nothing=not modules and not adapter.magnitudes and all(layer.update_norm == 0 for layer in layers),
        passport=read_passport(adapter.directory),
        loaders=_loaders(adapter),
    )


def _layer(adapter: AdapterFile, name: str) -> Layer:
    a, b = (t.double() for t in adapter.tensors[name])
    scale = adapter.configs[name].scale
    update = scale * _product_norm(a, b)
    shape = (b.shape[0], a.shape[1])
    return Layer(name, a.shape[0], scale, shape, a.norm().item(), b.norm().item(), update)


def _product_norm(a: Tensor, b: Tensor) -> float:
    """|B·A| of A [r, in] and B [out, r], from r × r products: |BA|² = Σ (BᵀB) · (AAᵀ)."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_(min=0).sqrt())


def _loaders(adapter: AdapterFile) -> list[Loader]:
    traits = found_in(adapter)
    found = []
    for name, program in (("twinlora", None), ("peft", "peft"), ("transformers", "transformers"), ("vLLM", "vllm"),
                          ("llama.cpp", "llama.cpp")):  # fmt: skip
        refusals = [] if program is None else [refusal.reason for refusal in refused(program, traits)]
        found.append(Loader(name, not refusals, "; ".join(refusals) or setting(program, traits)))
    return found

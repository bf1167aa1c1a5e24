"""What was written, read again by others' code and compared tensor by tensor: where an artefact first differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, quants
from torch import Tensor

from twinlora.adapters.merge import Merged
from twinlora.adapters.read import AdapterFile
from twinlora.export import families
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.load import resolve

__all__ = ["checkpoint_difference", "gguf_difference", "gguf_lora_difference"]

# Relative error (Frobenius norm) that a stored type may bring.
_ERRORS = {"F32": 1e-6, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.02}
_LOW_BIT = 0.25


def _difference(name: str, found: Tensor, expected: Tensor, limit: float) -> str | None:
    if found.shape != expected.shape:
        return f"tensor {name} is {list(found.shape)}, expected {list(expected.shape)}"
    expected = expected.float()
    error = float((found.float() - expected).norm() / expected.norm().clamp(min=1e-12))
    return None if error <= limit else f"tensor {name} is off by {error:.1%} (limit {limit:.1%})"


def _first(differences: Iterator[str | None]) -> str | None:
    return next((line for line in differences if line), None)


def checkpoint_difference(directory: Path, weights: Merged, *, trust_remote_code: bool) -> str | None:
    """The first parameter of a 16- or 4-bit checkpoint that is not what was merged."""
    read = Checkpoint(resolve(str(directory)), trust_remote_code=trust_remote_code)
    missing = sorted(set(weights.names) ^ set(read.names))
    if missing:
        return f"tensor {missing[0]} is in one of the two alone"
    return _first(
        _difference(
            name, read.read(name), weights.read(name), _ERRORS["BF16"] if read.stored(name) is None else _LOW_BIT
        )
        for name in weights.names
    )


def _theirs(family: families.Family, config: Any) -> Any:
    """transformers' own knowledge of how a family's tensors lie in GGUF files."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(family.name, TensorProcessor)(config=config.to_dict())


def gguf_difference(path: Path, weights: Merged) -> str | None:
    """The first tensor of a GGUF file that transformers reads otherwise than it was merged."""
    config = weights.base.config
    family = families.family_of(config)
    names, theirs = families.name_map(family, config), _theirs(family, config)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def differences() -> Iterator[str | None]:
        for name in weights.names:
            tensor = stored.get(families.gguf_name(names, name))
            if tensor is None:
                yield f"tensor {name} is missing"
                continue
            read = quants.dequantize(tensor.data, tensor.tensor_type)
            found = torch.from_numpy(theirs.process(weights=read, name=tensor.name).weights.copy())
            limit = _ERRORS.get(tensor.tensor_type.name, _LOW_BIT)
            yield _difference(f"{name} ({tensor.name})", found, weights.read(name), limit)

    return _first(differences())


def gguf_lora_difference(path: Path, adapter: AdapterFile, config: Any) -> str | None:
    """The first layer whose update is not the adapter's."""
    family = families.family_of(config)
    names, theirs = families.name_map(family, config), _theirs(family, config)
    reader = GGUFReader(path)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())

    def differences() -> Iterator[str | None]:
        for layer, (a, b) in adapter.tensors.items():
            name = families.gguf_name(names, f"{layer}.weight")
            if f"{name}.lora_b" not in stored:
                yield f"tensor {layer} is missing"
                continue
            rows = torch.from_numpy(theirs.process(weights=stored[f"{name}.lora_b"], name=name).weights.copy())
            found = alpha / a.shape[0] * rows @ torch.from_numpy(stored[f"{name}.lora_a"].copy())
            yield _difference(layer, found, adapter.configs[layer].scale * b.float() @ a.float(), 1e-3)

    return _first(differences())

"""Adapter directories in the PEFT format, out and in.

`adapter_model.safetensors` holds `base_model.model.<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r];
`adapter_config.json` holds PEFT's LoraConfig. Reading is strict: what we would not compute as PEFT does is an error.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from twinlora import atomic
from twinlora.adapters import passport as passports
from twinlora.adapters.lora import LoraLinear, attach, lora_layers, whole_modules
from twinlora.adapters.read import CONFIG, PREFIX, WEIGHTS, AdapterFile, base_problem, read_adapter
from twinlora.adapters.targets import LoraConfig
from twinlora.errors import AdapterError
from twinlora.model.linear import FrozenLinear, as_frozen, is_linear

__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "AdapterFile",
    "load_adapter",
    "read_adapter",
    "require_fit",
    "save_adapter",
    "save_factors",
    "set_weights",
    "usual",
    "write_into",
]

T = TypeVar("T")


def save_adapter(model: nn.Module, directory: Path, base: str, passport: passports.Passport | None = None) -> None:
    """Write what trains in `model` to `directory` as the plainest LoRA, replacing what is there, whole or not at all.

    rsLoRA is written as the alpha that gives its scale, PiSSA as a LoRA of twice the rank: every loader reads them.
    """
    with atomic.write_directory(directory) as temporary:
        _write(model, temporary, base, passport)


def write_into(model: nn.Module, directory: Path, base: str, passport: passports.Passport | None = None) -> None:
    """As `save_adapter`, into a directory whose other files stay; each file is replaced whole."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=directory) as temporary:
        with atomic.write_directory(Path(temporary) / "adapter") as inner:
            _write(model, inner, base, passport)
        (directory / passports.FILE).unlink(missing_ok=True)
        for file in (Path(temporary) / "adapter").iterdir():
            file.replace(directory / file.name)


def _write(model: nn.Module, directory: Path, base: str, passport: passports.Passport | None) -> None:
    layers, whole = lora_layers(model), whole_modules(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = layer.factors()
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    for name, module in whole.items():
        tensors |= {f"{name}.{key}": parameter for key, parameter in module.named_parameters(recurse=False)}
    stored = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_peft_config(layers, list(whole), base, model), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text, encoding="utf-8")
    if passport is not None:
        (directory / passports.FILE).write_text(passport.model_dump_json(indent=2), encoding="utf-8")


def save_factors(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    targets: list[str],
    base: str,
    passport: passports.Passport | None,
) -> None:
    """Write A [r, in] and B [out, r] of each layer as a LoRA of scale 1, replacing `directory` whole or not at all."""
    rank, ranks = usual({name: len(a) for name, (a, _) in factors.items()})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    stored = {f"{PREFIX}{name}.lora_{part}.weight": tensor.contiguous()
              for name, pair in factors.items() for part, tensor in zip("AB", pair, strict=True)}  # fmt: skip
    with atomic.write_directory(directory) as temporary:
        save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if passport is not None:
            (temporary / passports.FILE).write_text(passport.model_dump_json(indent=2), encoding="utf-8")


def _peft_config(layers: dict[str, LoraLinear], whole: list[str], base: str, model: nn.Module) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig that say something; PEFT fills in its defaults for the others."""
    names = list(layers)
    ranks = {name: layer.factors()[0].shape[0] for name, layer in layers.items()}
    alphas = {name: _number(layer.scale * ranks[name]) for name, layer in layers.items()}
    rank, rank_pattern = usual(ranks)
    alpha, alpha_pattern = usual(alphas)
    kinds = sorted({name.rpartition(".")[2] for name in names})
    left = [n for n, m in model.named_modules() if n not in layers and (is_linear(m) or isinstance(m, FrozenLinear))]
    left = [n for n in left if not n.endswith(".base") and not any(n == w or n.startswith(w + ".") for w in whole)]
    exact = any(n.rpartition(".")[2] in kinds for n in left)  # the short names would match layers we left alone
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank or 8,
        "lora_alpha": alpha or 8,
        "lora_dropout": next((layer.dropout for layer in layers.values()), 0.0),
        "target_modules": sorted(names) if exact else kinds,
        "bias": "none",
        "fan_in_fan_out": any(layer.base.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": whole or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
    }


def _number(value: float) -> float | int:
    """An integer where it is one but for rounding, as α is after it went through α / r · r."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def usual(values: Mapping[str, T]) -> tuple[T | None, dict[str, T]]:
    """The value that most layers have, and patterns for the others: by kind where all of a kind agree."""
    if not values:
        return None, {}
    usual = Counter(values.values()).most_common(1)[0][0]
    by_kind: dict[str, set[T]] = {}
    for name, value in values.items():
        by_kind.setdefault(name.rpartition(".")[2], set()).add(value)
    patterns = {}
    for name, value in values.items():
        kind = name.rpartition(".")[2]
        if value != usual:
            patterns[kind if len(by_kind[kind]) == 1 else re.escape(name)] = value
    return usual, patterns


def require_fit(model: nn.Module, adapter: AdapterFile) -> None:
    """Raise AdapterError that lists every layer of `adapter` that `model` lacks, has in another shape, or with another
    weight than the adapter brings of its base."""
    modules = dict(model.named_modules())
    problems = []
    for name, (a, b) in adapter.tensors.items():
        module = modules.get(name)
        linear = getattr(module, "base", module)
        if linear is not None and is_linear(linear):
            linear = as_frozen(linear)  # a Conv1D has no such attributes
        shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
        if None in shape:
            problems.append(f"{name}: the model has no such linear layer")
        elif shape != (b.shape[0], a.shape[1]):
            problems.append(f"{name}: adapter is for [{b.shape[0]}, {a.shape[1]}], the model has {list(shape)}")
    for name, parameters in adapter.modules.items():
        for key, tensor in parameters.items():
            found = getattr(modules.get(name), key, None)
            if not isinstance(found, nn.Parameter):
                problems.append(f"{name}.{key}: the model has no such parameter")
            elif found.shape != tensor.shape:
                problems.append(f"{name}.{key}: adapter has {list(tensor.shape)}, the model {list(found.shape)}")
    for name, saved in adapter.bases.items():
        layer, _, key = name.rpartition(".")
        found = getattr(getattr(modules.get(layer), "base", modules.get(layer)), key, None)
        if not isinstance(found, Tensor):
            problems.append(f"{name}: the model has no such parameter")
        elif problem := base_problem(name, saved, found):
            problems.append(problem)
    if problems:
        shown = "\n  ".join(problems[:20])
        raise AdapterError(f"adapter {adapter.directory}: {len(problems)} part(s) do not fit this model\n  {shown}")


def load_adapter(model: nn.Module, adapter: AdapterFile) -> None:
    """Attach `adapter` to a model without adapters, ready to train on. Raises AdapterError if it does not fit."""
    require_fit(model, adapter)
    attach(model, LoraConfig(modules_to_save=tuple(adapter.modules)), per_layer=adapter.configs)
    set_weights(model, adapter)


@torch.no_grad()
def set_weights(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy an adapter's tensors into a model that already trains the same layers and modules."""
    layers, whole = lora_layers(model), whole_modules(model)
    same = set(layers) == set(adapter.tensors) and set(whole) == set(adapter.modules)
    if not same or any(
        layers[name].rank != a.shape[0] or (layers[name].magnitude is None) != (name not in adapter.magnitudes)
        for name, (a, _) in adapter.tensors.items()
    ):
        raise AdapterError(
            f"adapter {adapter.directory}: its layers, ranks, magnitudes or modules are not those of this run's options"
        )
    for name, (a, b) in adapter.tensors.items():
        layers[name].lora_A.copy_(a)
        layers[name].lora_B.copy_(b)
    for name, magnitude in adapter.magnitudes.items():
        trained = layers[name].magnitude
        assert trained is not None
        trained.copy_(magnitude)
    for name, parameters in adapter.modules.items():
        for key, tensor in parameters.items():
            getattr(whole[name], key).copy_(tensor)

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twinlora import atomic
from twinlora.adapters import passport as passports
from twinlora.adapters.lora import LoraLinear, attach, lora_layers, whole_modules
from twinlora.adapters.targets import LayerConfig, LoraConfig, pattern_value
from twinlora.errors import AdapterError
from twinlora.model.linear import FrozenLinear, is_linear

__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "AdapterFile",
    "load_adapter",
    "read_adapter",
    "require_fit",
    "save_adapter",
    "set_weights",
    "write_into",
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
T = TypeVar("T")

# Keys of PEFT's LoraConfig that we honour; those that change nothing about a loaded LoRA; the rest must be off.
_HONOURED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "modules_to_save", "peft_type",
}  # fmt: skip
_NEUTRAL = {
    "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "auto_mapping", "fan_in_fan_out", "exclude_modules", "layers_to_transform",
    "layers_pattern", "ensure_weight_tying",
}  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterFile:
    """A PEFT LoRA adapter as read from disk, by layer name: A and B, DoRA's magnitudes, rank and scale.

    `modules` holds the parameters of modules that were trained as a whole.
    """

    directory: Path
    tensors: dict[str, tuple[Tensor, Tensor]]
    configs: dict[str, LayerConfig]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)


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


def _peft_config(layers: dict[str, LoraLinear], whole: list[str], base: str, model: nn.Module) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig that say something; PEFT fills in its defaults for the others."""
    names = list(layers)
    ranks = {name: layer.factors()[0].shape[0] for name, layer in layers.items()}
    alphas = {name: _number(layer.scale * ranks[name]) for name, layer in layers.items()}
    rank, rank_pattern = _usual(ranks)
    alpha, alpha_pattern = _usual(alphas)
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


def _usual(values: Mapping[str, T]) -> tuple[T | None, dict[str, T]]:
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


def read_adapter(directory: Path) -> AdapterFile:
    """Read and check a PEFT LoRA directory, or a run that has an `adapter` directory. Raises AdapterError."""
    if not (directory / CONFIG).is_file() and (directory / "adapter" / CONFIG).is_file():
        directory = directory / "adapter"
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise AdapterError(
                f"adapter {directory}: no {name}; expected a PEFT adapter directory or a run's directory"
            )
    try:
        options = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise AdapterError(f"adapter {directory}: damaged file ({error})") from None
    if not isinstance(options, dict):
        raise AdapterError(f"adapter {directory / CONFIG}: expected a JSON object")
    _refuse_unsupported(directory, options)
    return _sorted_out(directory, options, tensors)


def _refuse_unsupported(directory: Path, options: dict[str, Any]) -> None:
    problems = []
    if options.get("peft_type") != "LORA":
        problems.append(f"peft_type {options.get('peft_type')!r}: only LORA is supported")
    if options.get("bias", "none") != "none":
        problems.append(f"bias {options['bias']!r}: trained biases are not supported")
    init = options.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and not str(init).startswith("eva"):
        problems.append(
            f"init_lora_weights {init!r}: the base was changed by this initialisation; convert it to plain LoRA"
        )
    checked = _HONOURED | _NEUTRAL | {"bias", "init_lora_weights", "megatron_config", "loftq_config"}
    problems += [
        f"{key} = {value!r}: not supported" for key, value in sorted(options.items()) if key not in checked and value
    ]
    if problems:
        raise AdapterError(
            f"adapter {directory}: {len(problems)} feature(s) cannot be loaded\n  " + "\n  ".join(problems)
        )


def _sorted_out(directory: Path, options: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterFile:
    """Every tensor by what it is for. Raises AdapterError that lists those that are for nothing or damaged."""
    parts: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    saved = tuple(options.get("modules_to_save") or ())
    problems = []
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B|magnitude_vector)(\.weight)?", key)
        name, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key}: holds NaN or Inf")
        elif match:
            parts.setdefault(match[1], {})[match[2]] = tensor
        elif key.startswith(PREFIX) and any(name == entry or name.endswith("." + entry) for entry in saved):
            modules.setdefault(name, {})[parameter] = tensor
        else:
            problems.append(
                f"{key}: not a LoRA matrix (expected {PREFIX}<layer>.lora_A.weight or .lora_B.weight), "
                "nor of a module in modules_to_save"
            )
    for entry in saved:
        if not any(name == entry or name.endswith("." + entry) for name in modules):
            problems.append(f"modules_to_save names {entry}, but there is no tensor of it")
    for name, found in parts.items():
        problems += _bad_shapes(name, found, dora=bool(options.get("use_dora")))
    if problems or not (parts or modules):
        listed = "\n  ".join(problems) or "no tensors"
        raise AdapterError(f"adapter {directory / WEIGHTS}: {len(problems)} bad tensor(s)\n  {listed}")
    return AdapterFile(
        directory,
        {name: (found["A"], found["B"]) for name, found in parts.items()},
        {name: _layer_config(options, name, found["A"].shape[0]) for name, found in parts.items()},
        {name: found["magnitude_vector"] for name, found in parts.items() if "magnitude_vector" in found},
        modules,
    )


def _bad_shapes(name: str, found: dict[str, Tensor], *, dora: bool) -> list[str]:
    expected = {"A", "B", "magnitude_vector"} if dora else {"A", "B"}
    if set(found) != expected:
        has, wanted = (", ".join(f"lora_{part}" for part in sorted(parts)) for parts in (set(found), expected))
        return [f"{name}: has {has}; expected {wanted}"]
    a, b = found["A"], found["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return [f"{name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not multiply"]
    if dora and found["magnitude_vector"].shape != b.shape[:1]:
        shape = tuple(found["magnitude_vector"].shape)
        return [f"{name}: lora_magnitude_vector {shape}; expected ({b.shape[0]},)"]
    return []


def _layer_config(options: dict[str, Any], name: str, rank: int) -> LayerConfig:
    alpha = pattern_value(options.get("alpha_pattern") or {}, name, options.get("lora_alpha", 8))
    scale = alpha / (rank**0.5 if options.get("use_rslora") else rank)
    return LayerConfig(rank, scale, options.get("lora_dropout") or 0.0, bool(options.get("use_dora")))


def require_fit(model: nn.Module, adapter: AdapterFile) -> None:
    """Raise AdapterError that lists every layer of `adapter` that `model` lacks or has in another shape."""
    modules = dict(model.named_modules())
    problems = []
    for name, (a, b) in adapter.tensors.items():
        module = modules.get(name)
        linear = getattr(module, "base", module)
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

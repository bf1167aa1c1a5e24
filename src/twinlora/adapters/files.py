"""Adapter directories in the PEFT format, out and in.

`adapter_model.safetensors` holds `base_model.model.<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r];
`adapter_config.json` holds PEFT's LoraConfig. Reading is strict: what we would not compute as PEFT does is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twinlora import atomic
from twinlora.adapters import passport as passports
from twinlora.adapters.lora import LoraConfig, LoraLinear, attach, lora_layers
from twinlora.errors import AdapterError

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "AdapterFile",
    "load_adapter",
    "read_adapter",
    "require_fit",
    "save_adapter",
    "set_weights",
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

# Keys of PEFT's LoraConfig that we honour; those that change nothing about a loaded LoRA; the rest must be off.
_HONOURED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "peft_type",
}
_NEUTRAL = {
    "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "auto_mapping",
}  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterFile:
    """A PEFT LoRA adapter as read from disk: A and B by layer name, and the scale of each."""

    directory: Path
    tensors: dict[str, tuple[Tensor, Tensor]]
    configs: dict[str, LoraConfig]


def save_adapter(
    model: nn.Module, directory: Path, config: LoraConfig, base: str, passport: passports.Passport | None = None
) -> None:
    """Write the adapter of `model` to `directory`, replacing what is there, whole or not at all."""
    layers = lora_layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    with atomic.write_directory(directory) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_peft_config(config, list(layers), base, model), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        if passport is not None:
            (temporary / passports.FILE).write_text(passport.model_dump_json(indent=2), encoding="utf-8")


def _peft_config(config: LoraConfig, names: list[str], base: str, model: nn.Module) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig that say something; PEFT fills in its defaults for the others."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    exact = any(n.rpartition(".")[2] in kinds for n in linears)  # the short names would match layers we left alone
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha % 1 else int(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": sorted(names) if exact else kinds,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


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
    pairs = _pairs(directory, tensors)
    configs = {name: _layer_config(options, name, a.shape[0]) for name, (a, _) in pairs.items()}
    return AdapterFile(directory, pairs, configs)


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


def _pairs(directory: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not match:
            problems.append(f"{key}: not a LoRA matrix (expected {_PREFIX}<layer>.lora_A.weight or .lora_B.weight)")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key}: holds NaN or Inf")
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    for name, parts in found.items():
        if set(parts) != {"A", "B"}:
            problems.append(f"{name}: has lora_{next(iter(parts))} only")
        elif parts["A"].dim() != 2 or parts["B"].dim() != 2 or parts["A"].shape[0] != parts["B"].shape[1]:
            problems.append(
                f"{name}: lora_A {tuple(parts['A'].shape)} and lora_B {tuple(parts['B'].shape)} do not multiply"
            )
    if problems or not found:
        listed = "\n  ".join(problems) or "no tensors"
        raise AdapterError(f"adapter {directory / WEIGHTS}: {len(problems)} bad tensor(s)\n  {listed}")
    return {name: (parts["A"], parts["B"]) for name, parts in found.items()}


def _pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's name wins."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _layer_config(options: dict[str, Any], name: str, rank: int) -> LoraConfig:
    alpha = _pattern_value(options.get("alpha_pattern") or {}, name, options.get("lora_alpha", 8))
    # PEFT scales by alpha / √r with use_rslora; the same factor written as alpha' / r.
    alpha = alpha * rank**0.5 if options.get("use_rslora") else alpha
    return LoraConfig(rank=rank, alpha=alpha, dropout=options.get("lora_dropout") or 0.0, target=(name,))


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
    if problems:
        shown = "\n  ".join(problems[:20])
        raise AdapterError(f"adapter {adapter.directory}: {len(problems)} layer(s) do not fit this model\n  {shown}")


def load_adapter(model: nn.Module, adapter: AdapterFile) -> None:
    """Attach `adapter` to a model without adapters, ready to train on. Raises AdapterError if it does not fit."""
    require_fit(model, adapter)
    attach(model, LoraConfig(target=tuple(adapter.tensors)), per_layer=adapter.configs)
    set_weights(model, adapter)


@torch.no_grad()
def set_weights(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy an adapter's A and B into a model that already has layers of these shapes."""
    layers: dict[str, LoraLinear] = lora_layers(model)
    if set(layers) != set(adapter.tensors) or any(
        layers[n].rank != a.shape[0] for n, (a, _) in adapter.tensors.items()
    ):
        raise AdapterError(f"adapter {adapter.directory}: its layers or ranks are not those of this run's options")
    for name, (a, b) in adapter.tensors.items():
        layers[name].lora_A.copy_(a)
        layers[name].lora_B.copy_(b)

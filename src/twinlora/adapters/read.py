"""PEFT LoRA directories, read strictly: what we would not compute as PEFT does is an error, all in one message."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinlora.adapters.strict import read_json, read_tensors
from twinlora.adapters.targets import LayerConfig, pattern_problem, pattern_value
from twinlora.errors import AdapterError

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "AdapterFile", "base_problem", "read_adapter"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
_CONVERSION = (
    'python -c "import torch; from safetensors.torch import save_file; '
    f"save_file(torch.load('{_PICKLE}', map_location='cpu', weights_only=True), '{WEIGHTS}')\""
)
_SHOWN = 30  # problems listed in an error
_LONGEST = 1000  # characters of a tensor's name; also bounds what patterns are tried on

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

    `modules` holds the parameters of modules that were trained as a whole, `options` the configuration as it stands,
    `digest` the SHA-256 over those of the two files, of the very bytes that were read. `bases` are parameters of the
    base, by name, that PEFT saves with an adapter on the head; nobody trained them, and a model must have the same
    (`base_problem`).
    """

    directory: Path
    tensors: dict[str, tuple[Tensor, Tensor]]
    configs: dict[str, LayerConfig]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    bases: dict[str, Tensor] = field(default_factory=dict)


def base_problem(name: str, saved: Tensor, found: Tensor) -> str | None:
    """Why the base's parameter `name` that an adapter brings is not the one that was `found`, or None if it is."""
    if found.shape == saved.shape:
        if found.is_meta:
            return None  # a model without weights: nothing to compare
        rounding = max(torch.finfo(tensor.dtype).eps for tensor in (saved, found))
        if torch.allclose(saved.to(found), found, rtol=rounding, atol=1e-7):  # float16 has nothing between 0 and 6e-8
            return None
    return f"{name}: the adapter was trained over another one than the model's; give the base that it was trained on"


def read_adapter(directory: Path) -> AdapterFile:
    """Read and check a PEFT LoRA directory, or a run that has an `adapter` directory.

    Raises AdapterError with every problem of both files.
    """
    try:
        if not (directory / CONFIG).exists() and (directory / "adapter" / CONFIG).exists():
            directory = directory / "adapter"
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "no such directory"
            raise AdapterError(f"adapter {directory}: {what}; expected a PEFT adapter directory or a run's directory")
        missing = [_missing(directory / name) for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
        if missing:
            raise AdapterError(
                f"adapter {directory}: {'; '.join(missing)}; expected a PEFT adapter directory or a run's directory"
            )
        config, weights = read_json(directory / CONFIG), read_tensors(directory / WEIGHTS)
    except OSError as error:
        raise AdapterError(f"adapter {directory}: cannot be read: {error.strerror}") from None
    options = config.value
    wrong = config.problems or _wrong_values(options)
    found = _Sorted({} if wrong else options, weights.value)
    # What tensors must be follows from the options: with those wrong, only what is wrong in itself is told.
    in_tensors = weights.problems or (found.damage() if wrong else found.damage() + found.misfits())
    in_options = wrong + ([] if config.problems else _unsupported(options))
    if in_options or in_tensors:
        lines = [f"{CONFIG}: {line}" for line in in_options] + [f"{WEIGHTS}: {line}" for line in in_tensors]
        shown = "\n  ".join(lines[:_SHOWN]) + (f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")
        raise AdapterError(f"adapter {directory}: {len(lines)} problem(s)\n  {shown}")
    return found.adapter(directory, hashlib.sha256(config.digest + weights.digest).hexdigest())


def _missing(path: Path) -> str:
    kind = "is a directory, not a file" if path.is_dir() else "is no regular file"
    if path.is_symlink() or path.exists():
        return f"{path.name} {kind}"
    if path.name == WEIGHTS and (path.parent / _PICKLE).is_file():
        return f"no {WEIGHTS}, only {_PICKLE}, and pickles are never read; if you trust it, type there: {_CONVERSION}"
    return f"no {path.name}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300  # NaN is neither; no float holds a longer integer


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 32


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an integer above 0"),
    "lora_alpha": (_is_number, "a number above 0"),
    "lora_dropout": (lambda v: v is None or v == 0 or (_is_number(v) and v < 1), "a number from 0 to 1"),
    "use_rslora": (lambda v: isinstance(v, bool | None), "true or false"),
    "use_dora": (lambda v: isinstance(v, bool | None), "true or false"),
    "rank_pattern": (lambda v: v is None or isinstance(v, dict), "an object of names and ranks"),
    "alpha_pattern": (lambda v: v is None or isinstance(v, dict), "an object of names and alphas"),
    "modules_to_save": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(name, str) for name in v)),
        "a list of names",
    ),
}


def _wrong_values(options: dict[str, Any]) -> list[str]:
    problems = [
        f"{key} = {str(options[key])[:100]}: expected {expected}"
        for key, (right, expected) in _KINDS.items()
        if key in options and not right(options[key])
    ]
    for key, right, expected in (("rank_pattern", _is_rank, "r"), ("alpha_pattern", _is_number, "lora_alpha")):
        patterns = options.get(key)
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            wrong = pattern_problem(pattern)
            if wrong or not right(value):
                what = wrong or f"{str(value)[:100]}, expected {_KINDS[expected][1]}"
                problems.append(f"{key} {pattern[:100]!r}: {what}")
    return problems


def _unsupported(options: dict[str, Any]) -> list[str]:
    """Features that we would compute wrongly."""
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
    # Settings of an initialisation: whether it changed the base is what init_lora_weights says.
    inits = {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    checked = _HONOURED | _NEUTRAL | inits | {"bias", "megatron_config"}
    return problems + [
        f"{key[:100]} = {str(value)[:100]}: not supported"
        for key, value in sorted(options.items())
        if key not in checked and value
    ]


def _is_saved(key: str, entry: str) -> bool:
    """PEFT's rule: whether the tensor `key` is in a module whose name ends with `entry` of `modules_to_save`, be it in
    the middle of a word."""
    return f"{entry}." in key


class _Sorted:
    """Every tensor by what it is for."""

    def __init__(self, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.options, self.tensors = options, tensors
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.modules: dict[str, dict[str, Tensor]] = {}
        self.bases: dict[str, Tensor] = {}
        self.saved = tuple(options.get("modules_to_save") or ())
        self.others: list[str] = []
        for key, tensor in tensors.items():
            match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B|magnitude_vector)(\.weight)?", key)
            base = re.fullmatch(re.escape(PREFIX) + r"(.+)\.base_layer\.(weight|bias)", key)
            name, _, parameter = key.removeprefix(PREFIX).rpartition(".")
            if len(key) > _LONGEST:
                self.others.append(f"{key[:100]}…: a name of {len(key)} characters")
            elif match:
                self.parts.setdefault(match[1], {})[match[2]] = tensor
            elif base:
                self.bases[f"{base[1]}.{base[2]}"] = tensor
            elif key.startswith(PREFIX) and any(_is_saved(key, entry) for entry in self.saved):
                self.modules.setdefault(name, {})[parameter] = tensor
            else:
                self.others.append(
                    f"{key}: not a LoRA matrix (expected {PREFIX}<layer>.lora_A.weight or .lora_B.weight), "
                    "nor of a module in modules_to_save"
                )

    def damage(self) -> list[str]:
        """What is wrong with the tensors, whatever the options say."""
        bad = [line for name, found in self.parts.items() for line in _bad_shapes(name, found)]
        return bad + [
            f"{key}: holds NaN or Inf" for key, t in self.tensors.items() if not bool(torch.isfinite(t).all())
        ]

    def misfits(self) -> list[str]:
        """Tensors that the options do not foresee, or miss."""
        problems = list(self.others)
        for entry in self.saved:
            keys = (f"{PREFIX}{name}.{key}" for name, found in self.modules.items() for key in found)
            if not any(_is_saved(key, entry) for key in keys):
                problems.append(f"modules_to_save names {entry}, but there is no tensor of it")
        for base in self.bases:
            layer = base.rpartition(".")[0]
            if layer not in self.parts:
                problems.append(f"{layer}: has a base_layer, but no lora_A and lora_B")
        expected = {"A", "B", "magnitude_vector"} if self.options.get("use_dora") else {"A", "B"}
        for name, found in self.parts.items():
            if set(found) != expected:
                has, wanted = (", ".join(f"lora_{p}" for p in sorted(parts)) for parts in (set(found), expected))
                problems.append(f"{name}: has {has}; expected {wanted}")
            elif not _bad_shapes(name, found):
                problems += self._bad_rank(name, found["A"].shape[0])
        return problems if problems or self.parts or self.modules else ["no tensors"]

    def _bad_rank(self, name: str, rank: int) -> list[str]:
        told = pattern_value(self.options.get("rank_pattern") or {}, name, self.options.get("r", 8))
        return [] if told == rank else [f"{name}: rank {rank}; {CONFIG} says {told}"]

    def adapter(self, directory: Path, digest: str) -> AdapterFile:
        """The adapter; there must be no problems."""
        return AdapterFile(
            directory,
            {name: (found["A"], found["B"]) for name, found in self.parts.items()},
            {name: _layer_config(self.options, name, found["A"].shape[0]) for name, found in self.parts.items()},
            {name: found["magnitude_vector"] for name, found in self.parts.items() if "magnitude_vector" in found},
            self.modules,
            self.options,
            digest,
            self.bases,
        )


def _bad_shapes(name: str, found: dict[str, Tensor]) -> list[str]:
    a, b, magnitude = (found.get(part) for part in ("A", "B", "magnitude_vector"))
    problems = [
        f"{name}: lora_{part} has {tensor.dim()} dimensions; expected 2"
        for part, tensor in (("A", a), ("B", b))
        if tensor is not None and tensor.dim() != 2
    ]
    if problems or a is None or b is None:
        return problems
    if a.shape[0] != b.shape[1]:
        return [f"{name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not multiply"]
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        return [f"{name}: lora_magnitude_vector {tuple(magnitude.shape)}; expected ({b.shape[0]},)"]
    return []


def _layer_config(options: dict[str, Any], name: str, rank: int) -> LayerConfig:
    alpha = pattern_value(options.get("alpha_pattern") or {}, name, options.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    return LayerConfig(rank, scale, options.get("lora_dropout") or 0.0, bool(options.get("use_dora")))

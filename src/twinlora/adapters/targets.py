"""What an adapter is to be: ranks, scales and initialisation, and which layers of a model get one."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import regex
from torch import nn

from twinlora.config import AdapterOptions, parse_patterns, parse_ranges
from twinlora.errors import AdapterError
from twinlora.model.linear import FrozenLinear, is_linear

__all__ = [
    "ALL_LINEAR",
    "LayerConfig",
    "LoraConfig",
    "pattern_problem",
    "pattern_value",
    "resolve_modules",
    "resolve_targets",
]

ALL_LINEAR = "all-linear"
T = TypeVar("T")
_PATTERN_LENGTH, _PATTERN_SECONDS = 200, 0.5


@dataclass(frozen=True)
class LayerConfig:
    """The adapter of one layer: rank r, what B·A is multiplied by, dropout on its input, and whether it is a DoRA."""

    rank: int
    scale: float
    dropout: float = 0.0
    dora: bool = False


@dataclass(frozen=True)
class LoraConfig:
    """The adapter of a model. Patterns are PEFT's: regular expressions for the end of a layer's name."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None  # indices of the blocks that get one; None: all
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "pissa", "loftq"] = "default"
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def from_options(cls, options: AdapterOptions) -> Self:
        """As the user said."""
        return cls(
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            target=tuple(options.target),
            exclude=tuple(options.exclude),
            layers=parse_ranges(options.layers) if options.layers is not None else None,
            rank_pattern={key: int(value) for key, value in parse_patterns(options.rank_pattern).items()},
            alpha_pattern=parse_patterns(options.alpha_pattern),
            rslora=options.rslora,
            dora=options.dora,
            init=options.init,
            modules_to_save=tuple(options.modules_to_save),
        )

    def layer(self, name: str) -> LayerConfig:
        """Rank and scale of layer `name`: alpha / r, or alpha / √r with rslora (arXiv 2312.03732)."""
        rank = pattern_value(self.rank_pattern, name, self.rank)
        alpha = pattern_value(self.alpha_pattern, name, self.alpha)
        return LayerConfig(rank, alpha / (math.sqrt(rank) if self.rslora else rank), self.dropout, self.dora)


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern for layers' names is refused, or None. Files of strangers hold patterns too."""
    if len(pattern) > _PATTERN_LENGTH:
        return f"{len(pattern)} characters; expected at most {_PATTERN_LENGTH}"
    if "{" in pattern:  # nested counts take forever to compile
        return "counts in braces are not supported"
    try:
        regex.compile(pattern)
    except regex.error as error:
        return f"not a regular expression ({error})"
    return None


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """PEFT's rule: the first pattern that matches the end of the layer's name wins. Raises AdapterError if one does
    not come to an end."""
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", name, timeout=_PATTERN_SECONDS):
                return value
        except TimeoutError:
            raise AdapterError(f"pattern {pattern!r}: takes too long on {name}; write it more simply") from None
    return default


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name, the output head excluded."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: m for name, m in model.named_modules() if (is_linear(m) or isinstance(m, FrozenLinear)) and m is not head
    }


def _matching(entry: str, names: list[str]) -> list[str]:
    """Names that an entry means: last parts (`q_proj`), whole names, or a regular expression for whole names."""
    if re.fullmatch(r"[\w.-]+", entry):
        return [name for name in names if name == entry or name.endswith("." + entry)]
    try:
        return [name for name in names if re.fullmatch(entry, name)]
    except re.error as error:
        raise AdapterError(f"target {entry!r}: not a regular expression ({error})") from None


def _block_index(name: str) -> int | None:
    """The number of the block that a layer is in: the first number among the parts of its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def resolve_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the layers that get an adapter, in the model's order.

    Raises AdapterError for an entry that matches nothing, with the nearest names.
    """
    linears = list(_linears(model))
    chosen: set[str] = set()
    for entry in config.target:
        found = linears if entry == ALL_LINEAR else _matching(entry, linears)
        if not found:
            raise AdapterError(_no_match("target", entry, model, linears) + f" (or {ALL_LINEAR})")
        chosen.update(found)
    for entry in config.exclude:
        dropped = _matching(entry, linears)
        if not dropped:
            raise AdapterError(_no_match("exclude", entry, model, linears))
        chosen.difference_update(dropped)
    if config.layers is not None:
        have = sorted({index for name in linears if (index := _block_index(name)) is not None})
        beyond = sorted(set(config.layers) - set(have))
        if beyond:
            raise AdapterError(f"layers {beyond}: the model has blocks {have[0]} to {have[-1]}")
        chosen = {name for name in chosen if _block_index(name) in config.layers}
    whole = resolve_modules(model, config)
    chosen = {name for name in chosen if not any(name == w or name.startswith(w + ".") for w in whole)}
    if not chosen and not whole:
        raise AdapterError("no layer is left to train after exclude and layers: give them fewer or other names")
    for kind, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if problem := pattern_problem(key):
                raise AdapterError(f"{kind} {key!r}: {problem}")
            if not any(pattern_value({key: True}, name, False) for name in chosen):
                raise AdapterError(_no_match(kind, key, model, sorted(chosen)))
    return [name for name in linears if name in chosen]


def resolve_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules of `modules_to_save`. Raises AdapterError for one that the model lacks."""
    names = [name for name, module in model.named_modules() if name and list(module.parameters(recurse=False))]
    chosen: list[str] = []
    for entry in config.modules_to_save:
        found = _matching(entry, names)
        if not found:
            raise AdapterError(_no_match("modules_to_save", entry, model, names))
        chosen += [name for name in found if name not in chosen]
    return chosen


def _no_match(option: str, entry: str, model: nn.Module, names: list[str]) -> str:
    stacked = [name for name, m in model.named_modules() if any(p.dim() > 2 for p in m.parameters(recurse=False))]
    if any(_matching(entry, [name, *(f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters())])
           for name in stacked):  # fmt: skip
        return (
            f"{option} {entry!r}: the experts of this model are stacked parameters, not linear layers; "
            "adapters on them are not supported, target the attention's projections"
        )
    kinds = sorted({name.rpartition(".")[2] for name in names})
    near: Any = difflib.get_close_matches(entry, kinds, n=3) or kinds
    return f"{option} {entry!r} matches no layer; did you mean {', '.join(near)}?"

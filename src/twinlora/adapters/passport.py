"""An adapter's passport: what it was trained on and with, checked wherever the adapter is loaded.

Written as `twinlora.json` beside the PEFT files, which other tools ignore.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

import twinlora
from twinlora.adapters.strict import read_json
from twinlora.errors import AdapterError

__all__ = [
    "FILE", "Passport", "check", "check_tokenizer", "described", "home", "read", "require_base", "tokenizer_digests",
    "versions",
]  # fmt: skip

FILE = "twinlora.json"


class Passport(BaseModel):
    """Where an adapter comes from."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    schema_version: int = 1
    base_model: str
    base_fingerprint: str
    base_precision: dict[str, int]
    layer_precision: dict[str, str] | None = None  # of each linear layer, where they differ by choice (method hybrid)
    tokenizer_sha256: str
    chat_template_sha256: str | None
    system: str | None = None
    data_sha256: dict[str, str] = {}
    method: str
    deploy: str | None = None  # the format whose rounding was trained with
    seed: int | None = None
    steps: int | None = None  # None: trained by a loop that is not ours
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"twinlora": twinlora.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """The passport's fields about the tokenizer and its chat template."""
    template = tokenizer.chat_template
    text = _backend_text(tokenizer) if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
    }


def _backend_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fast tokenizer as JSON, without truncation and padding: tokenizer.json may switch them on, and the first call
    switches them off."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return str(backend.to_str())


def home(directory: Path) -> Path:
    """Where the passport of an adapter lies, if there is one: in its directory, or in that of a run."""
    return directory if (directory / FILE).is_file() else directory / "adapter"


def read(directory: Path) -> Passport | None:
    """The passport in `directory`, or None if the adapter has none. Raises AdapterError for a damaged one."""
    path = directory / FILE
    if not path.is_file():
        return None
    found = read_json(path)
    problems = found.problems
    try:
        passport = Passport(**found.value)
    except (TypeError, ValidationError) as error:
        problems = problems or [str(error)]
    if problems:
        listed = "; ".join(problems)
        raise AdapterError(f"{path}: damaged passport ({listed}); delete it to load the adapter without one")
    return passport


def require_base(directory: Path, passport: Passport, *, fingerprint: str, base: str) -> None:
    """Raise AdapterError that names both sides if the adapter was trained on another base than `base`."""
    if passport.base_fingerprint != fingerprint:
        raise AdapterError(
            f"adapter {directory} was trained on another base model\n"
            f"  trained on: {passport.base_model} (weights {passport.base_fingerprint[:16]})\n"
            f"  loading on: {base} (weights {fingerprint[:16]})\n"
            f"give --model {passport.base_model}, or delete {directory / FILE} if you know better"
        )


def check(
    directory: Path,
    *,
    fingerprint: str,
    base: str,
    precision: dict[str, int],
    layers: Mapping[str, str] | None = None,
    tokenizer: dict[str, str | None] | None = None,
) -> list[str]:
    """Lines to print about loading the adapter onto this base; `layers` is its precision by layer if that was chosen.

    Raises AdapterError if the adapter was trained on another base. `tokenizer`: the digests of the tokenizer in use,
    which must then be the one it was trained with.
    """
    passport = read(directory)
    if passport is None:
        return [f"adapter {directory}: no passport (not written by twinlora); its base model cannot be checked"]
    require_base(directory, passport, fingerprint=fingerprint, base=base)
    lines = check_tokenizer(directory, passport, tokenizer) if tokenizer else []
    if passport.deploy:
        lines.append(f"adapter {directory}: trained to be deployed as {passport.deploy}, running beside its base")
    if passport.base_precision != precision:
        return [
            *lines,
            f"adapter {directory}: trained on {described(passport.base_precision)}, running on {described(precision)}",
        ]
    ours, theirs = _mixed(layers), _mixed(passport.layer_precision)
    moved = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if moved:
        lines.append(f"adapter {directory}: {len(moved)} layers have another precision than in training")
    return lines


def _mixed(layers: Mapping[str, str] | None) -> Mapping[str, str]:
    """The precision of each layer, where they differ; of bases in one format the counts say all."""
    return layers if layers and len(set(layers.values())) > 1 else {}


def check_tokenizer(directory: Path, passport: Passport, tokenizer: dict[str, str | None]) -> list[str]:
    """Lines to print about digests of the tokenizer in use. Raises AdapterError for another one than in training."""
    here, there = tokenizer["tokenizer_sha256"], passport.tokenizer_sha256
    if here != there:
        raise AdapterError(
            f"adapter {directory} was trained with another tokenizer\n"
            f"  trained with: {there[:16]}\n  running with: {str(here)[:16]}\n"
            f"use it on {passport.base_model} with its own tokenizer, or delete {directory / FILE} if you know better"
        )
    if tokenizer["chat_template_sha256"] != passport.chat_template_sha256:
        return [f"adapter {directory}: trained with another chat template than the one in use"]
    return []


def described(precision: dict[str, int]) -> str:
    """`{"nf4-64-dq256": 14, "bfloat16": 1}` in words."""
    return ", ".join(f"{count} layers {name}" for name, count in precision.items())

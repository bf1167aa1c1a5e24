"""Which model a plan is for: its configuration and what the headers of its weights say. No weight is read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from twinlora.errors import ModelError
from twinlora.model import bnb4
from twinlora.model.load import Source, begins_as_gguf, resolve
from twinlora.plan.shapes import SHAPES

__all__ = ["Planned", "describe"]


@dataclass(frozen=True)
class Planned:
    """A model to plan for. `train_as` is what `--model` of train takes, None if there is nothing to train from.

    `checkpoint_bytes` and `types` (weights by type) come from the headers, None where they were not read. `nf4` is for
    weights that are stored in bitsandbytes' NF4: whether their scales are quantised, too; None for all others.
    """

    given: str
    config: PretrainedConfig
    origin: str
    train_as: str | None
    checkpoint_bytes: int | None = None
    types: dict[str, int] | None = None
    nf4: bool | None = None

    def tokenizer_source(self) -> Source:
        """From where its tokenizer comes; fetches it from the hub. Raises ModelError."""
        if self.train_as is None:
            raise ModelError(
                f"model {self.given}: {self.origin} has no tokenizer, and data must be tokenised to be measured; "
                "give a directory or a hub id, or leave --data out"
            )
        return resolve(self.train_as, weights=False)


def describe(model: str, *, trust_remote_code: bool = False) -> Planned:
    """Find `model`: a path, a well-known name or a hub id. Raises ModelError."""
    path = Path(model).expanduser()
    if path.exists() or path.suffix in (".json", ".gguf"):
        return _local(model, path, trust_remote_code)
    shape = SHAPES.get(model.lower())
    if shape is not None:
        return Planned(model, shape.config(), f"built-in shape ({shape.source})", shape.hub)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        import difflib

        near = difflib.get_close_matches(model.lower(), SHAPES, n=3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ModelError(
            f"model {model}: no such path, and no well-known name{hint}\n"
            f"  expected a directory, a config.json, a hub id such as owner/name, or one of {', '.join(SHAPES)}"
        )
    return _hub(model, trust_remote_code)


def _local(model: str, path: Path, trust: bool) -> Planned:
    if not path.exists() or (path.is_dir() and not (path / "config.json").is_file()):
        raise ModelError(f"model {model}: no {'config.json in this directory' if path.is_dir() else 'such file'}")
    if path.is_file() and begins_as_gguf(path):
        config, _ = _config(str(path.parent), model, trust, gguf_file=path.name)
        return Planned(model, config, "GGUF file, trained from its 16-bit values", model, path.stat().st_size)
    config, nf4 = _config(str(path), model, trust)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        return Planned(model, config, "configuration alone", None, nf4=nf4)
    types: dict[str, int] = {}
    for file in files:
        for kind, count in _header(file).items():
            types[kind] = types.get(kind, 0) + count
    size = sum(file.stat().st_size for file in files)
    return Planned(model, config, f"{len(files)} safetensors header(s)", model, size, types, nf4)


def _hub(model: str, trust: bool) -> Planned:
    from huggingface_hub import get_safetensors_metadata

    config, nf4 = _config(model, model, trust)
    try:
        found = get_safetensors_metadata(model)
    except Exception as error:  # the hub's HTTP library differs between its versions; a plan needs no headers
        origin = f"configuration from the hub; headers not read ({type(error).__name__})"
        return Planned(model, config, origin, model, nf4=nf4)
    size = sum(t.data_offsets[1] - t.data_offsets[0] for f in found.files_metadata.values() for t in f.tensors.values())
    types = {str(kind): int(count) for kind, count in found.parameter_count.items()}
    return Planned(model, config, "configuration and safetensors headers from the hub", model, size, types, nf4)


def _config(where: str, model: str, trust: bool, **more: Any) -> tuple[PretrainedConfig, bool | None]:
    """The configuration without what it says about quantisation, and that as `Planned.nf4` has it."""
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust, **more)
    except Exception as error:  # transformers raises errors of many kinds for a configuration that it does not know
        raise ModelError(
            f"model {model}: its configuration could not be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); give a directory, a config.json or a hub id"
        ) from error
    stored = config.__dict__.pop("quantization_config", None)
    nf4 = bool(stored.get("bnb_4bit_use_double_quant")) if bnb4.is_nf4(stored, model) else None
    return config.get_text_config(), nf4  # of a model that also sees pictures, the part that is trained here


def _header(path: Path) -> dict[str, int]:
    """Weights by type of a safetensors file, from its header. Raises ModelError."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        types: dict[str, int] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for extent in entry["shape"]:
                    count *= extent
                types[entry["dtype"]] = types.get(entry["dtype"], 0) + count
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise ModelError(f"{path}: not a safetensors file ({error}); fetch it again") from None
    return types

"""bitsandbytes' 4-bit checkpoints: the tensors of one NF4 weight by their keys, in and out, to the bit.

Beside `P.weight` (codes) lie `.absmax`, `.quant_map`, with double quantisation `.nested_absmax` and
`.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`: the bytes of a JSON object with block sizes, types, shape and
offset.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinlora.errors import ModelError
from twinlora.numerics.formats import NF4Format
from twinlora.numerics.nf4 import codebook, dynamic_map
from twinlora.numerics.ops import QuantTensor

__all__ = [
    "MARK", "is_nf4", "is_part", "is_stored", "pack", "quantization_config", "read_config", "unpack",
]  # fmt: skip

MARK = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", MARK, ".quant_state.bitsandbytes__fp4")


def is_part(name: str) -> bool:
    """Whether a checkpoint's key is an addition to a 4-bit weight, no parameter of the model."""
    return name.endswith(_PARTS)


def _refusal(config: dict[str, Any]) -> str | None:
    """Why a `quantization_config` is not one that is read here, or None."""
    method = config.get("quant_method")
    if method != "bitsandbytes" and not (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return f"it is quantised by {method!r}; expected 16-bit weights or bitsandbytes NF4"
    if not config.get("load_in_4bit"):
        return "its weights are bitsandbytes int8; expected NF4 (load_in_4bit)"
    kind, storage = config.get("bnb_4bit_quant_type"), config.get("bnb_4bit_quant_storage") or "uint8"
    if kind != "nf4":
        return f"its 4-bit type is {kind!r}; expected 'nf4'"
    return None if storage == "uint8" else f"its codes are stored as {storage}; expected uint8"


def read_config(directory: Path, given: str) -> dict[str, Any]:
    """config.json of a checkpoint. Raises ModelError, with the name as `given`, if it holds no JSON object."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {given}: config.json cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ModelError(f"model {given}: config.json is a JSON {kind}, expected an object; fetch it again")
    return config


def is_stored(directory: Path, given: str) -> bool:
    """Whether a checkpoint is bitsandbytes NF4. Raises ModelError, with the name as `given`, if it is quantised
    otherwise, or has no readable configuration."""
    return is_nf4(read_config(directory, given).get("quantization_config"), given)


def is_nf4(config: dict[str, Any] | None, given: str) -> bool:
    """Whether a `quantization_config` is bitsandbytes NF4; False for none. Raises ModelError as `is_stored` does."""
    if config is None:
        return False
    if reason := _refusal(config):
        raise ModelError(f"model {given}: {reason}")
    return True


def quantization_config(fmt: NF4Format, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
    """What transformers wants in config.json; `skipped` are the linear layers that stay as they are."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": bool(fmt.nested_block_size),
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped or None,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack(weight: QuantTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by what follows `P.weight` in their key; `dtype` is what the weight was."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.format.block_size,
        "dtype": _name(dtype),
        "shape": list(weight.shape),
    }
    parts = {"": weight.packed.reshape(-1, 1), ".absmax": weight.scales.reshape(-1), ".quant_map": codebook()}
    if weight.nested_scales is not None and weight.nested_offset is not None:
        state |= {"nested_blocksize": weight.format.nested_block_size, "nested_dtype": "float32"}
        state["nested_offset"] = weight.nested_offset.item()
        parts |= {".nested_absmax": weight.nested_scales.reshape(-1), ".nested_quant_map": dynamic_map()}
    return parts | {MARK: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def unpack(name: str, read: Callable[[str], Tensor]) -> QuantTensor:
    """The weight `name`, read through `read` by key. Raises ModelError for another code book or a damaged state."""
    try:
        state = json.loads(bytes(read(name + MARK).tolist()))
        nested = "nested_blocksize" in state
        fmt = NF4Format(state["blocksize"], state["nested_blocksize"] if nested else 0)
        shape = tuple(int(size) for size in state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: damaged quantisation state ({error}); fetch the checkpoint again") from None
    maps = [(".quant_map", codebook()), *([(".nested_quant_map", dynamic_map())] if nested else [])]
    for key, expected in maps:
        if not torch.allclose(read(name + key).float().flatten(), expected, atol=1e-6):
            raise ModelError(f"{name}{key}: not the code book of NF4 with 8-bit dynamic scales; it cannot be read here")
    nested_scales = read(name + ".nested_absmax").flatten() if nested else None
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None
    return QuantTensor(
        read(name).flatten(), read(name + ".absmax").flatten(), nested_scales, offset, (shape[0], shape[1]), fmt
    )

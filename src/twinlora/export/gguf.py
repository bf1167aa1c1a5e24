"""GGUF files for llama.cpp, written tensor by tensor: F16, BF16, Q8_0, Q4_0, IQ4_NL; K-quants by llama-quantize."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from twinlora.adapters.merge import Merged
from twinlora.errors import BackendError, ModelError
from twinlora.export import families
from twinlora.export.vocabulary import add_vocabulary
from twinlora.numerics import ggml

__all__ = ["OURS", "find_llama_quantize", "llama_quantize", "tensor_type", "write_gguf"]

OURS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "iq4_nl": (GGMLQuantizationType.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
}
_PACKAGE = "ik_llama_cpp"  # its wheel, ik-llama-cpp-python, brings a llama-quantize that is not put on PATH
_HINT = (
    "K-quants are written by llama.cpp's llama-quantize, which is not on PATH: `pip install ik-llama-cpp-python`, or "
    "install llama.cpp (`brew install llama.cpp`, `conda install -c conda-forge llama.cpp`, or a release from "
    "https://github.com/ggml-org/llama.cpp/releases), or choose --quant q4_0 or iq4_nl"
)


def tensor_type(weights: Merged, name: str, quant: str) -> GGMLQuantizationType:
    """How a parameter is stored: vectors in F32; embedding and head of 4-bit files in Q8_0; what does not divide into
    blocks of 32 in F16."""
    shape = weights.shape(name)
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if quant in ("f16", "bf16"):
        return OURS[quant][0]
    if not ggml.fits(shape[-1]):
        return GGMLQuantizationType.F16
    return OURS[quant if weights.low_bit(name) else "q8_0"][0]


def encode(weight: Tensor, kind: GGMLQuantizationType, name: str) -> Tensor:
    """Float32 -> what is written, uint8 but for F16 and F32. Raises ModelError for values that the type cannot hold."""
    if kind == GGMLQuantizationType.F32:
        return weight
    if kind == GGMLQuantizationType.BF16:
        return weight.to(torch.bfloat16).view(torch.uint8)
    if kind == GGMLQuantizationType.F16:
        half = weight.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ModelError(f"GGUF: {name} has values that F16 cannot hold; choose --quant bf16")
        return half
    return ggml.quantize(weight, kind.name.lower(), name=name)


def write_gguf(
    weights: Merged, path: Path, tokenizer: PreTrainedTokenizerBase, *, quant: str, name: str, stop: set[int]
) -> dict[str, int]:
    """Write a model; returns how many tensors are stored how. Raises ModelError for what cannot be written."""
    config = weights.base.config
    family = families.family_of(config)
    names = families.name_map(family, config)
    writer = GGUFWriter(path, family.name)
    writer.add_name(name)
    writer.add_file_type(OURS[quant][1])
    families.add_hyperparameters(writer, config)
    add_vocabulary(writer, tokenizer, weights.shape(f"{weights.base.embedding}.weight")[0], stop)
    extra = families.rotation_tensors(config)
    kinds = {entry: tensor_type(weights, entry, quant) for entry in weights.names}
    for entry, tensor in extra.items():
        writer.add_tensor_info(entry, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
    for entry, kind in kinds.items():
        shape = weights.shape(entry)
        block, size = GGML_QUANT_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // block * size)
        count = torch.Size(stored).numel()
        _announce(writer, families.gguf_name(names, entry), shape, stored, count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    for entry, kind in kinds.items():
        weight = families.arranged(weights.read(entry), entry, family, config)
        writer.write_tensor_data(encode(weight, kind, entry).contiguous().numpy())
    writer.close()
    counts: dict[str, int] = {}
    for kind in kinds.values():
        counts[kind.name] = counts.get(kind.name, 0) + 1
    return counts


def _announce(
    writer: GGUFWriter,
    name: str,
    shape: tuple[int, ...],
    stored: tuple[int, ...],
    size: int,
    kind: GGMLQuantizationType,
) -> None:
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    if plain is not None:
        writer.add_tensor_info(name, shape, np.dtype(plain), size)
    else:
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)


def find_llama_quantize() -> str:
    """Where llama-quantize is: on PATH, or in a package that has it. Raises BackendError if it is nowhere."""
    package = importlib.util.find_spec(_PACKAGE)
    inside = [str(Path(place) / "bin") for place in (package and package.submodule_search_locations) or []]
    program = shutil.which("llama-quantize") or shutil.which("llama-quantize", path=os.pathsep.join(inside))
    if program is None:
        raise BackendError(_HINT)
    return program


def llama_quantize(source: Path, target: Path, quant: str) -> None:
    """Let llama-quantize make a K-quant of an F16 or BF16 file.

    Raises BackendError if it is missing, fails, or takes types that only a fork of llama.cpp has.
    """
    program = find_llama_quantize()
    done = subprocess.run([program, str(source), str(target), quant.upper()], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"llama-quantize failed ({done.returncode}): {(done.stderr or done.stdout)[-400:].strip()}")
    try:
        GGUFReader(target)
    except ValueError as error:
        raise BackendError(
            f"{program} wrote tensors that llama.cpp does not know ({error}), as forks of it do for rows that are no "
            f"multiple of 256: choose another --quant than {quant}, such as q4_k_m or q8_0, or install llama.cpp's own"
        ) from None

"""4-bit checkpoints as transformers with bitsandbytes reads them: linear layers in NF4, everything else in 16 bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from twinlora.adapters.merge import Merged
from twinlora.errors import ModelError
from twinlora.export.merged import write_companions
from twinlora.export.shards import ShardWriter
from twinlora.model import bnb4
from twinlora.numerics.formats import NF4Format

__all__ = ["save_bnb"]


def save_bnb(
    weights: Merged, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, fmt: NF4Format
) -> None:
    """Write the checkpoint, one weight in memory at a time. Weights that did not change keep the base's own codes.

    Raises ModelError for a model whose weights are transposed.
    """
    if weights.base.transposed:
        raise ModelError(
            f"bnb: layers stored as [in, out] (Conv1D of {weights.base.config.model_type}) are not supported"
        )
    parts = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", bnb4.MARK)
    keys = [f"{name}{part}" for name in weights.names for part in (parts if weights.low_bit(name) else ("",))]
    states: dict[str, Tensor] = {}  # of odd lengths: behind the others, which stay aligned
    with ShardWriter(directory, keys) as out:
        for name in weights.names:
            if not weights.low_bit(name):
                tensor = weights.read(name)
                out.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
                continue
            for part, tensor in bnb4.pack(weights.nf4(name, fmt), dtype).items():
                if part == bnb4.MARK:
                    states[name + part] = tensor
                else:
                    out.add(name + part, tensor)
        for name, tensor in states.items():
            out.add(name, tensor)
    skipped = sorted(set(weights.base.linears) - weights.base.quantizable)
    settings = bnb4.quantization_config(fmt, dtype, skipped)
    write_companions(weights, directory, tokenizer, dtype, quantization_config=settings)

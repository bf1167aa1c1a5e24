"""16-bit checkpoints: the merged weights, shard by shard, with everything a loader asks for beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from twinlora.adapters.merge import Merged
from twinlora.errors import ModelError
from twinlora.export.shards import ShardWriter
from twinlora.model.load import Source

__all__ = ["generation_values", "save_16bit", "write_companions"]

# What belongs to a model beside its weights, configuration and generation settings.
_COMPANIONS = (
    "*.jinja",
    "*.txt",
    "*.model",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "added_tokens.json",
)


def save_16bit(weights: Merged, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write a checkpoint that transformers loads; floating-point tensors in `dtype`, one in memory at a time.

    Raises ModelError for values that float16 cannot hold.
    """
    with ShardWriter(directory, weights.names) as out:
        for name in weights.names:
            tensor = weights.read(name)
            stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if dtype == torch.float16 and not bool(torch.isfinite(stored).all()):
                raise ModelError(f"{name} has values that float16 cannot hold; give --weights bfloat16 or float32")
            out.add(name, stored)
    write_companions(weights, directory, tokenizer, dtype)


def write_companions(
    weights: Merged,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    **changes: Any,
) -> None:
    """Configuration (with `changes`), generation settings, tokenizer and template, as the base has them."""
    base = weights.base
    config = base.config_values()
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": weights.tied} | changes
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_values(base.source, base.config, tokenizer))
    copied = [] if base.source.is_gguf else [f for pattern in _COMPANIONS for f in base.source.path.glob(pattern)]
    if not copied:
        tokenizer.save_pretrained(directory)
    for file in copied:
        shutil.copyfile(file, directory / file.name)
    for file in [] if base.source.is_gguf else base.source.path.glob("*.py"):  # of --trust-remote-code
        shutil.copyfile(file, directory / file.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_values(source: Source, config: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """generation_config.json, with the tokenizer's end token among those that end an answer."""
    if not source.is_gguf and (source.path / "generation_config.json").is_file():
        values: dict[str, Any] = json.loads((source.path / "generation_config.json").read_text(encoding="utf-8"))
    else:
        values = json.loads(GenerationConfig.from_model_config(config).to_json_string())
    told = values.get("eos_token_id")
    ends = [*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return values

"""GGUF LoRA adapters, which llama-server swaps while it runs.

llama.cpp adds (alpha / r) · B·A with one alpha a file; scales of layers that differ go into B. Rows of B for q and k
are paired where the family's weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFType, GGUFWriter, Keys

from twinlora.adapters.loaders import found_in, refused
from twinlora.adapters.read import AdapterFile
from twinlora.errors import AdapterError
from twinlora.export import families

__all__ = ["write_gguf_lora"]


def write_gguf_lora(adapter: AdapterFile, config: Any, path: Path, name: str) -> None:
    """Write the adapter, in float32. Raises AdapterError for parts that llama.cpp cannot add."""
    traits = found_in(adapter, tied=bool(getattr(config, "tie_word_embeddings", False)))
    if problems := refused("llama.cpp", traits):
        reasons = " and ".join(problem.reason for problem in problems)
        raise AdapterError(
            f"adapter {adapter.directory}: llama.cpp loads {reasons} in an adapter; "
            "fold it in: twinlora export --to gguf"
        )
    family = families.family_of(config)
    names = families.name_map(family, config)
    first = next(iter(adapter.configs.values()))
    alpha = first.scale * first.rank
    writer = GGUFWriter(path, family.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for layer, (a, b) in adapter.tensors.items():
        found = adapter.configs[layer]
        target = families.gguf_name(names, f"{layer}.weight")
        scaled = b.float() * (found.scale * found.rank / alpha)
        rows = families.arranged(scaled, f"{layer}.weight", family, config)
        writer.add_tensor(f"{target}.lora_a", a.float().contiguous().numpy())
        writer.add_tensor(f"{target}.lora_b", rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

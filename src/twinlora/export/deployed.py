"""Adapters trained with `--deploy`: the one artefact they belong in, and the proof that it has the weights trained."""

from __future__ import annotations

from typing import Any

from twinlora.adapters.deploy import Storage
from twinlora.adapters.merge import Merged
from twinlora.config import ArtefactOptions, ExportOptions
from twinlora.errors import ConfigError, ParityError
from twinlora.model.quantizer import nf4_of

__all__ = ["prove", "require_match"]


def require_match(options: ArtefactOptions, storage: Storage) -> None:
    """Raises ConfigError unless the artefact stores weights as they were trained to be stored."""
    fmt = storage.nf4
    if fmt is not None:
        flags = f"--to bnb --block-size {fmt.block_size}" + ("" if fmt.nested_block_size else " --no-double-quant")
    else:
        flags = f"--to gguf --quant {storage.name}"
    fits = False
    if isinstance(options, ExportOptions) and fmt is not None:
        asked = nf4_of(options)
        fits = options.to == "bnb" and asked == fmt
    elif isinstance(options, ExportOptions):
        fits = options.to == "gguf" and options.quant == storage.name
    if not fits:
        raise ConfigError(
            f"{options.run}: trained to be deployed as {storage.name}, with its rounding; in other weights it is not "
            f"what was trained: twinlora export {options.run} {flags}"
        )


def prove(weights: Merged, storage: Storage, trained: dict[str, str]) -> dict[str, Any]:
    """Compare each layer's stored weight with the digest that training recorded. Raises ParityError if one differs."""
    wrong = [
        layer
        for layer, digest in trained.items()
        if storage.store(weights.read_rows(f"{layer}.weight"), layer).digest() != digest
    ]
    if wrong:
        raise ParityError(
            f"{len(wrong)} of {len(trained)} layers are not, to the bit, what was trained; the first is {wrong[0]}\n"
            "sums of products differ in the last bit on another processor or with another number of threads: "
            "export where it was trained, with the same OMP_NUM_THREADS"
        )
    return {"layers_as_trained_to_the_bit": len(trained)}

"""Method hybrid: the precision of each layer of the base, chosen before it is loaded."""

from __future__ import annotations

import torch

from twinlora.adapters.precision import read_layers
from twinlora.config import TrainOptions, parse_size
from twinlora.errors import ConfigError
from twinlora.numerics.formats import Format, of_kind
from twinlora.plan import sensitivity
from twinlora.plan.precision import Choice, choose
from twinlora.plan.sensitivity import Sensitivity
from twinlora.train.inputs import Inputs
from twinlora.train.notes import Notes

__all__ = ["candidates", "choose_precision"]


def candidates(options: TrainOptions) -> list[Format]:
    """What a layer may be quantised to."""
    return [of_kind(kind, options.block_size, double_quant=options.double_quant) for kind in ("nf3", "nf4", "int8")]


def choose_precision(
    options: TrainOptions, inputs: Inputs, dtype: torch.dtype, device: torch.device, notes: Notes
) -> dict[str, str]:
    """A format's name for each linear layer, as the budget of `options` allows or their file says.

    Raises ConfigError for a budget that is too small or a file that cannot be read.
    """
    if options.layer_precision is not None:
        return read_layers(options.layer_precision)
    rows = sensitivity.calibration_rows(inputs.examples)
    notes.show(f"hybrid: how much each layer minds, from {len(rows)} training rows ({sum(map(len, rows)):,} tokens)")
    found = sensitivity.measure(
        inputs.source,
        rows,
        candidates(options),
        fingerprint=inputs.fingerprint,
        dtype=dtype,
        device=device,
        note=notes.add,
        trust_remote_code=options.trust_remote_code,
    )
    choice = _within_budget(options, found, dtype)
    notes.add(_described(choice, found))
    return choice.formats


def _within_budget(options: TrainOptions, found: Sensitivity, dtype: torch.dtype) -> Choice:
    sizes, total = found.sizes(dtype), sum(found.weights.values())
    least = sum(min(size.values()) for size in sizes.values())
    if options.bits is not None:
        budget, needed = int(options.bits / 8 * total), f"--bits {-(-8 * least * 1000 // total) / 1000:g}"
    else:
        budget = parse_size(options.memory or "0") - found.other_bytes
        needed = f"--memory {-(-(least + found.other_bytes) // 1000)}KB"
    if budget < least:
        raise ConfigError(
            f"hybrid: {max(budget, 0):,} bytes for the linear layers, and the smallest formats take {least:,} "
            f"(embeddings, head and norms {found.other_bytes:,} more); give {needed} or more, or a smaller model"
        )
    return choose(found.rises, sizes, budget)


def _described(choice: Choice, found: Sensitivity) -> str:
    counts = ", ".join(f"{count} layers {name}" for name, count in sorted(choice.counts.items()))
    gap = 0.0 if choice.loss == 0 else 1 - choice.bound / choice.loss
    return (
        f"hybrid: {8 * choice.stored_bytes / sum(found.weights.values()):.3f} bits per weight of the linear layers, "
        f"{counts}; expected divergence from the 16-bit base {choice.loss:.3g} nats a token, "
        f"at most {100 * gap:.2g} % above the least possible"
    )

"""A simulation that is arithmetic: what a plan does with it can be worked out by hand, in no time."""

from __future__ import annotations

from twinlora.plan.simulate import Cell, Simulated
from twinlora.plan.work import Counts, Kind

PARAMETERS = 7 * 10**9
LINEAR = 6 * 10**9  # weights that can be quantised
PER_TOKEN = 500_000  # bytes of activations
HOLES = 100_000  # bytes a token, in the pool of a CPU


def simulate(config: object, cell: Cell) -> Simulated:
    """A model of 7 B: activations by the token, a fifth of them with checkpointing."""
    tokens = sum(cell.lengths) if cell.packing else max(cell.lengths) * len(cell.lengths)
    trained = PARAMETERS if cell.method == "full" else 40_000_000
    quantised = cell.method in ("qlora", "int8")
    size, bits, scale = cell.dtype.itemsize, *((8, 32 / 64) if cell.method == "int8" else (4, 8 / 64 + 32 / (64 * 256)))
    by_cause = {
        "weights": LINEAR * bits // 8 + size * (PARAMETERS - LINEAR) if quantised else size * PARAMETERS,
        "quantisation constants": round(LINEAR * scale / 8) if quantised else 0,
        "adapter": 0 if cell.method == "full" else 4 * trained,
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "activations": tokens * PER_TOKEN // (5 if cell.checkpointing else 1),
        "loss head": 1000 * (cell.trained_tokens or 0),
        "workspace": 10**6,
    }
    flops = 6 * PARAMETERS * tokens * (4 if cell.checkpointing else 3) // 3
    name = "nf4 product" if quantised else "product"
    calls = {
        Kind(name, "mm", "bfloat16", flops, 10**6, 10**6): cell.micro_batches,
        Kind("optimiser", "_fused_adamw_", "float32", 12 * trained, 16 * trained, 12 * trained): 1,
    }
    stored = by_cause["weights"] + by_cause["quantisation constants"]
    update = by_cause | {"activations": 0, "loss head": 0, "gradients": 4 * trained}
    by_cause["gradients"] = waiting = size * trained if cell.method == "full" else 4 * trained
    lost = tokens * HOLES if cell.target == "cpu" else 0
    return Simulated(by_cause, update, Counts(calls), trained, PARAMETERS, stored, waiting, fragmentation=lost)

"""Hand-made ways: a model of so many weights, with activations and times as a test wants them."""

from __future__ import annotations

from twinlora.plan.quality import FORMATS, expected
from twinlora.plan.rows import Candidate, Way

GIB = 2**30
BITS = {"full": 16.0, "lora": 16.0, "int8": FORMATS[2].bits, "qlora": FORMATS[1].bits, "hybrid": FORMATS[1].bits}


def ways(
    parameters: float,
    *,
    activations: float = 4.0,  # GiB, without checkpointing
    checkpointed: float = 0.5,  # GiB
    seconds: float | None = 1000.0,  # of LoRA without checkpointing
    slower: dict[str, float] | None = None,  # by method
    lacking: tuple[str, ...] = (),
) -> list[Way]:
    slower = {"qlora": 1.05, "hybrid": 1.06, "int8": 1.03, "full": 1.3} | (slower or {})
    made = []
    for method, bits in BITS.items():
        candidates = []
        for checkpointing, held in ((False, activations), (True, checkpointed)):
            causes = {"weights": int(parameters * bits / 8), "activations": int(held * GIB)}
            causes["optimiser"] = int(parameters * 16) if method == "full" else int(0.2 * GIB)
            time = slower.get(method, 1.0) * (4 / 3 if checkpointing else 1.0)
            work = 6e3 * parameters * time
            candidates.append(Candidate(checkpointing, 2048, 4, causes, work, seconds and seconds * time))
        trainable = int(parameters) if method == "full" else int(parameters / 200)
        made.append(
            Way(
                method, bits, int(parameters), trainable, int(parameters), 4 * trainable, 2 * trainable, 10**6,
                expected(method, int(parameters)), tuple(candidates), "a later version" if method in lacking else None,
            )
        )  # fmt: skip
    return made

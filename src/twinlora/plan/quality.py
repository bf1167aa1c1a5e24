"""What quality to expect of a method, and who measured it. Nothing here is an opinion: each figure has a source.

A figure is the difference to LoRA over a 16-bit base, in points of the source's score (0 to 100).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

__all__ = ["FORMATS", "SAME_POINTS", "SMALL", "Expectation", "StoredAs", "expected", "rounding"]

SMALL = 10**9  # parameters; below, our own measurement of a small model counts, from here on the papers'
SAME_POINTS = 0.5  # of expected quality: no difference


@dataclass(frozen=True)
class Expectation:
    """Points more (or less, negative) than LoRA in 16 bit, None where nobody measured it; `low` to `high` if the source
    has an interval."""

    points: float | None
    source: str
    low: float | None = None
    high: float | None = None


_QLORA = "arXiv 2305.14314"
_T5 = f"{_QLORA}, table 3: T5 80M to 11B on Super-NaturalInstructions"
_LARGE = {
    "lora": Expectation(0.0, "the measure of the others"),
    "full": Expectation(0.0, f"{_T5}, 49.3 against 49.3 Rouge-L"),
    "int8": Expectation(-0.1, f"{_T5}, 49.2 against 49.3 Rouge-L"),
    "qlora": Expectation(0.1, f"{_QLORA}, table 4: LLaMA 7B to 65B, MMLU 53.1 against 53.0"),
    "hybrid": Expectation(None, "not measured at this mix; between its formats"),
}
_OWN = "benchmarks/results/banking77.json: SmolLM2-135M, a base that had been in 4 bits before"
_LITTLE = _LARGE | {
    # Of 1,500 test rows, mean of two seeds, with the paired 95 % interval.
    "qlora": Expectation(-2.5, f"{_OWN}, exact match 61.3 against 63.8", -4.1, -0.9),
    # A loss and no score, so no points.
    "hybrid": Expectation(
        None,
        "benchmarks/results/hybrid.json: SmolLM2-135M, held-out loss +0.004 (-0.000 to +0.008) at 4.0 bits, NF4 +0.006"
        "; no score measured",
    ),
}


def expected(method: str, parameters: int) -> Expectation:
    """For a model of so many parameters."""
    return (_LITTLE if parameters < SMALL else _LARGE)[method]


@dataclass(frozen=True)
class StoredAs:
    """A format of base weights: bits a weight, scales included, and the mean squared error of rounding normally
    distributed weights to it, that of NF4 being 1."""

    name: str
    bits: float
    rounding: float


# Blocks of 64; scales of the NormalFloats doubly quantised. The tests measure the errors.
FORMATS = (
    StoredAs("nf3", 3 + 8 / 64 + 32 / (64 * 256), 4.6),
    StoredAs("nf4", 4 + 8 / 64 + 32 / (64 * 256), 1.0),
    StoredAs("int8", 8 + 32 / 64, 0.0042),
    StoredAs("16bit", 16.0, 0.0),
)


def rounding(bits: float, dense: float = FORMATS[-1].bits) -> float:
    """Mean squared rounding error, NF4's being 1, of a base of `bits` a weight mixed from the two nearest formats, of
    which one that is not quantised has `dense`.

    Which layer gets which is not known here: choosing them by their sensitivity only lowers it.
    """
    formats = (*FORMATS[:-1], StoredAs("dense", dense, 0.0))
    bits = min(max(bits, formats[0].bits), dense)
    low, high = next(pair for pair in itertools.pairwise(formats) if bits <= pair[1].bits)
    share = (bits - low.bits) / (high.bits - low.bits)
    return (1 - share) * low.rounding + share * high.rounding

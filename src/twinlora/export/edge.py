"""What an artefact costs where it runs: bytes, memory, tokens per second; measured here, estimated for a phone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinlora.export.llama_cpp import LlamaCpp

__all__ = ["measure", "phones"]

_PROMPT, _NEW = 128, 64

# Peak memory bandwidth in GB/s of classes of phones, and the share of it that decoding reaches.
_PHONES = {"flagship (LPDDR5X, 77 GB/s)": 77e9, "mid-range (LPDDR4X, 34 GB/s)": 34e9}
_SHARE = 0.5


@dataclass(frozen=True)
class Cost:
    """Of one GGUF file in llama.cpp."""

    file_bytes: int
    peak_rss_bytes: int
    prompt_tokens_per_second: float
    new_tokens_per_second: float


def measure(path: Path, ids: list[int]) -> dict[str, Any]:
    """Run the file in a fresh process: 128 tokens read, 64 written, the best of three."""
    prompt = (ids * (_PROMPT // len(ids) + 1))[:_PROMPT]
    with LlamaCpp(path, context=512) as running:
        read, written = running.rates(prompt, _NEW)
        return asdict(Cost(path.stat().st_size, running.peak_rss_bytes, read, written))


def phones(file_bytes: int) -> dict[str, float]:
    """Tokens per second that decoding can reach: each token reads every weight once, at half of the peak bandwidth.

    Holds for models that fit the phone's memory; keys and values of a long context are not counted.
    """
    return {name: _SHARE * bandwidth / file_bytes for name, bandwidth in _PHONES.items()}

"""What is often said of LoRA and QLoRA, beside what a plan computes."""

from __future__ import annotations

from collections.abc import Mapping

from twinlora.plan.quality import FORMATS
from twinlora.plan.rows import Candidate, Row
from twinlora.plan.words import gib

__all__ = ["checked"]

_NF4 = FORMATS[1]


def checked(rows: Mapping[str, Row], *, model: str, rank: int) -> list[str]:
    """Sentences for the claims that `rows` (by method) have something to say about."""
    out = []
    lora, qlora = rows.get("lora"), rows.get("qlora")
    if lora is not None:
        share = 100 * lora.way.trainable / lora.way.parameters
        out.append(
            f"“LoRA trains 0.1 % of the parameters”: here, with rank {rank}, {_percent(share)} "
            f"({lora.way.trainable / 1e6:,.1f} M of {lora.way.parameters / 1e9:,.2f} B)"
        )
    if lora is not None and qlora is not None:
        before, after = (_stored(row) for row in (lora, qlora))
        saved, bits = 100 * (1 - after / before), lora.way.bits
        whole = 100 * (1 - _like(qlora, lora).peak / lora.setting.peak)
        out.append(
            f"“QLoRA needs 75 % less memory”: its base takes {saved:.1f} % less ({gib(after)} for {gib(before)}; "
            f"{_NF4.bits:.3f} bits for {bits:.0f} are {100 * (1 - _NF4.bits / bits):.1f} %, and embeddings and head "
            f"stay), a whole step with equal settings {whole:.1f} % less"
        )
    if model.startswith("gpt3") and lora is not None and qlora is not None:
        out.append(
            f"“LoRA fits GPT-3 into 24 GB”: wrong. Its weights alone take {_stored(lora) / 1e9:,.0f} GB in 16 bit, a "
            f"step {lora.peak / 1e9:,.0f} GB, with QLoRA {_like(qlora, lora).peak / 1e9:,.0f} GB; the paper needed "
            "350 GB (arXiv 2106.09685, section 4.2)"
        )
    return out


def _like(row: Row, other: Row) -> Candidate:
    """The setting of `row`'s way that is `other`'s."""
    wanted = other.setting.checkpointing, other.setting.micro_batch_tokens
    same = (c for c in row.way.candidates if (c.checkpointing, c.micro_batch_tokens) == wanted)
    return next(same, row.setting)


def _stored(row: Row) -> int:
    return row.by_cause["weights"] + row.by_cause.get("quantisation constants", 0)


def _percent(share: float) -> str:
    return f"{share:.3f} %" if share < 0.1 else f"{share:.2f} %"

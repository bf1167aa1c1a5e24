"""Which weights an adapter of a quantised base is folded into: both merged models are built, and measured on held-out
rows.

The one with the lower loss wins where the paired interval of the difference leaves 0 out; else the one that is nearer
to the trained model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinlora.evaluate.metrics import RowLoss, row_losses
from twinlora.evaluate.stats import paired_interval
from twinlora.export.merged import save_16bit
from twinlora.export.probes import model_answers
from twinlora.export.subject import Subject
from twinlora.model.forward import has_plain_head, packing_refusal
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import Precision
from twinlora.output import scratch
from twinlora.reporter import Reporter

__all__ = ["Candidate", "Choice", "choose_base", "weight_type"]

_NAMES = ("16bit", "dequantised")


@dataclass(frozen=True)
class Candidate:
    """A merged model beside the trained one: mean divergence of the next token in nats, held-out loss per token."""

    kl: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """The base, and the evidence for it; `difference`: loss of 16bit minus dequantised, a row, and its interval."""

    base: str
    trained_loss: float
    candidates: dict[str, Candidate]
    difference: tuple[float, float, float]
    reason: str

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def choose_base(subject: Subject, reporter: Reporter) -> tuple[Precision | None, Choice | None]:
    """The format that the base goes through before it is merged, None for its own 16 bits. Measured if both can be."""
    wanted = subject.options.base
    exact = subject.deployed is None and not subject.checkpoint.has_4bit
    if subject.trained_on is None or (wanted == "16bit" and exact):
        if wanted == "dequantised":
            reporter.note("base dequantised: this adapter was trained on 16 bit; they are taken as they are")
        return None, None
    if subject.checkpoint.has_4bit:
        reporter.note(f"base {subject.source.given} has no weights but its 4-bit ones: folded into these")
        return subject.trained_on, None
    if wanted == "dequantised" or subject.deployed is not None:
        return subject.trained_on, None
    choice = _measure(subject, reporter)
    reporter.note(f"folded into the {choice.base} weights: {choice.reason}")
    return (subject.trained_on if choice.base == "dequantised" else None), choice


def _measure(subject: Subject, reporter: Reporter) -> Choice:
    formats: dict[str, Precision | None] = {"16bit": None, "dequantised": subject.trained_on}
    model = subject.model(subject.trained_on)
    reference, trained = model_answers(model, subject.probes), _losses(subject, model)
    del model
    found: dict[str, Candidate] = {}
    losses: dict[str, list[RowLoss]] = {}
    for done, (name, fmt) in enumerate(formats.items()):
        reporter.progress("merging candidates", done, len(formats), name)
        model = _candidate(subject, fmt)
        losses[name] = _losses(subject, model)
        found[name] = Candidate(_kl(reference, model_answers(model, subject.probes)), _mean(losses[name]))
        del model
    reporter.progress("merging candidates", len(formats), len(formats))
    by_row = {name: [row.total / row.tokens for row in rows] for name, rows in losses.items()}
    difference = paired_interval(by_row["16bit"], by_row["dequantised"])
    base, reason = _decide(found, difference)
    return Choice(base, _mean(trained), found, difference, reason)


def _decide(found: dict[str, Candidate], difference: tuple[float, float, float]) -> tuple[str, str]:
    mean, low, high = difference
    if low > 0 or high < 0:
        base = "16bit" if mean < 0 else "dequantised"
        return base, f"its held-out loss is lower by {abs(mean):.4f} (95 % interval of the difference without 0)"
    base = min(_NAMES, key=lambda name: found[name].kl)
    return base, "held-out losses do not differ (95 % interval includes 0), and it is nearer to the trained model"


def _candidate(subject: Subject, fmt: Precision | None) -> PreTrainedModel:
    """The merged model as it would be shipped, loaded from a directory that is gone afterwards."""
    options = subject.options
    with scratch(options.output) as directory:
        save_16bit(subject.merged(fmt), directory, subject.tokenizer, weight_type(subject))
        trust = options.trust_remote_code
        return load_model(resolve(str(directory)), dtype=getattr(torch, options.dtype), trust_remote_code=trust)


def weight_type(subject: Subject) -> torch.dtype:
    """The type that was asked for; else the base's own if it has 16 bits, else bfloat16."""
    if subject.options.weights != "auto":
        asked: torch.dtype = getattr(torch, subject.options.weights)
        return asked
    dtype = subject.checkpoint.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def _losses(subject: Subject, model: PreTrainedModel) -> list[RowLoss]:
    return row_losses(
        model,
        subject.examples,
        micro_batch_tokens=2048,
        packed=packing_refusal(model, len(subject.tokenizer)) is None,
        plain_head=has_plain_head(model),
    )


def _mean(rows: list[RowLoss]) -> float:
    return sum(row.total for row in rows) / sum(row.tokens for row in rows)


def _kl(reference: list[Tensor], found: list[Tensor]) -> float:
    """Mean divergence of the second from the first, in nats, over the whole vocabulary."""
    sums = [(p.double().exp() * (p.double() - q.double())).sum() for p, q in zip(reference, found, strict=True)]
    return float(torch.stack(sums).mean())

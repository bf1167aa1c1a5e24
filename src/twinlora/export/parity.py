"""The gate: an artefact must answer as the trained model does, in the program that will run it.

Limits are on figures over the trained tokens of held-out rows:

- `kl`: mean Kullback-Leibler divergence of the next token's distribution, trained model to artefact, in nats. A
  runtime lists its likeliest tokens; the rest counts as one outcome, which can only make the divergence smaller.
- `log_prob`: mean absolute difference of log p of the row's own token, in nats.
- `top1`: share of positions where the artefact's likeliest token is the trained model's, or within 0.05 nats of it
  (a tie that rounding decides is no difference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from twinlora.data.formats import Row
from twinlora.data.template import encode_prompt, render_prompt
from twinlora.export.probes import Answer, Probe

__all__ = ["LIMITS", "Limits", "Parity", "Runtime", "compare"]

_TIE = 0.05  # nats


@dataclass(frozen=True)
class Limits:
    """What an artefact may differ by, and why it does at all."""

    kl: float
    log_prob: float
    top1: float
    reason: str


# By what the artefact's weights are. On SmolLM2-135M with an adapter the means were (KL, nats): the same arithmetic 0,
# F16 3e-5, BF16 3e-4, Q6_K 1e-3, Q8_0 3e-3, Q5_0 0.01, IQ4_NL 0.13, NF4 0.19, Q4_0 0.21; larger models lose less. The
# adapter's q and k rows in the wrong order: 0.01 after 20 steps of training.
LIMITS = {
    "float32": Limits(1e-4, 0.005, 0.99, "the same arithmetic in another program"),
    "f16": Limits(0.001, 0.02, 0.98, "float16 weights and activations: 11 bits of precision"),
    "bf16": Limits(
        0.005,
        0.05,
        0.97,
        "bfloat16 weights: 8 bits of precision, in which small updates vanish (--weights float16, or "
        "--to gguf --quant f16, keeps them)",
    ),
    "q8_0": Limits(0.02, 0.1, 0.95, "8-bit weights and activations"),
    "q6_k": Limits(0.02, 0.1, 0.95, "6-bit weights, 8-bit activations"),
    **dict.fromkeys(
        ("q5_0", "q5_1", "q5_k", "q5_k_s", "q5_k_m"), Limits(0.1, 0.3, 0.85, "5-bit weights, 8-bit activations")
    ),
    "4bit": Limits(0.4, 0.6, 0.7, "4-bit weights: the error that every 4-bit model has"),
}


class Runtime(Protocol):
    """A program with an artefact loaded."""

    name: str

    def answers(self, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
        """The distribution at every position of every probe, in order."""

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """What it gives the model for a row: text and tokens."""

    def stops(self, token: int, ids: list[int]) -> bool:
        """Whether an answer ends when the model says `token` after the prompt `ids`."""


@dataclass(frozen=True)
class Parity:
    """The figures of a comparison, and every reason to refuse the artefact."""

    runtime: str
    rows: int
    positions: int
    kl_mean: float
    kl_max: float
    log_prob_error_mean: float
    log_prob_error_max: float
    top1_agreement: float
    template: str
    stop_tokens: str
    limits: Limits
    problems: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is above its limit."""
        return not self.problems


def compare(
    trained: Sequence[Tensor],
    runtime: Runtime,
    probes: Sequence[Probe],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    limits: Limits,
) -> Parity:
    """Ask `runtime` what the trained model was asked; `trained` are its log p [V] at the probes' positions."""
    answers = runtime.answers(probes, tokenizer)
    tokens = [probe.ids[position] for probe in probes for position in probe.positions]
    kls, errors, agreed = [], [], []
    for reference, answer, token in zip(trained, answers, tokens, strict=True):
        kls.append(_divergence(reference.double(), answer))
        errors.append(_error(reference, answer, token))
        agreed.append(bool(reference[answer.ids[0]] >= reference.max() - _TIE))
    template, stops = _template(runtime, rows, tokenizer), _stops(runtime, stop, probes[0], tokenizer)
    figures = {
        "kl": _mean(kls),
        "log_prob": _mean(errors),
        "top1": _mean([float(a) for a in agreed]),
    }
    problems = [line for line in (template, stops) if line]
    above = [f"{k} {figures[k]:.4g} (limit {getattr(limits, k):g})" for k in ("kl", "log_prob")
             if not figures[k] <= getattr(limits, k)]  # fmt: skip
    if figures["top1"] < limits.top1:
        above.append(f"top1 {figures['top1']:.1%} (limit {limits.top1:.0%})")
    if above:
        problems.append(f"{', '.join(above)}; {_first(trained, answers, probes, kls, limits, tokenizer)}")
    return Parity(
        runtime=runtime.name, rows=len(probes), positions=len(tokens), kl_mean=figures["kl"], kl_max=max(kls),
        log_prob_error_mean=figures["log_prob"], log_prob_error_max=max(errors), top1_agreement=figures["top1"],
        template=template or "same", stop_tokens=stops or "same", limits=limits, problems=problems,
    )  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _divergence(reference: Tensor, answer: Answer) -> float:
    """Σ p log(p / q) over the listed tokens and one outcome for all others, in nats."""
    p, q = reference[answer.ids].exp(), answer.log_probs.exp()
    listed = (p * (reference[answer.ids] - answer.log_probs)).sum()
    rest_p, rest_q = (1 - p.sum()).clamp(min=0), (1 - q.sum()).clamp(min=1e-9)
    if len(answer.ids) < len(reference) and rest_p > 1e-9:
        listed += rest_p * (rest_p / rest_q).log()
    return max(0.0, listed.item())


def _log_prob(answer: Answer, token: int) -> float:
    """log p of a token; of one that is not listed, the smallest that is."""
    found = (answer.ids == token).nonzero()
    return float(answer.log_probs[found[0, 0]] if len(found) else answer.log_probs.min())


def _error(reference: Tensor, answer: Answer, token: int) -> float:
    """|Δ log p| of a token; where it is not listed, what it is at least."""
    ours, theirs = reference[token].item(), _log_prob(answer, token)
    listed = bool((answer.ids == token).any())
    return abs(ours - theirs) if listed else max(0.0, ours - theirs)


def _template(runtime: Runtime, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first prompt that the runtime writes or cuts into tokens otherwise."""
    for row in rows:
        expected, ids = render_prompt(tokenizer, row), encode_prompt(tokenizer, row)
        text, found = runtime.prompt(row)
        if found == ids:
            continue
        bare = expected.removeprefix(tokenizer.bos_token or "")
        if text not in (expected, bare):
            at = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), 0)
            return (
                f"template: {row.where} is written otherwise from character {at}: {text[at : at + 40]!r}, "
                f"expected {expected[at : at + 40]!r}"
            )
        at = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids)))
        said, wanted = (tokenizer.convert_ids_to_tokens(t[at : at + 3]) for t in (found, ids))
        return f"tokens: {row.where} is cut otherwise from token {at}: {said}, expected {wanted}"
    return None


def _stops(runtime: Runtime, stop: set[int], probe: Probe, tokenizer: PreTrainedTokenizerBase) -> str | None:
    ids = probe.ids[: probe.positions[0]]
    ignored = [tokenizer.convert_ids_to_tokens(token) for token in sorted(stop) if not runtime.stops(token, ids)]
    return f"stop tokens: answers do not end at {', '.join(map(str, ignored))}" if ignored else None


def _first(
    trained: Sequence[Tensor],
    answers: Sequence[Answer],
    probes: Sequence[Probe],
    kls: list[float],
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Where the two part for the first time."""
    number = next((i for i, kl in enumerate(kls) if kl > limits.kl), 0)
    places = [(probe, position) for probe in probes for position in probe.positions]
    (probe, position), reference, answer = places[number], trained[number], answers[number]
    ours, theirs = int(torch.argmax(reference)), int(answer.ids[0])
    said = [
        f"{tokenizer.decode([token])!r} ({reference[token]:.3f} trained, {_log_prob(answer, token):.3f} artefact)"
        for token in dict.fromkeys((probe.ids[position], ours, theirs))
    ]
    return f"first at {probe.where}, token {position}, KL {kls[number]:.4g}: log p of {', of '.join(said)}"

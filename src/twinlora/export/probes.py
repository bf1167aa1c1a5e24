"""What the trained model and an artefact are both asked, and what each answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinlora.data.template import Example
from twinlora.errors import DataError

__all__ = ["Answer", "Probe", "model_answers", "probes_of"]

_POSITIONS = 16  # trained tokens of a row that are compared


@dataclass(frozen=True)
class Probe:
    """Token ids of a row, and the positions whose token is to be predicted from those before."""

    ids: list[int]
    positions: list[int]
    where: str


@dataclass(frozen=True)
class Answer:
    """The likeliest next tokens, best first, and their log-probabilities [K], float64; K may be all."""

    ids: Tensor
    log_probs: Tensor


def probes_of(examples: Sequence[Example]) -> list[Probe]:
    """The first trained tokens of each example. Raises DataError if there are none."""
    probes = []
    for example in examples:
        positions = [i for i, trained in enumerate(example.trained) if trained and i > 0][:_POSITIONS]
        if positions:
            probes.append(Probe(example.ids, positions, example.where))
    if not probes:
        raise DataError("no row has a token to predict: give other rows with --data")
    return probes


@torch.no_grad()
def model_answers(model: torch.nn.Module, probes: Sequence[Probe]) -> list[Tensor]:
    """log p over the whole vocabulary at each position, float32 [V], each row alone and without a cache."""
    answers: list[Tensor] = []
    for probe in probes:
        ids = torch.tensor([probe.ids[: probe.positions[-1]]])
        rows = torch.tensor(probe.positions) - 1
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, rows]
        answers += list(torch.log_softmax(logits.float(), dim=-1))
    return answers

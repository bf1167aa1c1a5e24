"""What a model does on held-out rows: the loss of the trained tokens, and the answers, which scores.py judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora.data.formats import Row
from twinlora.data.packing import make_batch
from twinlora.data.sources import listed
from twinlora.data.template import Example, answer_opening, encode_prompt
from twinlora.errors import DataError
from twinlora.model.forward import evaluating, loss_sum, token_log_probs
from twinlora.model.generate import end_tokens, generate
from twinlora.reporter import Reporter

__all__ = ["Prediction", "RowLoss", "mean_loss", "predict", "require_answers", "row_losses"]


@dataclass(frozen=True)
class Prediction:
    """What a model said to a row, and what it should have said."""

    prompt: str
    expected: str
    output: str


@dataclass(frozen=True)
class RowLoss:
    """Sum of -log p over the tokens of a row that carry loss, in nats, and how many they are."""

    total: float
    tokens: int


def require_answers(rows: Sequence[Row]) -> None:
    """Raises DataError if rows have no answer in words that a generated one could equal."""
    without = [row.where for row in rows if not row.answer.strip()]
    if without:
        raise DataError(
            f"{listed(without, 'without an answer in words (a text, a tool call)')}\n"
            "no generated answer can equal it: measure --metric loss, or leave them out"
        )


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    micro_batch_tokens: int,
    packed: bool,
    plain_head: bool,
) -> float:
    """Mean of -log p over all tokens that carry loss, in nats."""
    batch = make_batch(_by_length(examples), micro_batch_tokens, packed=packed, device=_device_of(model))
    with evaluating(model):
        total = sum(loss_sum(model, micro, plain_head=plain_head).item() for micro in batch.micro_batches)
    return total / batch.trained_tokens


@torch.no_grad()
def row_losses(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    micro_batch_tokens: int,
    packed: bool,
    plain_head: bool,
) -> list[RowLoss]:
    """The loss of each row, in the order in which rows first appear; examples of one `where` are one row."""
    by_length = _by_length(examples)
    batch = make_batch(by_length, micro_batch_tokens, packed=packed, device=_device_of(model))
    with evaluating(model):
        tokens = torch.cat([token_log_probs(model, m, plain_head=plain_head)[0] for m in batch.micro_batches])
    rows = {example.where: RowLoss(0.0, 0) for example in examples}
    pieces = tokens.cpu().double().split([example.trained_tokens for example in by_length])
    for example, piece in zip(by_length, pieces, strict=True):
        row = rows[example.where]
        rows[example.where] = RowLoss(row.total - piece.sum().item(), row.tokens + example.trained_tokens)
    return list(rows.values())


def _by_length(examples: Sequence[Example]) -> list[Example]:
    """Rows of like length go together, so that little is filled."""
    return sorted(examples, key=lambda example: len(example.ids))


def _device_of(model: PreTrainedModel) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_new_tokens: int,
    reporter: Reporter | None = None,
    stage: str = "answering",
) -> list[Prediction]:
    """Greedy answers to every row, in the order of `rows`, without what the template opens them with.

    Long prompts run first, so that memory peaks at once.
    """
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    stop = end_tokens(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    outputs = [""] * len(rows)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        with evaluating(model):
            answers = generate(
                model,
                [prompts[i] for i in chosen],
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
        for i, answer in zip(chosen, answers, strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            outputs[i] = text.removeprefix(answer_opening(tokenizer, rows[i]))
        if reporter is not None:
            reporter.progress(stage, begin + len(chosen), len(rows))
    return [Prediction(row.question, row.answer, output) for row, output in zip(rows, outputs, strict=True)]

"""Artefacts in their own Python runtimes: stock transformers, with bitsandbytes or peft where they need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from twinlora.data.formats import Row
from twinlora.data.template import encode_prompt, render_prompt
from twinlora.export.probes import Answer, Probe, model_answers

__all__ = ["Stock"]


class Stock:
    """A transformers or peft model and the tokenizer that was written beside it.

    `stop`: tokens that end an answer; default: those of the generation settings, which `generate` goes by.
    """

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase, stop: set[int] | None = None) -> None:
        self.name, self._model, self._tokenizer = name, model.eval(), tokenizer
        told = model.generation_config.eos_token_id
        self._stop = stop if stop is not None else set(told if isinstance(told, list) else [told])

    def answers(self, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
        """The whole distribution at every position of every probe."""
        answers = []
        for log_probs in model_answers(self._model, probes):
            values, ids = torch.sort(log_probs.double(), descending=True)
            answers.append(Answer(ids, values))
        return answers

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """What its own tokenizer and template make of a row."""
        return render_prompt(self._tokenizer, row), encode_prompt(self._tokenizer, row)

    def stops(self, token: int, ids: list[int]) -> bool:
        """Whether generation ends at `token`."""
        return token in self._stop

"""What a run reads before any weight is loaded: everything that can be wrong is found here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from twinlora.config import TrainOptions
from twinlora.data.formats import Row, file_digest, read_rows
from twinlora.data.packing import steps_per_epoch
from twinlora.data.template import Example, encode_rows
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import Source, load_tokenizer, resolve

__all__ = ["Inputs", "read_inputs"]


@dataclass
class Inputs:
    """What is known before any weight is loaded."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    examples: list[Example]
    eval_examples: list[Example]
    data_sha256: dict[str, str]  # of each file of training rows, by name
    eval_sha256: dict[str, str]
    fingerprint: str

    @property
    def pad_id(self) -> int:
        """Token that fills padded batches."""
        return self.tokenizer.pad_token_id or 0

    def steps(self, options: TrainOptions) -> int:
        """Optimiser steps of the whole run."""
        steps = options.epochs * steps_per_epoch(len(self.examples), options.batch_size)
        return min(steps, options.max_steps or steps)


def read_inputs(options: TrainOptions, note: Callable[[str], None] | None = None) -> Inputs:
    """Resolve the model, load its tokenizer, read and encode all rows. Raises InputError; `note` gets lines to show."""
    source = resolve(options.model)
    rows = read_rows(options.data)
    eval_rows = read_rows(options.eval) if options.eval else []
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    return Inputs(
        source=source,
        tokenizer=tokenizer,
        rows=rows,
        examples=encode_rows(tokenizer, rows, options.max_length),
        eval_examples=encode_rows(tokenizer, eval_rows, options.max_length),
        data_sha256={options.data.name: file_digest(options.data)},
        eval_sha256={options.eval.name: file_digest(options.eval)} if options.eval else {},
        fingerprint=fingerprint(source, note),
    )

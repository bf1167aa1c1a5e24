"""What a run reads before any weight is loaded: everything that can be wrong is found here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from twinlora.config import TrainOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row
from twinlora.data.packing import epoch_order, epoch_size, require_seen, steps_per_epoch
from twinlora.data.template import Example
from twinlora.errors import ConfigError
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import Source, load_tokenizer, resolve
from twinlora.train.notes import Notes

__all__ = ["Inputs", "read_inputs"]


@dataclass
class Inputs:
    """What is known before any weight is loaded."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    data: sources.Data
    held_out: sources.Data
    examples: list[Example]
    eval_examples: list[Example]
    fingerprint: str
    _order: tuple[int, list[int]] = field(default=(-1, []))  # the last epoch's

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every source, by name."""
        return sources.Data(self.data.sources + self.held_out.sources).digests

    @property
    def rows(self) -> list[Row]:
        """The training rows."""
        return self.data.rows

    @cached_property
    def weights(self) -> list[float]:
        """How often each example is seen in an epoch."""
        return [example.weight for example in self.examples]

    @cached_property
    def epoch_size(self) -> int:
        """Examples that an epoch shows."""
        return epoch_size(self.weights)

    def steps_per_epoch(self, options: TrainOptions) -> int:
        """Optimiser steps of an epoch."""
        return steps_per_epoch(self.epoch_size, options.batch_size)

    def steps(self, options: TrainOptions) -> int:
        """Optimiser steps of the whole run."""
        steps = options.epochs * self.steps_per_epoch(options)
        return min(steps, options.max_steps or steps)

    def step_examples(self, step: int, options: TrainOptions) -> list[Example]:
        """The examples of optimiser step `step` (from 0); depends on the seed alone."""
        epoch, within = divmod(step, self.steps_per_epoch(options))
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(self.weights, epoch, options.seed, shuffle=options.shuffle)
        begin = within * options.batch_size
        return [self.examples[i] for i in self._order[1][begin : begin + options.batch_size]]


def read_inputs(options: TrainOptions, notes: Notes) -> Inputs:
    """Resolve the model, load its tokenizer, read and encode all rows. Raises InputError."""
    _refuse_streams(options)
    source = resolve(options.model)
    data = sources.read(options.data, columns=options.columns, note=notes.detail)
    held_out = sources.read(options.eval, columns=options.columns, note=notes.detail)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)

    def encode(rows: list[Row]) -> list[Example]:
        o = options
        return encode_rows(
            tokenizer, rows, o.max_length, overlong=o.overlong, allow_untrained=o.allow_untrained, note=notes.add
        )

    examples = encode(data.rows)
    require_seen([example.weight for example in examples])
    return Inputs(
        source=source,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        examples=examples,
        eval_examples=encode(held_out.rows) if options.eval else [],
        fingerprint=fingerprint(source, notes.show),
    )


def _refuse_streams(options: TrainOptions) -> None:
    streams = [source for source in options.data if sources.is_stream(sources.split_weight(source)[0])]
    if options.resume and streams:
        raise ConfigError(
            f"resume: {', '.join(streams)} is a stream, and what it gave the first time cannot be read again; "
            "write the rows to a file, and train from that"
        )

"""What a run would push through a model: its steps and micro-batches, as the trainer makes them.

From tokenised rows, or, without data, from rows of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from twinlora.config import PlanOptions, TrainOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.packing import epoch_order, epoch_size, filled, require_seen, split, steps_per_epoch
from twinlora.data.template import Example
from twinlora.model.load import load_tokenizer
from twinlora.plan.model import Planned

__all__ = ["Micro", "Workload", "assumed", "tokenised"]


@dataclass(frozen=True)
class Micro:
    """A micro-batch: the lengths of its rows, how many of its tokens carry loss, and of how many its step has."""

    lengths: tuple[int, ...]
    trained_tokens: int
    micro_batches: int

    def size(self, *, packed: bool) -> int:
        """Tokens that go through the model, padding included."""
        return sum(self.lengths) if packed else max(self.lengths) * len(self.lengths)


@dataclass(frozen=True)
class Workload:
    """The examples of a run and how they become steps."""

    examples: Sequence[Example]
    options: PlanOptions | TrainOptions
    from_data: bool
    packed: bool = True
    _cut: dict[int, list[list[list[Example]]]] = field(default_factory=dict, repr=False, compare=False)
    _sized: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)
    _largest: dict[int, Micro] = field(default_factory=dict, repr=False, compare=False)

    def padded(self) -> Workload:
        """The same examples for a model that does not train on packed rows."""
        return Workload(self.examples, self.options, self.from_data, packed=False)

    @cached_property
    def weights(self) -> list[float]:
        """How often each example is seen in an epoch."""
        return [example.weight for example in self.examples]

    @property
    def rows(self) -> int:
        """Rows that the run shows, repeated ones counted again."""
        return sum(map(len, self.batches))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(example.ids) for example in self.examples)

    @cached_property
    def batches(self) -> list[list[Example]]:
        """The examples of every step of the run, in order."""
        out: list[list[Example]] = []
        size = self.options.batch_size
        steps = self.options.epochs * steps_per_epoch(epoch_size(self.weights), size)
        steps = min(steps, self.options.max_steps or steps)
        for epoch in range(self.options.epochs):
            if len(out) >= steps:
                break
            order = epoch_order(self.weights, epoch, self.options.seed, shuffle=self.options.shuffle)
            out += [[self.examples[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
        return out[:steps]

    @property
    def tokens(self) -> int:
        """Real tokens of the run."""
        return sum(len(example.ids) for batch in self.batches for example in batch)

    @property
    def largest_step(self) -> int:
        """Tokens of the largest step, as one micro-batch."""
        return max(self._size(batch) for batch in self.batches)

    def _size(self, part: Sequence[Example]) -> int:
        lengths = [len(example.ids) for example in part]
        return sum(lengths) if self.packed else max(lengths) * len(lengths)

    def largest(self, limit: int) -> Micro:
        """The largest micro-batch of all, with at most `limit` tokens (or one row): it decides the peak.

        Of equally large ones the one whose loss has the most rows.
        """
        if limit not in self._largest:
            steps = self._parts(limit)
            sizes = self._sizes(limit)
            most, each = max(sizes), [part for parts in steps for part in parts]
            part = max((part for size, part in zip(sizes, each, strict=True) if size == most), key=_trained)
            self._largest[limit] = _micro(part, max(map(len, steps)))
        return self._largest[limit]

    def micro_batches(self, limit: int) -> tuple[int, float]:
        """How many micro-batches of at most `limit` tokens the run has, and the tokens of their mean."""
        sizes = self._sizes(limit)
        return len(sizes), sum(sizes) / len(sizes)

    def sizes(self, limit: int) -> int:
        """How many numbers of rows the products of the run's micro-batches of at most `limit` tokens have on a CPU."""
        return len({filled(size) if self.packed else size for size in self._sizes(limit)})

    def _sizes(self, limit: int) -> list[int]:
        """Tokens of each micro-batch of at most `limit`."""
        if limit not in self._sized:
            self._sized[limit] = [self._size(part) for parts in self._parts(limit) for part in parts]
        return self._sized[limit]

    def _parts(self, limit: int) -> list[list[list[Example]]]:
        if limit not in self._cut:
            self._cut[limit] = [list(split(batch, limit, packed=self.packed)) for batch in self.batches]
        return self._cut[limit]


def _trained(part: Sequence[Example]) -> int:
    return sum(example.trained_tokens for example in part)


def _micro(part: Sequence[Example], count: int) -> Micro:
    return Micro(tuple(len(example.ids) for example in part), _trained(part), count)


def assumed(options: PlanOptions) -> Workload:
    """Without data: `options.rows` rows of `options.length` tokens that all carry loss."""
    example = Example([0] * options.length, [True] * options.length, "assumed")
    return Workload([example] * options.rows, options, from_data=False, packed=options.packing == "auto")


def tokenised(options: PlanOptions, planned: Planned, note: Callable[[str], None]) -> Workload:
    """The rows of `options.data` as training would see them. Raises InputError."""
    data = sources.read(options.data, columns=options.columns, note=note)
    tokenizer = load_tokenizer(planned.tokenizer_source(), trust_remote_code=options.trust_remote_code)
    examples = encode_rows(
        tokenizer, data.rows, options.max_length, overlong=options.overlong, allow_untrained=options.allow_untrained,
        note=note,
    )  # fmt: skip
    require_seen([example.weight for example in examples])
    return Workload(examples, options, from_data=True, packed=options.packing == "auto")

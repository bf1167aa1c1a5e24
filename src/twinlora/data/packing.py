"""Examples to batches. A `Batch` is one optimiser step: micro-batches that go through the model one after another.

Everything the step must know about sizes is a host integer (lengths, rows that carry loss), so that the step never
reads a tensor's value. A packed micro-batch is one row of tokens with a `Layout`; a padded one is a rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinlora.data.template import Example
from twinlora.errors import DataError
from twinlora.model.attention import Layout
from twinlora.numerics.target import kind_of

__all__ = [
    "Batch", "MicroBatch", "epoch_order", "epoch_size", "filled", "make_batch", "make_micro_batch", "require_seen",
    "split", "steps_per_epoch",
]  # fmt: skip


# On a CPU a packed row is filled up to a multiple of this, by a sequence of its own: the library that multiplies keeps
# a compiled product for every number of rows it has met, about 20 MB a step where each step has another number.
_ROUND = 64
_FILLER = 0  # nothing sees it; a tokenizer's own token for padding may be without an embedding


def filled(tokens: int) -> int:
    """Rows that go through the products of a CPU for so many packed tokens."""
    return -(-tokens // _ROUND) * _ROUND


@dataclass(frozen=True)
class MicroBatch:
    """Input and targets of one pass. `loss_rows` index the flat [batch · length] positions that predict `labels`."""

    input_ids: Tensor  # int64 [1, T] packed, [B, L] padded
    position_ids: Tensor  # like input_ids
    attention_mask: Tensor | None  # int64 [B, L] padded, None packed
    layout: Layout | None  # packed only
    loss_rows: Tensor  # int64 [R]
    labels: Tensor  # int64 [R]
    trained_tokens: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """One optimiser step, or the part of it that one of several processes works on.

    `trained_tokens` counts the tokens that carry loss in the whole step, so that the parts' gradients add up.
    """

    micro_batches: list[MicroBatch]
    where: list[str]
    trained_tokens: int

    @property
    def tokens(self) -> int:
        """Real tokens, fill not counted."""
        return sum(micro.tokens for micro in self.micro_batches)


def epoch_order(weights: Sequence[float], epoch: int, seed: int, *, shuffle: bool) -> list[int]:
    """Which examples an epoch shows, in order, from how often each is to be seen in one.

    A weight of 2.5 shows an example twice, and a random half of its kind once more. All depends on seed and epoch
    alone, so that a resumed run repeats it.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    seen: list[int] = []
    for weight, members in _by_weight(weights).items():
        seen += members * int(weight)
        if some := _some(len(members), weight):
            seen += [members[i] for i in torch.randperm(len(members), generator=generator)[:some].tolist()]
    if not shuffle:
        return sorted(seen)
    return [seen[i] for i in torch.randperm(len(seen), generator=generator).tolist()]


def epoch_size(weights: Sequence[float]) -> int:
    """Examples that an epoch shows: the same number in each."""
    kinds = _by_weight(weights).items()
    return sum(len(members) * int(weight) + _some(len(members), weight) for weight, members in kinds)


def require_seen(weights: Sequence[float]) -> None:
    """Raise DataError for a weight whose fraction of its examples rounds to none."""
    for weight, members in _by_weight(weights).items():
        if not int(weight) and not _some(len(members), weight):
            raise DataError(
                f"data: of {len(members)} rows with weight {weight:g} an epoch would show none; give at least "
                f"@{math.ceil(1000 * 0.51 / len(members)) / 1000:g}, or leave them out"
            )


def _by_weight(weights: Sequence[float]) -> dict[float, list[int]]:
    members: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        members.setdefault(weight, []).append(index)
    return members


def _some(count: int, weight: float) -> int:
    """Of `count` examples, those that the fraction of `weight` shows once more."""
    return round(weight % 1 * count)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimiser steps of one epoch; the last batch may be short."""
    return -(-count // batch_size)


def make_batch(
    examples: Sequence[Example],
    micro_batch_tokens: int,
    *,
    packed: bool,
    device: torch.device | str = "cpu",
) -> Batch:
    """Split `examples` into micro-batches of at most `micro_batch_tokens` (one longer example makes its own)."""
    parts = split(examples, micro_batch_tokens, packed=packed)
    micro = [make_micro_batch(part, packed=packed, device=device) for part in parts]
    return Batch(micro, [example.where for example in examples], sum(part.trained_tokens for part in micro))


def split(examples: Sequence[Example], limit: int, *, packed: bool) -> Iterator[list[Example]]:
    """The micro-batches that `make_batch` makes of `examples`, as lists of examples."""
    part: list[Example] = []
    total = longest = 0  # tokens of the part's rows
    for example in examples:
        length = len(example.ids)
        if part and (total + length if packed else max(longest, length) * (len(part) + 1)) > limit:
            yield part
            part, total, longest = [], 0, 0
        part.append(example)
        total, longest = total + length, max(longest, length)
    if part:
        yield part


def make_micro_batch(examples: Sequence[Example], *, packed: bool, device: torch.device | str = "cpu") -> MicroBatch:
    """Tensors of one pass over `examples`, concatenated or padded on the right."""
    lengths = [len(example.ids) for example in examples]
    longest = max(lengths)
    starts = [sum(lengths[:i]) if packed else i * longest for i in range(len(examples))]
    loss_rows, labels = [], []
    for start, example in zip(starts, examples, strict=True):
        # Position t predicts token t + 1 of the same example; the first token is never predicted.
        for t in range(1, len(example.ids)):
            if example.trained[t]:
                loss_rows.append(start + t - 1)
                labels.append(example.ids[t])
    if packed:
        fill = filled(sum(lengths)) - sum(lengths) if kind_of(device) == "cpu" else 0
        layout = Layout([*lengths, fill] if fill else lengths, device)
        ids = torch.tensor([[token for example in examples for token in example.ids] + [_FILLER] * fill])
        mask, positions = None, layout.positions()
    else:
        layout = None
        ids = torch.tensor([example.ids + [_FILLER] * (longest - len(example.ids)) for example in examples])
        mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], device=device)
        positions = torch.arange(longest).expand(len(examples), -1)
    return MicroBatch(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=mask,
        layout=layout,
        loss_rows=torch.tensor(loss_rows, dtype=torch.long, device=device),
        labels=torch.tensor(labels, dtype=torch.long, device=device),
        trained_tokens=len(labels),
        tokens=sum(lengths),
    )

"""Which tokens go through the model next: continuous batching with chunked prefill, and slots that remember.

Every pass takes one token of each sequence that is answering, and fills the rest of its budget with prompts, in the
order in which they came. A slot keeps what its last sequence computed; a new one with the same adapter content and the
same beginning copies it into the slot that was unused for longest, or takes it over. Free of torch.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from twinlora.serve.state import Chunk, Copy, Plan, Sequence

__all__ = ["Scheduler"]

_WORTH_COPYING = 16  # tokens; fewer are computed again
_LESS = 0.75  # of the tokens of the longest unused slot: what may be lost of a later used one instead


class Scheduler:
    """`slots` sequences of at most `capacity` tokens run at once; a pass takes at most `budget` tokens."""

    def __init__(self, slots: int, capacity: int, budget: int) -> None:
        if budget < slots:
            raise ValueError(f"a pass of {budget} tokens cannot hold a token of each of {slots} slots")
        self.slots, self.capacity, self.budget = slots, capacity, budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of their admission
        # Free slots, the longest unused first: adapter content and tokens of what lies there.
        self.free: OrderedDict[int, tuple[str | None, list[int]]] = OrderedDict((i, (None, [])) for i in range(slots))

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must leave room for one token at least."""
        if not 0 < len(sequence.tokens) < self.capacity:
            raise ValueError(f"{len(sequence.tokens)} tokens; expected 1 to {self.capacity - 1}")
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """The next pass; sequences are admitted, nothing else changes until `done`."""
        plan, left = Plan(), self.budget
        answering = [s for s in self.running if s.remaining == 1]
        for sequence in answering:
            plan.chunks.append(Chunk(sequence, sequence.computed, 1))
            left -= 1
        for sequence in self.running:
            if sequence.remaining > 1:
                left -= self._chunk(plan, sequence, left)
        while left and self.waiting and self.free:
            left -= self._chunk(plan, self._admit(plan), left)
        return plan

    @staticmethod
    def _chunk(plan: Plan, sequence: Sequence, left: int) -> int:
        count = min(sequence.remaining, left)
        if count:
            plan.chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _admit(self, plan: Plan) -> Sequence:
        sequence = self.waiting.popleft()
        source, same = self._best(sequence)
        target = next(iter(self.free))
        if source in self.free and (source == target or self._lost(source, same) <= _LESS * self._lost(target, 0)):
            target = source
        elif same >= _WORTH_COPYING:
            plan.copies.append(Copy(source, target, same))
        else:
            same = 0
        del self.free[target]
        sequence.slot, sequence.computed, sequence.reused = target, same, same
        self.running.append(sequence)
        return sequence

    def _lost(self, slot: int, same: int) -> int:
        """Tokens that nobody can take over any more if a sequence that begins with `same` of them takes the slot."""
        return len(self.free[slot][1]) - same

    def _best(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that holds most of the sequence's beginning, and how much; the longest unused one if none does."""
        kept = [(slot, key, tokens) for slot, (key, tokens) in self.free.items()]
        kept += [(s.slot, s.key, s.tokens[: s.computed]) for s in self.running if s.slot is not None]
        best, most = next(iter(self.free)), 0
        for slot, key, tokens in kept:
            # The last token is always computed: its output chooses the next one.
            same = _common(tokens, sequence.tokens[:-1]) if key == sequence.key else 0
            if same > most:
                best, most = slot, same
        return best, most

    def done(self, plan: Plan) -> None:
        """The pass has run."""
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.start + chunk.count

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """A sequence has ended, or nobody wants it any more. `keep` what it computed, unless it may be damaged."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        kept = (sequence.key, sequence.tokens[: sequence.computed]) if keep else (None, [])
        self.free[sequence.slot] = kept
        if not keep:
            self.free.move_to_end(sequence.slot, last=False)
        sequence.slot = None

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        used = [s.slot for s in self.running if s.slot is not None]
        assert sorted([*used, *self.free]) == list(range(self.slots)), "a slot is lost or used twice"
        assert not set(map(id, self.running)) & set(map(id, self.waiting)), "a sequence runs and waits"
        for sequence in self.running:
            assert 0 <= sequence.reused <= sequence.computed < len(sequence.tokens) <= self.capacity, "tokens are lost"
        assert all(s.slot is None and s.computed == 0 for s in self.waiting), "a waiting sequence has a slot"
        assert all(len(tokens) <= self.capacity for _, tokens in self.free.values()), "a slot holds too much"


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with together."""
    longest = min(len(a), len(b))
    if a[:longest] == b[:longest]:
        return longest
    return next(i for i in range(longest) if a[i] != b[i])

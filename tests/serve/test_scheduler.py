"""Random schedules without a model: nothing is lost, computed twice, or seen by the wrong sequence."""

from __future__ import annotations

import random

import pytest

from twinlora.serve.scheduler import Scheduler
from twinlora.serve.state import Sequence


class Memory:
    """What a cache would hold: for each slot, the adapter and token behind every position."""

    def __init__(self, slots: int) -> None:
        self.slots: list[list[tuple]] = [[] for _ in range(slots)]

    def run(self, plan) -> None:
        for copy in plan.copies:
            self.slots[copy.target] = self.slots[copy.source][: copy.count]
        for chunk in plan.chunks:
            sequence = chunk.sequence
            held = self.slots[sequence.slot][: chunk.start]
            new = [(sequence.key, token) for token in sequence.tokens[chunk.start : chunk.start + chunk.count]]
            self.slots[sequence.slot] = held + new
            whole = [(sequence.key, token) for token in sequence.tokens[: chunk.start + chunk.count]]
            assert self.slots[sequence.slot] == whole, "a sequence sees what is not its own"


def prompt(source: random.Random, capacity: int) -> list[int]:
    """Often with a beginning that others have, too."""
    length = source.randint(1, capacity - 1)
    common = [1] * source.choice([0, 3, 20, 40])
    return (common + [source.randint(0, 3) for _ in range(length)])[:length]


@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_random_schedules(first):
    for seed in range(first, first + 100):
        schedule(random.Random(seed))


def schedule(source: random.Random) -> None:
    slots, capacity = source.randint(1, 5), source.randint(2, 60)
    scheduler = Scheduler(slots, capacity, budget := slots + source.randint(0, 20))
    memory = Memory(slots)
    alive: dict[Sequence, int] = {}
    finished: list[Sequence] = []
    for number in range(60):
        for _ in range(source.choice([0, 0, 1, 3]) if number < 40 else 0):
            sequence = Sequence(number, source.choice([None, "a", "b"]), prompt(source, capacity))
            alive[sequence] = source.randint(1, 6)
            scheduler.add(sequence)
        if alive and source.random() < 0.1:  # a client leaves
            gone = source.choice(list(alive))
            del alive[gone]
            scheduler.remove(gone, keep=source.random() < 0.5)
        step(scheduler, memory, alive, finished, budget)
    while scheduler.busy:
        step(scheduler, memory, alive, finished, budget)
    assert not alive
    numbers = [s.number for s in finished]
    if slots == 1:
        assert numbers == sorted(numbers), "first come, first served"


def step(scheduler, memory, alive, finished, budget):
    scheduler.check()
    plan = scheduler.plan()
    assert sum(chunk.count for chunk in plan.chunks) <= budget
    assert len({chunk.sequence.slot for chunk in plan.chunks}) == len(plan.chunks)
    assert bool(plan.chunks) == scheduler.busy, "work waits and nothing runs"
    answering = [s for s in scheduler.running if s.remaining == 1]
    assert {s.number for s in answering} <= {c.sequence.number for c in plan.chunks}, "a long prompt stalls an answer"
    memory.run(plan)
    scheduler.done(plan)
    for chunk in plan.chunks:
        sequence = chunk.sequence
        if sequence.remaining:
            continue
        alive[sequence] -= 1
        sequence.tokens.append(9)
        if not alive[sequence] or len(sequence.tokens) == scheduler.capacity:
            del alive[sequence]
            finished.append(sequence)
            scheduler.remove(sequence)
    scheduler.check()


def run(scheduler, *sequences):
    for sequence in sequences:
        scheduler.add(sequence)
    plans = []
    while any(s.remaining for s in sequences):
        plans.append(scheduler.plan())
        scheduler.done(plans[-1])
    return plans


def test_a_prefix_is_reused_under_the_same_content_alone():
    scheduler = Scheduler(3, 100, 50)
    tokens = list(range(40))
    first = Sequence(0, "a", [*tokens])
    run(scheduler, first)
    same, other = Sequence(1, "a", [*tokens, 7]), Sequence(2, "b", [*tokens, 7])
    (plan, *_) = run(scheduler, same, other)
    assert [(c.source, c.count) for c in plan.copies] == [(first.slot, 40)], "copied from a sequence that runs"
    assert (same.reused, other.reused) == (40, 0)
    first.tokens.append(5)
    scheduler.remove(first)
    again = Sequence(3, "a", [*tokens])
    (plan,) = run(scheduler, again)
    assert not plan.copies, "taken over in place"
    assert again.reused == 39, "the last token is computed for its output"


def test_what_another_conversation_left_is_not_taken_for_a_few_tokens():
    """Chats begin alike, with what the template says."""
    scheduler = Scheduler(3, 100, 50)
    first, other = Sequence(0, "a", list(range(60))), Sequence(1, "a", [*range(20), *[9] * 30])
    run(scheduler, first)
    scheduler.remove(first)
    (plan,) = run(scheduler, other)
    assert [(c.source, c.target, c.count) for c in plan.copies] == [(0, other.slot, 20)]
    assert other.slot != 0
    scheduler.remove(other)
    little = Sequence(2, "a", [0, 1, 2, *[7] * 20])
    run(scheduler, little)
    assert (little.reused, little.slot) == (0, 2), "too few to copy"
    scheduler.remove(little)
    again = Sequence(3, "a", [*range(60), 5, 5])
    run(scheduler, again)
    assert (again.reused, again.slot) == (60, 0), "taken over in place"


def test_the_longest_unused_slot_gives_what_it_shares_when_it_is_taken():
    scheduler = Scheduler(1, 100, 50)
    first, other = Sequence(0, "a", list(range(40))), Sequence(1, "a", [0, 1, 2, 9, 9])
    run(scheduler, first)
    scheduler.remove(first)
    (plan,) = run(scheduler, other)
    assert not plan.copies
    assert other.reused == 3


def test_a_damaged_slot_is_forgotten():
    scheduler = Scheduler(1, 100, 50)
    first = Sequence(0, "a", list(range(40)))
    run(scheduler, first)
    scheduler.remove(first, keep=False)
    again = Sequence(1, "a", list(range(40)))
    run(scheduler, again)
    assert again.reused == 0


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="3 tokens"):
        Scheduler(4, 10, 3)
    with pytest.raises(ValueError, match="expected 1 to 9"):
        Scheduler(1, 10, 3).add(Sequence(0, None, [0] * 10))


def test_a_short_answer_to_the_same_prompt_goes_where_the_last_one_was():
    """Requests of one adapter that share most of a prompt push nobody else out of the other slots."""
    scheduler = Scheduler(4, 100, 50)
    others = [Sequence(i, key, [5] * 60) for i, key in enumerate("abc")]
    for other in others:
        run(scheduler, other)
        scheduler.remove(other)
    for number in range(3, 9):
        asked = Sequence(number, "d", [*range(30), *[number] * 10])
        (plan,) = run(scheduler, asked)
        scheduler.remove(asked)
        assert asked.reused == (0 if number == 3 else 30)
        assert not plan.copies
    kept = {key for key, _ in scheduler.free.values()}
    assert kept == {"a", "b", "c", "d"}

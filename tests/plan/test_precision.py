"""The knapsack against every possible choice, and its bound against the truth."""

import itertools
import random

import pytest

from twinlora.errors import ConfigError
from twinlora.plan import precision
from twinlora.plan.precision import choose


def problem(seed: int, layers: int, largest: int):
    """Losses that mostly fall with the size, as real ones do, but not always."""
    draw = random.Random(seed)
    losses, sizes = {}, {}
    for i in range(layers):
        bytes_ = sorted(draw.sample(range(1, largest), 4))
        values = [*sorted((draw.expovariate(1) for _ in range(3)), reverse=True), 0.0]
        if draw.random() < 0.3:
            draw.shuffle(values)
        sizes[f"l{i}"] = dict(zip("abcd", bytes_, strict=True))
        losses[f"l{i}"] = dict(zip("abcd", values, strict=True))
    return losses, sizes


def brute_force(losses, sizes, budget):
    names = list(losses)
    fits = [
        sum(losses[n][f] for n, f in zip(names, picked, strict=True))
        for picked in itertools.product("abcd", repeat=len(names))
        if sum(sizes[n][f] for n, f in zip(names, picked, strict=True)) <= budget
    ]
    return min(fits)


@pytest.mark.parametrize("seed", range(25))
def test_exact_where_a_unit_is_a_byte(seed):
    losses, sizes = problem(seed, 5, 60)
    low, high = (sum(choice(s.values()) for s in sizes.values()) for choice in (min, max))
    for budget in (low, low + 1, (low + high) // 2, high, high + 99):
        found = choose(losses, sizes, budget)
        assert found.stored_bytes == sum(sizes[n][f] for n, f in found.formats.items()) <= budget
        assert found.loss == pytest.approx(brute_force(losses, sizes, budget), abs=1e-12)
        assert found.bound <= found.loss


@pytest.mark.parametrize("seed", range(25))
def test_the_reported_gap_holds_where_units_are_coarse(seed, monkeypatch):
    monkeypatch.setattr(precision, "_STATES", 40)
    losses, sizes = problem(seed, 6, 10**6)
    low, high = (sum(choice(s.values()) for s in sizes.values()) for choice in (min, max))
    for share in (0.1, 0.5, 0.9):
        budget = int(low + share * (high - low))
        found, best = choose(losses, sizes, budget), brute_force(losses, sizes, budget)
        assert found.stored_bytes <= budget
        assert found.bound - 1e-9 <= best <= found.loss + 1e-12


def test_a_real_sized_problem_is_solved_within_a_hundredth():
    losses, sizes = {}, {}
    draw = random.Random(0)
    for i in range(224):
        count, weight = draw.choice([4096 * 4096, 4096 * 11008]), draw.lognormvariate(0, 1.5)
        sizes[f"l{i}"] = {
            name: int(count * bits / 8) for name, bits in zip("abcd", (3.127, 4.127, 8.5, 16), strict=True)
        }
        losses[f"l{i}"] = {name: weight * x for name, x in zip("abcd", (0.04, 0.01, 4e-5, 0), strict=True)}
    total = sum(size["d"] for size in sizes.values())
    before = float("inf")
    for share in (0.2, 0.25, 0.3, 0.5, 0.9):
        found = choose(losses, sizes, int(total * share))
        assert found.stored_bytes <= total * share
        assert found.loss < before
        assert found.loss - found.bound <= 1e-2 * found.loss  # most of it is the bound's: a layer cannot be cut
        before = found.loss
    assert choose(losses, sizes, total).counts == {"d": 224}


def test_too_small_a_budget():
    losses, sizes = problem(0, 3, 60)
    least = sum(min(s.values()) for s in sizes.values())
    with pytest.raises(ConfigError, match=f"they take at least {least}"):
        choose(losses, sizes, least - 1)

"""What counts as memory, and when it stops to."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twinlora.plan.fold import fold, unfolded
from twinlora.plan.ledger import Event, Ledger
from twinlora.plan.targets import Target


def entered(name="cpu"):
    ledger = Ledger(Target(name))
    ledger.cause = "activations"
    return FakeTensorMode(), ledger


def test_storages_count_once_and_until_their_last_tensor_is_gone():
    fake, ledger = entered()
    with fake, ledger:
        x = torch.empty(100, 10)
        assert ledger.live["activations"] == 4000
        view = x.view(10, 100).T[3:]
        x.add_(1)
        assert ledger.total == 4000
        y = x + 1
        assert ledger.total == 8000
        del x, y
        assert ledger.total == 4000, "the view is left"
        ledger.assign(view, "weights")
        assert (ledger.live["activations"], ledger.live["weights"]) == (0, 4000)
        del view
    assert ledger.total == 0
    assert not ledger.live["weights"]


def test_peaks_belong_to_segments():
    fake, ledger = entered()
    with fake, ledger:
        kept = torch.empty(250)
        with ledger.within(("forward", 0), "loss head"):
            torch.empty(1000)
        with ledger.within(("forward", 1), "loss head"):
            torch.empty(10)
    assert kept.numel() == 250
    assert ledger.peaks["forward", 0].by_cause["loss head"] == 4000
    assert ledger.peaks["forward", 0].total == 5000
    assert ledger.peaks["forward", 1].total == 1040


def test_the_log_says_what_is_taken_and_given_back_and_where():
    fake, ledger = entered()
    with fake, ledger:
        before = torch.empty(1000)
        ledger.start()
        with ledger.within(("forward", 0), "activations"):
            x, scalar = torch.empty(1000), torch.empty(1)
        with ledger.within(("forward", 1), "activations"):
            y = x + scalar
        with ledger.within(("backward", 0), "activations"):
            del x, before
        del y
    sizes = [(event.segment, event.size) for event in ledger.log]
    assert (("forward", 0), 4000) in sizes
    assert (("forward", 1), 4000) in sizes
    assert sizes.count((("backward", 0), 0)) == 2
    assert unfolded(ledger.log, 1, 0) == [4000, 4000, 0, -1], "without scalars, and without what was there before"


def test_what_a_library_takes_within_a_product_is_not_in_the_log():
    fake, ledger = entered()
    with fake, ledger:
        x = torch.empty(64, 64, dtype=torch.bfloat16)
        ledger.start()
        x @ x
        wide = torch.empty(64, 64)
        wide @ wide
    taken = [event.size for event in ledger.log if event.size]
    assert taken == [8192, 16384, 16384]


def test_a_log_is_unfolded_as_layers_depend_on_each_other():
    """Each layer takes two blocks and gives back its predecessor's second one; backward goes the other way."""
    log = []

    def add(phase, place, *events):
        log.extend(Event((phase, place), block, size) for block, size in events)

    for i in range(5):
        add("forward", i, (10 * i, 2000 + i), (10 * i + 1, 3000 + i), *([(10 * i - 9, 0)] if i else []))
    for i in range(4, -1, -1):
        add("backward", i, (10 * i + 2, 4000 + i), (10 * i, 0), *([(10 * i + 12, 0)] if i < 4 else []))
    add("optimiser", None, (41, 0), (2, 0))
    names = {2000: "a", 3000: "b", 4000: "c"}
    found = unfolded(log, 1, 2)
    taken = [names[size // 1000 * 1000] + str(size % 1000) for size in found if size > 0]
    forward = [f"{name}{i}" for i in (0, 1, 2, 2, 2, 3, 4) for name in "ab"]
    assert taken == forward + [f"c{i}" for i in (4, 3, 2, 2, 2, 1, 0)]
    given = [-event for event in found if event <= 0]
    assert given[:6] == [1, 3, 5, 7, 9, 11], "each layer its predecessor's"
    assert given[6:19] == [12, 10, 14, 8, 15, 6, 16, 4, 17, 2, 18, 0, 19]
    assert sorted(given) == list(range(21)), "all of it, once"


def test_cuda_takes_blocks_of_512():
    fake, ledger = entered("cuda")
    with fake, ledger:
        x = torch.empty(129)
        assert ledger.total == 1024
        del x


def test_a_cpu_copies_what_it_promotes():
    fake, ledger = entered()
    with fake, ledger:
        wide, narrow = torch.empty(1000), torch.empty(1000, dtype=torch.bfloat16)
        wide.add_(narrow)
    assert ledger.peaks["build", None].total == 4000 + 2000 + 4000


@pytest.mark.parametrize(
    "kinds, sizes, times, period",
    [("a" * 80, (4, 5), 76, 1), ("a" * 5, (5,), 0, 1), ("ab" * 10 + "a", (9, 11), 6, 2), ("aab", (3,), 0, 3),
     ("abcdefghij", (10,), 0, 10)],
)  # fmt: skip
def test_folds_what_repeats(kinds, sizes, times, period):
    found = fold(kinds)
    assert (found.sizes, found.times, found.period) == (sizes, times, period)
    if len(sizes) == 2:
        assert sizes[0] + times * (sizes[1] - sizes[0]) == len(kinds)
        assert kinds[: sizes[0]].endswith(kinds[-period:]), "ends as the whole does"

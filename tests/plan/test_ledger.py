"""What counts as memory, and when it stops to."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twinlora.plan.fold import fold
from twinlora.plan.ledger import Ledger
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

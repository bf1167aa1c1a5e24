"""What counts as memory, and when it stops to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twinlora.numerics import cpu
from twinlora.plan.fold import fold
from twinlora.plan.ledger import Ledger
from twinlora.plan.targets import Target
from twinlora.plan.workspace import kept_bytes

ROOT = Path(__file__).parents[2]

# Buffers that kernels keep are the C++ library's own: glibc counts them.
KEPT = """
import ctypes, gc, json, sys
import torch
from twinlora.numerics import ops
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "a b c d hblkhd f g uordblks i j".split()]
c = ctypes.CDLL(None)
c.mallinfo2.restype = Info
def used():
    gc.collect()
    info = c.mallinfo2()
    return info.uordblks + info.hblkhd
torch.set_num_threads(1)
q, k = torch.ones(900, 6, 64).bfloat16(), torch.ones(900, 2, 64).bfloat16()
starts, found = [0, 700, 900], {}
torch.ones(3, requires_grad=True).sum().backward()
def forward():
    return torch.ops.twinlora.attention(q, k, k, None, None, starts, 1.0, 0)
out, lse = torch.empty_like(q), torch.empty(900, 6)
before = used(); result = forward(); del result
found["attention"] = used() - before
before = used(); result = torch.ops.twinlora.attention_backward(q, q, k, k, None, None, out, lse, starts, 1.0, 0); del result
found["attention_backward"] = used() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not cpu.paths() or cpu.path() != "avx512-bf16", reason="this processor has no attention kernel")
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own count is asked for")
def test_kept_buffers_are_what_glibc_counts():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"})  # fmt: skip
    found = json.loads(done.stdout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k, lse = torch.empty(900, 6, 64).bfloat16(), torch.empty(900, 2, 64).bfloat16(), torch.empty(900, 6)
        rest = ([0, 700, 900], 1.0, 0)
        expected = kept_bytes("attention", q, k, k, None, None, *rest)
        expected |= kept_bytes("attention_backward", q, q, k, k, None, None, q, lse, *rest)
    finally:
        torch.set_num_threads(threads)
    assert expected.keys() == found.keys()
    for name, size in expected.items():
        assert abs(found[name] / size - 1) < 0.02, (name, found, expected)


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

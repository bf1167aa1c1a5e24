"""How far blocks extend a heap, by calls to this machine's C library."""

import platform

import pytest

from tests.conftest import printed
from twinlora.errors import BackendError
from twinlora.plan import heap

MIB = 1 << 20
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")


@glibc
def test_a_heap_extends_by_what_lies_in_it_and_the_next_step_uses_it_again():
    assert 64 * MIB <= heap.extent([MIB] * 64 + [-i for i in range(64)]) < 96 * MIB


@glibc
def test_holes_that_are_too_small_are_lost():
    small, large = [MIB] * 64, [3 * MIB // 2] * 32
    halved = [*small, *(-i for i in range(0, 64, 2))]
    found = heap.extent([*halved, *large, *(-i for i in range(1, 64, 2)), *(-i for i in range(64, 96))])
    most_alive = (32 + 48) * MIB
    assert 1.4 * most_alive <= found < 1.8 * most_alive


@glibc
def test_what_stays_from_the_forward_pass_on_keeps_holes_apart():
    """As where activations are recomputed: each of 30 layers works with many blocks and leaves one."""
    forward, backward = [], []
    for layer in range(30):
        first = 21 * layer
        forward += [*[MIB] * 20, *(-i for i in range(first, first + 20)), MIB // 4]
    for layer in range(30):
        first = 21 * 30 + 20 * layer
        backward += [*[MIB] * 20, *(-i for i in range(first, first + 20)), -(21 * (29 - layer) + 20)]
    events = forward + backward
    assert heap.extent(events, len(forward)) > 1.05 * heap.extent(events)


@glibc
def test_equal_steps_extend_it_equally():
    events = [MIB, 3 * MIB, 0, 2 * MIB, MIB, -1, -3, -2]
    assert heap.extent(events) == heap.extent(events)


@glibc
def test_no_memory_is_touched():
    """Asked of a process that has had no other children."""
    code = (
        "import resource; from twinlora.plan import heap; "
        f"heap.extent([{MIB << 10}, 0]); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    assert int(printed(code)) < 1 << 18, "kB: a quarter of the block's GiB"


def test_the_process_that_makes_the_calls_is_without_torch():
    assert printed("import sys, twinlora.plan.heap; print('torch' in sys.modules)") == "False"


@glibc
def test_memory_that_is_not_promised_counts_nothing():
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({512 * MIB}, {512 * MIB}))"
    assert printed(f"{limit}; from twinlora.plan import heap; print(heap.extent([{MIB << 10}]))") == "0"


def test_no_events_and_other_c_libraries_count_nothing(monkeypatch):
    assert heap.extent([]) == 0
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert heap.extent([MIB, 0]) == 0


@glibc
def test_a_process_that_fails_is_said(monkeypatch):
    monkeypatch.setattr(heap, "_DRAWS", 1)
    with pytest.raises(BackendError, match=r"could not be measured(.|\n)*IndexError"):
        heap.extent([MIB, -5])

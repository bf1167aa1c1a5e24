"""How far a step's blocks of memory extend glibc's heap, which is further than the bytes that are alive at once.

torch's CPU allocator asks `posix_memalign` for boundaries of 64 bytes, and that looks for about 96 bytes more than the
block has, so that a tensor's own hole is too small for the next of its size, unless what lies beside it is free, too.
Small objects that come and go decide that, and no formula says what is left. So a process without torch makes the very
same calls, to this machine's own C library, set up as machine.keep_freed_memory does, and without touching the memory.

The small objects are a stand-in: sizes and lives are about those of steps of which every call of malloc was recorded
(40 to 90 objects a block; the ten that matter). The forward pass also makes some hundred a layer that stay until the
step ends. Where activations are recomputed these decide most: a recorded step of a 1B extended the heap by 1,009 MB,
and by 604 without the objects that outlive a third of it. Most lie where small ones lay before; as many are made here
as bring the heaps of 43 measured steps closest. Where each lies is chance, so that a few draws are averaged.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from twinlora.errors import BackendError

__all__ = ["extent"]

_DRAWS, _STEPS = 12, 2  # the heap of the second step is that of all later ones
_ALIGNMENT = 64  # of torch's CPU allocator
_DESCRIPTORS = (96, 176)  # torch's StorageImpl and TensorImpl, which live as long as the block does
# Of the other small objects: how many come with a block; of a hundred, their bytes, and after how many blocks they go.
_PASSING = 10
_SIZES = (16,) * 30 + (32,) * 34 + (48,) * 6 + (96,) * 5 + (176,) * 4 + (768,) * 16 + (2144,) * 5
_LIVES = (0,) * 72 + (1,) * 20 + (10,) * 4 + (300,) * 4
# Of those that stay until the step ends: how many come with a block of the forward pass; of ten, their bytes.
_STAYING = 0.15
_STAYING_SIZES = (16,) * 3 + (24,) * 4 + (32,) * 2 + (104,)


def extent(events: Sequence[int], forward: int = 0) -> int:
    """Bytes by which steps of these events extend a heap; 0 where the C library is not glibc, and where the system does
    not promise that much memory.

    A positive event is a block of so many bytes; the others give back the block with that index (in order of making),
    negated. The first `forward` are those of the forward pass. Raises BackendError.
    """
    if platform.libc_ver()[0] != "glibc" or not events:
        return 0
    command = [sys.executable, "-m", __name__, str(forward), str(_DRAWS)]
    done = subprocess.run(command, input=json.dumps(list(events)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the heap of a step could not be measured:\n{done.stderr[-2000:]}")
    return round(statistics.mean(map(int, done.stdout.split())))


class _Heap:
    """glibc's, of this process."""

    def __init__(self) -> None:
        c = ctypes.CDLL(None, use_errno=True)
        c.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a block's header must not bring 2 MiB of memory in
        c.mallopt(-1, -1)  # M_TRIM_THRESHOLD and M_MMAP_MAX as in machine.py, which imports torch
        c.mallopt(-4, 0)
        self.malloc, self.free, self._memalign, self._sbrk = c.malloc, c.free, c.posix_memalign, c.sbrk
        self.malloc.argtypes, self.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        self.free.argtypes, self.free.restype = [ctypes.c_void_p], None
        self._memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._sbrk.argtypes, self._sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
        self._address = ctypes.c_void_p()

    def block(self, size: int) -> int:
        """As torch allocates. Raises MemoryError where the system does not promise as much."""
        if self._memalign(ctypes.addressof(self._address), _ALIGNMENT, size):
            raise MemoryError(f"{size} bytes")
        assert self._address.value is not None
        return self._address.value

    def end(self) -> int:
        """The address at which it ends."""
        end: int = self._sbrk(0)
        return end


def _extent(events: Sequence[int], forward: int, draw: int) -> int:
    """Bytes by which steps of these events extend this process's heap."""
    chance = random.Random(draw)
    calls = _STEPS * _PASSING * sum(event > 0 for event in events)
    passing = zip(chance.choices(_SIZES, k=calls), chance.choices(_LIVES, k=calls), strict=True)
    heap = _Heap()
    malloc, free = heap.malloc, heap.free
    start, time = heap.end(), 0
    due: dict[int, list[int]] = {}
    for _ in range(_STEPS):
        held: list[list[int]] = []
        staying: list[int] = []
        for number, event in enumerate(events):
            if event <= 0:
                _release(heap, held[-event])
                continue
            time += 1
            _release(heap, due.pop(time, []))
            for size, life in itertools.islice(passing, _PASSING):
                address = malloc(size)
                if life:
                    due.setdefault(time + life, []).append(address)
                else:
                    free(address)
            if number < forward and chance.random() < _STAYING:
                staying.append(malloc(chance.choice(_STAYING_SIZES)))
            held.append([heap.block(event), *map(malloc, _DESCRIPTORS)])
        _release(heap, staying)
    return heap.end() - start


def _release(heap: _Heap, addresses: list[int]) -> None:
    for address in addresses:
        heap.free(address)
    addresses.clear()


def _print_extents(events: Sequence[int], forward: int, draws: int) -> None:
    """A line for each draw, in a process each, since a heap is extended once; at a time as many as there are cores."""
    running: set[int] = set()
    for draw in range(draws):
        if len(running) == (os.cpu_count() or 1):
            _wait(running)
        if not (child := os.fork()):
            _print_extent(events, forward, draw)
        running.add(child)
    while running:
        _wait(running)


def _wait(running: set[int]) -> None:
    """For one of these processes to end; if it failed, so does this one."""
    child, status = os.wait()
    running.remove(child)
    if status:
        sys.exit(1)


def _print_extent(events: Sequence[int], forward: int, draw: int) -> NoReturn:
    """The body of a draw's process."""
    try:
        found = _extent(events, forward, draw)
    except MemoryError:
        found = 0
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os.write(1, f"{found}\n".encode())  # at once, beside others
    os._exit(0)


if __name__ == "__main__":
    _print_extents(json.load(sys.stdin), *map(int, sys.argv[1:]))

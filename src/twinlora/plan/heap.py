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
import json
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from twinlora.errors import BackendError

__all__ = ["extent"]

_DRAWS, _STEPS = 4, 2  # the heap of the second step is that of all later ones
_ALIGNMENT = 64  # of torch's CPU allocator
_DESCRIPTORS = (96, 176)  # torch's StorageImpl and TensorImpl, which live as long as the block does
# Of the other small objects: how many come with a block, their bytes, and in how many blocks' time they go.
_PASSING = 10
_SIZES, _SIZE_WEIGHTS = (16, 32, 48, 96, 176, 768, 2144), (30, 34, 6, 5, 4, 16, 5)
_LIVES, _LIFE_WEIGHTS = (0, 1, 10, 300), (72, 20, 4, 4)
# Those that stay until the step ends: how many come with a block of the forward pass, and their bytes.
_STAYING = 0.15
_STAYING_SIZES, _STAYING_WEIGHTS = (16, 24, 32, 104), (30, 40, 20, 10)


def extent(events: Sequence[int], forward: int = 0) -> int:
    """Bytes by which steps of these events extend a heap; 0 where the C library is not glibc, and where the system does
    not promise that much memory.

    A positive event is a block of so many bytes; the others give back the block with that index (in order of making),
    negated. The first `forward` are those of the forward pass. Raises BackendError.
    """
    if platform.libc_ver()[0] != "glibc" or not events:
        return 0
    document = json.dumps(list(events))

    def measured(draw: int) -> int:
        command = [sys.executable, "-m", __name__, str(forward), str(draw)]
        done = subprocess.run(command, input=document, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"the heap of a step could not be measured:\n{done.stderr[-2000:]}")
        return int(done.stdout)

    with ThreadPoolExecutor() as pool:
        return round(statistics.mean(pool.map(measured, range(_DRAWS))))


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
    sizes = iter(chance.choices(_SIZES, _SIZE_WEIGHTS, k=calls))
    lives = iter(chance.choices(_LIVES, _LIFE_WEIGHTS, k=calls))
    heap = _Heap()
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
            for _ in range(_PASSING):
                address, life = heap.malloc(next(sizes)), next(lives)
                if life:
                    due.setdefault(time + life, []).append(address)
                else:
                    heap.free(address)
            if number < forward and chance.random() < _STAYING:
                (size,) = chance.choices(_STAYING_SIZES, _STAYING_WEIGHTS)
                staying.append(heap.malloc(size))
            held.append([heap.block(event), *map(heap.malloc, _DESCRIPTORS)])
        _release(heap, staying)
    return heap.end() - start


def _release(heap: _Heap, addresses: list[int]) -> None:
    for address in addresses:
        heap.free(address)
    addresses.clear()


if __name__ == "__main__":
    try:
        print(_extent(json.load(sys.stdin), *map(int, sys.argv[1:])))
    except MemoryError:
        print(0)

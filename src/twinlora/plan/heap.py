"""How much a step's blocks of memory extend glibc's heap beyond the bytes that are alive: fragmentation.

torch's CPU allocator asks `posix_memalign` for 64-byte boundaries, which looks for about 96 bytes more than the block has,
so that a tensor's own hole is too small for the next of its size unless a free neighbour lends the rest; small objects
that come and go decide that. No formula says what is left of it, so a process without torch makes the very same
calls, to this machine's own C library set up as machine.keep_freed_memory does, without touching the memory.

The small objects are a stand-in. Their sizes and lives are those that were counted in steps of SmolLM2 (every call of
malloc in a step recorded); which of them lies where is chance, so that a few draws are averaged.
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

from twinlora.errors import BackendError

__all__ = ["fragmentation"]

_DRAWS, _STEPS = 3, 2  # the heap of the second step is that of all later ones
_ALIGNMENT = 64  # of torch's CPU allocator
_DESCRIPTORS = (96, 176)  # torch's StorageImpl and TensorImpl, which live as long as the block does
# Of the other small objects: how many come with a block, their bytes, and in how many blocks' time they go.
_PASSING = 10
_SIZES, _SIZE_WEIGHTS = (16, 32, 48, 96, 176, 768, 2144), (30, 34, 6, 5, 4, 16, 5)
_LIVES, _LIFE_WEIGHTS = (0, 1, 10, 300), (75, 20, 3, 2)


def fragmentation(events: Sequence[int]) -> int:
    """Bytes by which repeated steps extend the heap beyond their largest sum of blocks; 0 where the C library is not
    glibc.

    `events` of a step: a positive number is a block of so many bytes, the others give back the block with that index
    (in order of making), negated. Raises BackendError.
    """
    if platform.libc_ver()[0] != "glibc" or not events:
        return 0
    document = json.dumps(list(events))
    command = [sys.executable, "-m", __name__]
    extents = []
    for draw in range(_DRAWS):
        done = subprocess.run([*command, str(draw)], input=document, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"the heap of a step could not be measured:\n{done.stderr[-2000:]}")
        extents.append(int(done.stdout))
    return max(0, round(statistics.mean(extents)) - _largest_sum(events))


def _largest_sum(events: Sequence[int]) -> int:
    sizes: list[int] = []
    alive = most = 0
    for event in events:
        if event > 0:
            sizes.append(event)
            alive += event
            most = max(most, alive)
        else:
            alive -= sizes[-event]
    return most


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


def _extent(events: Sequence[int], draw: int) -> int:
    """Bytes by which steps of these events extend this process's heap."""
    chance = random.Random(draw)
    calls = _STEPS * _PASSING * sum(event > 0 for event in events)
    small = iter(list(zip(chance.choices(_SIZES, _SIZE_WEIGHTS, k=calls), chance.choices(_LIVES, _LIFE_WEIGHTS, k=calls), strict=True)))
    heap = _Heap()
    start, time = heap.end(), 0
    due: dict[int, list[int]] = {}
    for _ in range(_STEPS):
        held: list[list[int]] = []
        for event in events:
            if event <= 0:
                _release(heap, held[-event])
                continue
            time += 1
            _release(heap, due.pop(time, []))
            for _ in range(_PASSING):
                size, life = next(small)
                address = heap.malloc(size)
                due.setdefault(time + life, []).append(address) if life else heap.free(address)
            held.append([heap.block(event), *map(heap.malloc, _DESCRIPTORS)])
    return heap.end() - start


def _release(heap: _Heap, addresses: list[int]) -> None:
    for address in addresses:
        heap.free(address)
    addresses.clear()


if __name__ == "__main__":
    print(_extent(json.load(sys.stdin), int(sys.argv[1])))

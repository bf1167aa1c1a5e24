"""Where torch's large tensors lie on a CPU: in a pool of our own, which keeps what is freed for the next of its size.

In the C library's heap they leave holes that are too small for one another (csrc/pool.cpp says why), and a step that
recomputes its activations takes up to half as much memory again as it holds. What lies where in the pool follows from
the sizes alone, so that a plan knows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinlora.numerics import cpu

__all__ = ["extent", "install", "kept_bytes"]


def install() -> bool:
    """From now on torch takes blocks of 64 KiB and more from the pool, for all of this process.

    False, and nothing changes, without the compiled extension, where the C library is not glibc, under a limit on the
    address space, and where torch was built with another allocator. Raises BackendError for an extension out of date.
    """
    native = cpu.extension()
    return native is not None and bool(native.pool_torch_memory())


def kept_bytes() -> int:
    """What the pool keeps of freed memory."""
    native = cpu.extension()
    if native is None:
        return 0
    end, taken = native.pool_use()
    return int(end - taken)


def extent(events: Sequence[int]) -> int:
    """Bytes by which steps of these events extend an empty pool, with those of blocks too small for it; without the
    extension 0.

    A positive event is a block of so many bytes; the others give back the block with that index (in order of taking),
    negated. Raises ValueError for one that is given back twice, IndexError for one that was not taken.
    """
    native = cpu.extension()
    return 0 if native is None else int(native.pool_extent(list(events)))

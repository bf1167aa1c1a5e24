"""Where torch's large tensors lie on a CPU: in a pool of our own, which keeps what is freed for the next of its size.

In the C library's heap they leave holes that are too small for one another (csrc/pool.cpp says why), and a step that
recomputes its activations takes up to half as much memory again as it holds. What lies where in the pool follows from
the sizes alone, so that a plan knows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinlora.numerics import cpu

__all__ = ["extent", "install", "refusal", "trim"]


def refusal() -> str | None:
    """Why large tensors cannot lie in the pool, None where they can: without the compiled extension, with another C
    library than glibc, under a limit on the address space, in a build of torch with an allocator of its own, beside a
    profiler that has taken that over, or since TWINLORA_POOL=off says so (for a profiler that comes later)."""
    native = cpu.extension()
    return "the compiled extension is missing" if native is None else native.pool_refusal() or None


def install() -> None:
    """From now on torch takes blocks of 64 KiB and more from the pool, for all of this process, unless that is refused.

    Raises BackendError for an extension out of date.
    """
    if (native := cpu.extension()) is not None:
        native.pool_torch_memory()


def trim() -> None:
    """Give the system back what the pool keeps of freed memory."""
    if (native := cpu.extension()) is not None:
        native.pool_trim()


def extent(events: Sequence[int]) -> int:
    """Bytes by which steps of these events extend an empty pool, with those of blocks too small for it; without the
    extension 0.

    A positive event is a block of so many bytes; the others give back the block with that index (in order of taking),
    negated. Raises ValueError for one that is given back twice, IndexError for one that was not taken.
    """
    native = cpu.extension()
    return 0 if native is None else int(native.pool_extent(list(events)))

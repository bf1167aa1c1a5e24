"""What this machine is, and how much of it a process has used."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

import twinlora
from twinlora.numerics import pool

T = TypeVar("T")

__all__ = [
    "apart", "available_bytes", "describe", "heap_bytes", "held_bytes", "keep_freed_memory", "mapped",
    "peak_device_bytes", "peak_rss_bytes", "product_rates", "release_freed_memory", "reset_peaks", "rss_bytes",
    "spare_bytes",
]  # fmt: skip


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Hardware and versions, as recorded with every result. Sizes in bytes."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _proc_kib("/proc/meminfo", "MemTotal"),
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "twinlora": twinlora.__version__,
    }


_CONTROL_GROUP = "/sys/fs/cgroup"


def available_bytes() -> int:
    """Memory that a process may still take: what the system has free, or what its control group leaves."""
    free = _proc_kib("/proc/meminfo", "MemAvailable")
    free = free or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # no proc file: all there is
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, taken, held = (Path(_CONTROL_GROUP, name).read_text().strip() for name in names)
        except OSError:
            continue
        if most.isdigit():
            # Of what is taken, files that were read and may be read again are given back when others want memory.
            files = re.search(r"^(?:total_)?inactive_file (\d+)$", held, re.MULTILINE)
            free = min(free, max(0, int(most) - int(taken) + (int(files[1]) if files else 0)))
    return free


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step frees and asks for the same sizes again, and fresh pages cost time.

    For this process, and only where the C library is glibc. Large tensors go to the pool, which has no holes too small
    for one another.
    """
    pool.install()
    if c := _glibc():
        c.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        c.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own


def release_freed_memory() -> None:
    """Give the system back what the C library and the pool keep of freed memory, where they are ours to ask."""
    pool.trim()
    if c := _glibc():
        c.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def mapped(nbytes: int) -> Tensor:
    """Zeros uint8 [nbytes] in a mapping of their own, which the system gets back with the last tensor over them.

    For what comes and goes in a process that stays: glibc has several heaps, one thread loads through this and the next
    through that one, and each keeps what was ever freed in it.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    own: Any = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, nbytes, **own), dtype=torch.uint8)


def apart(function: Callable[[], T]) -> T:
    """Run it in a thread that ends with it, and its OpenMP threads too.

    libgomp keeps threads for each thread that has computed. Where there are more of them than processors, all of them
    sleep between any two parallel regions instead of spinning, and a decoding step takes half as long again.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def product_rates(*dtypes: torch.dtype) -> list[float]:
    """Rates of matrix products on the CPU, flop/s: the best of a few each, taken in turns, since other load comes and
    goes and must not decide between the types. About 20 ms a type."""
    operands = [(torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)) for dtype in dtypes]
    best = [math.inf] * len(dtypes)
    for _ in range(8):
        for number, (a, b) in enumerate(operands):
            start = time.perf_counter()
            a @ b
            best[number] = min(best[number], time.perf_counter() - start)
    return [2 * 256 * 512 * 512 / seconds for seconds in best]


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _proc_kib(path: str, key: str) -> int:
    """A `Key:   n kB` line of a proc file, in bytes; 0 where the system has none."""
    try:
        match = re.search(rf"^{key}:\s*(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def heap_bytes() -> int:
    """Bytes that glibc has handed out to this thread and by mappings; 0 where it is older than 2.33 or not there."""
    c = _glibc()
    if c is None or not hasattr(c, "mallinfo2"):
        return 0
    c.mallinfo2.restype = _Heap
    info: _Heap = c.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def rss_bytes() -> int:
    """Resident set of this process now; 0 where the system does not say."""
    return _proc_kib("/proc/self/status", "VmRSS")


def held_bytes() -> int:
    """Resident set of this process, once what it keeps of freed memory is given back."""
    release_freed_memory()
    return rss_bytes()


def peak_rss_bytes(pid: int | None = None) -> int:
    """Largest resident set of this process since its start or `reset_peaks` (VmHWM; getrusage counts a parent too).

    Of another process by `pid`; 0 where the system does not tell.
    """
    if peak := _proc_kib(f"/proc/{pid or 'self'}/status", "VmHWM"):
        return peak
    if pid is not None:
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Largest memory that torch held on a GPU since `reset_peaks`; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def spare_bytes(device: torch.device, *, margin: float) -> int:
    """Memory that would be left at this process's peak, less a share of all of it; never below 0.

    On a GPU within the share of it that torch may use; on the CPU of what the system calls available.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cap = int(total * torch.cuda.get_per_process_memory_fraction(device))
        held, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return max(0, min(free + held, cap) - peak - int(margin * cap))
    total, resident = _proc_kib("/proc/meminfo", "MemTotal"), _proc_kib("/proc/self/status", "VmRSS")
    free = _proc_kib("/proc/meminfo", "MemAvailable") + resident - peak_rss_bytes()
    return max(0, free - int(margin * total))


def reset_peaks(device: torch.device) -> None:
    """Start both peaks anew, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")

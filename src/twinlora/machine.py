"""What this machine is, and how much of it a process has used."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

import twinlora

__all__ = ["describe", "peak_device_bytes", "peak_rss_bytes", "reset_peaks"]


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


def peak_rss_bytes() -> int:
    """Largest resident set of this process since its start or `reset_peaks` (VmHWM; getrusage counts a parent too)."""
    if peak := _proc_kib("/proc/self/status", "VmHWM"):
        return peak
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Largest memory that torch held on a GPU since `reset_peaks`; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peaks(device: torch.device) -> None:
    """Start both peaks anew, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")

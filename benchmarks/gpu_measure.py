"""Time and memory on a GPU, and on a CPU for a dry run: events around the work, a cold L2 where it matters, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Where and how often to measure. A dry run uses tiny shapes on the CPU: it proves the harness, its times say nothing."""

    device: torch.device
    dry: bool
    rounds: int

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(ways: dict[str, Callable[[int], object]], setting: Setting, *, cold: bool = True) -> dict[str, float]:
    """Median seconds of each way, taken in turns; `way(i)` gets the round's number. `cold`: L2 is filled with else before."""
    flush = torch.empty(1 << (28 if setting.device.type == "cuda" else 10), dtype=torch.uint8, device=setting.device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(setting.rounds + 2):  # the first two warm up
        for name, way in ways.items():
            if cold:
                flush.fill_(number)
            took = _once(lambda way=way, number=number: way(number), setting.device)
            if number >= 2:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes that torch held at most since `reset_peak`; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def limits(setting: Setting) -> dict[str, float]:
    """The device's own rates: bytes copied per second (read + written), and bfloat16 products of random data, flop/s."""
    size, edge = setting.pick((1 << 30, 8192), (1 << 12, 64))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=setting.device).bfloat16() for _ in range(2))
    took = seconds({"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}, setting)
    return {"copy_bytes_per_second": 2 * size / took["copy"], "gemm_flops": 2 * edge**3 / took["product"]}


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in float64 on the CPU; NaN never passes a bound."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))

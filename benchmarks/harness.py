"""What the benchmarks share: the package on the path, and the facts recorded with every result."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))  # runs without installing, too

PEERS = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")

# Ways to fine-tune by name: arguments of peers.py, or our method.
PEER_WAYS = {
    "peft-lora": {"quantized": False, "tuned": False},
    "peft-lora-tuned": {"quantized": False, "tuned": True},
    "peft-qlora": {"quantized": True, "tuned": False},
    "peft-qlora-tuned": {"quantized": True, "tuned": True},
}
OUR_WAYS = {"twinlora-lora": "lora", "twinlora-qlora": "qlora"}


def facts(device: Any = "cpu", peers: tuple[str, ...] = PEERS) -> dict:
    """The machine with the device in use, the versions of what is compared, and the commit."""
    from twinlora import machine
    from twinlora.numerics import ops

    versions = {}
    for name in peers:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found = {"machine": machine.describe(device), "versions": versions, "backend": ops.backend(device)}
    return found | {"git_hash": commit()}


def commit() -> str:
    """The commit that runs; empty in a copy without its history."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def limits() -> dict[str, float]:
    """This machine's own rates, now: bytes copied per second (read + written) and bfloat16 GEMM flop/s."""
    import torch

    torch.manual_seed(0)
    source, targets = torch.randn(4096, 4096).bfloat16(), [torch.empty(4096, 4096).bfloat16() for _ in range(8)]
    x = torch.randn(2048, 4096).bfloat16()
    copies, products = [], []
    for number in range(25):
        start = time.perf_counter()
        targets[number % 8].copy_(source)
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        x @ source
        products.append(time.perf_counter() - start)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / statistics.median(copies),
        "gemm_flops": 2 * 2048 * 4096 * 4096 / statistics.median(products),
    }

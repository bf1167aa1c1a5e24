"""What a plan is made for: this machine, or a device by its exact name.

The table has the memory that the driver reports, and what the maker states: the peaks of dense 16-bit products (float32
sums, no sparsity) and of memory traffic. Nothing is guessed: another name is an error that asks for a measurement.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from twinlora.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "Device", "find", "this_machine"]


@dataclass(frozen=True)
class Device:
    """Hardware to plan for.

    `memory_bytes` is what a run may use. `product_flops` (flop/s) and `bandwidth` (bytes/s, read and written together)
    are the maker's peaks; None where only a measurement counts.
    """

    name: str
    target: Literal["cpu", "cuda"]
    memory_bytes: int
    source: str
    date: str
    product_flops: float | None = None
    bandwidth: float | None = None
    bfloat16: bool = True


_ADA = "NVIDIA Ada GPU architecture whitepaper 2.02, appendix"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper 2.0, appendix"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper 1.1, appendix"
# A quarter, since the figure is with sparsity and with 16-bit sums (3060) or 8-bit factors (6000).
_RTX_3060 = "NVIDIA RTX 3060 announcement, a quarter of its 101 TFLOP/s"
_RTX_6000 = "NVIDIA RTX 6000 Ada generation data sheet, a quarter of its 1,457 TFLOP/s"

# name: (MiB, TFLOP/s, GB/s, source of the rates, its date). Memory is what the driver reports (nvidia-smi), error
# correction as delivered: of a card sold with 48 GB it leaves 45 GiB where the memory has no bits of its own for it.
_TABLE: dict[str, tuple[int, float, float, str, str]] = {
    "RTX 3060": (12288, 25.3, 360, _RTX_3060, "2021-02"),
    "RTX 3090": (24576, 71.0, 936, _AMPERE, "2021-01"),
    "RTX 4080": (16376, 97.5, 716.8, _ADA, "2023-03"),
    "RTX 4090": (24564, 165.2, 1008, _ADA, "2023-03"),
    "RTX 5090": (32607, 209.5, 1792, _BLACKWELL, "2025-01"),
    "RTX A6000": (49140, 154.8, 768, _AMPERE, "2021-01"),
    "RTX 6000 Ada": (49140, 364.2, 960, _RTX_6000, "2023-01"),
    "T4": (15360, 65.0, 320, "NVIDIA T4 product page", "2020"),
    "V100 32GB": (32768, 125.0, 900, "NVIDIA V100 data sheet (SXM2)", "2020-01"),
    "A10": (23028, 125.0, 600, "NVIDIA A10 data sheet", "2021-03"),
    "A40": (46068, 149.7, 696, "NVIDIA A40 data sheet", "2022-05"),
    "A100 40GB": (40960, 312.0, 1555, "NVIDIA A100 data sheet", "2021-06"),
    "A100 80GB": (81920, 312.0, 2039, "NVIDIA A100 data sheet (SXM)", "2021-06"),
    "L4": (23034, 121.0, 300, "NVIDIA L4 data sheet, half of the figure with sparsity", "2023-03"),
    "L40": (46068, 181.05, 864, "NVIDIA L40 data sheet", "2023-02"),
    "L40S": (46068, 362.05, 864, "NVIDIA L40S data sheet", "2023-08"),
    "H100 PCIe": (81559, 756.5, 2000, "NVIDIA H100 data sheet, half of the figure with sparsity", "2023-03"),
    "H100 SXM": (81559, 989.4, 3350, "NVIDIA H100 data sheet, half of the figure with sparsity", "2023-03"),
    "H200": (143771, 989.4, 4800, "NVIDIA H200 data sheet, half of the figure with sparsity", "2024-03"),
}
_WITHOUT_BFLOAT16 = {"T4", "V100 32GB"}

DEVICES: dict[str, Device] = {
    name: Device(
        name, "cuda", mebibytes << 20, source, date, 1e12 * flops, 1e9 * bandwidth,
        name not in _WITHOUT_BFLOAT16,
    )
    for name, (mebibytes, flops, bandwidth, source, date) in _TABLE.items()
}  # fmt: skip


def find(name: str) -> Device:
    """The device of exactly this name (case and a leading NVIDIA or GeForce aside). Raises ConfigError."""
    wanted = re.sub(r"^(nvidia )?(geforce )?", "", name.strip().lower())
    for known, device in DEVICES.items():
        if known.lower() == wanted:
            return device
    near = difflib.get_close_matches(wanted, [known.lower() for known in DEVICES], n=3, cutoff=0.6)
    hint = f"; near: {', '.join(known for known in DEVICES if known.lower() in near)}" if near else ""
    raise ConfigError(
        f"device {name!r} is not in the table, and a device is never guessed from a like name{hint}\n"
        f"  known: {', '.join(DEVICES)}\n"
        "  on the machine itself run `twinlora plan --calibrate` and then plan without --device;\n"
        "  or name one of these and give the memory of yours, for example --device 'RTX 4090' --memory 20GiB"
    )


def this_machine(device: torch.device) -> Device:
    """`device` of this machine, with the memory that is free now."""
    import torch

    from twinlora import machine

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        name = torch.cuda.get_device_name(device)
        return Device(name, "cuda", free, "free memory, from the driver", "now", bfloat16=bfloat16)
    facts = machine.describe()
    name = f"{facts['cpu']}, {facts['threads']} threads"
    free = machine.available_bytes() + machine.rss_bytes()  # what this process holds is counted as a run's own
    return Device(name, "cpu", free, "free memory, from the system", "now")

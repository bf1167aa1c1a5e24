"""Devices by exact name; what is not in the table is not guessed."""

import pytest
import torch

from twinlora.errors import ConfigError
from twinlora.plan.devices import DEVICES, find, this_machine
from twinlora.plan.speed import stated


@pytest.mark.parametrize("name", ["RTX 4090", "rtx 4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090", " RTX 4090 "])
def test_a_name_is_found_however_it_is_written(name):
    assert find(name).name == "RTX 4090"


@pytest.mark.parametrize("name", ["RTX 409", "RTX A1000", "A100", "H100", "RTX 4090 Ti", "4090", ""])
def test_a_like_name_is_no_name(name):
    with pytest.raises(ConfigError, match="never guessed"):
        find(name)


def test_every_device_has_a_source_a_date_and_rates():
    for device in DEVICES.values():
        assert device.source
        assert device.date[:2] == "20"
        rates = stated(device)
        assert 2e13 < rates.product_flops < 1e15
        assert 2e11 < rates.bandwidth < 5e12
        assert 10 * 2**30 < device.memory_bytes < 150 * 2**30


# Multiprocessors, their clock in GHz under such products, and dense 16-bit operations of each in a clock, 32-bit sums:
# GeForce and L40 do half of what the same chip does elsewhere.
_UNITS = {
    "RTX 3060": (28, 1.777, 512), "RTX 3090": (82, 1.695, 512), "RTX 4080": (76, 2.505, 512),
    "RTX 4090": (128, 2.52, 512), "RTX 5090": (170, 2.407, 512), "RTX A6000": (84, 1.8, 1024),
    "RTX 6000 Ada": (142, 2.505, 1024), "T4": (40, 1.59, 1024), "V100 32GB": (80, 1.53, 1024), "A10": (72, 1.695, 1024),
    "A40": (84, 1.74, 1024), "A100 40GB": (108, 1.41, 2048), "A100 80GB": (108, 1.41, 2048), "L4": (60, 2.04, 1024),
    "L40": (142, 2.49, 512), "L40S": (142, 2.52, 1024), "H100 PCIe": (114, 1.62, 4096), "H100 SXM": (132, 1.83, 4096),
    "H200": (132, 1.83, 4096),
}  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
def test_peaks_are_those_of_the_units_without_sparsity(name):
    """A figure with sparsity, or with 16-bit sums, is twice that."""
    count, gigahertz, each = _UNITS[name]
    assert DEVICES[name].product_flops == pytest.approx(1e9 * gigahertz * count * each, rel=0.04)


def test_this_machine_has_what_is_free_and_no_stated_rates():
    here = this_machine(torch.device("cpu"))
    assert 0 < here.memory_bytes < 2**45
    assert stated(here) is None

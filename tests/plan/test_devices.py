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


def test_this_machine_has_what_is_free_and_no_stated_rates():
    here = this_machine(torch.device("cpu"))
    assert 0 < here.memory_bytes < 2**45
    assert stated(here) is None

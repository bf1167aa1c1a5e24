"""llama.cpp's block formats against the gguf package: the same bytes, the same weights read back."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from twinlora.errors import ModelError
from twinlora.numerics import ggml

TYPES = {fmt: GGMLQuantizationType[fmt.upper()] for fmt in ggml.BLOCK_BYTES}


def weights() -> torch.Tensor:
    """Normal rows, and awkward ones: zeros, a single value, halves of a step, ties of the largest, tiny and large."""
    torch.manual_seed(2)
    awkward = torch.zeros(6, 96)
    awkward[1, 5] = -3.0
    awkward[2] = torch.arange(96) * 0.5
    awkward[3, ::2], awkward[3, 1::2] = 1.0, -1.0
    awkward[4] = torch.randn(96) * 1e-6
    awkward[5] = torch.randn(96) * 1e4
    return torch.cat([torch.randn(200, 96), awkward])


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0"])
def test_the_bytes_are_those_of_the_gguf_package(fmt):
    expected = quants.quantize(weights().numpy(), TYPES[fmt])
    assert np.array_equal(ggml.quantize(weights(), fmt).numpy(), expected)


@pytest.mark.parametrize("fmt", list(TYPES))
def test_reading_is_that_of_the_gguf_package(fmt):
    stored = ggml.quantize(weights(), fmt)
    expected = quants.dequantize(stored.numpy(), TYPES[fmt])
    assert np.array_equal(ggml.dequantize(stored, fmt).numpy(), expected)


def test_iq4_nl_is_nearer_than_q4_0_and_keeps_signs():
    weight = torch.randn(256, 1024)
    errors = {fmt: (ggml.dequantize(ggml.quantize(weight, fmt), fmt) - weight).square().mean() for fmt in TYPES}
    assert errors["q8_0"] < errors["iq4_nl"] < 0.85 * errors["q4_0"]
    assert errors["iq4_nl"] < 0.009  # of a variance of 1


def test_every_code_of_iq4_nl_is_the_nearest_level():
    weight = weights()[:50]
    read = ggml.dequantize(ggml.quantize(weight, "iq4_nl"), "iq4_nl")
    scales = ggml.quantize(weight, "iq4_nl").view(-1, 18)[:, :2].contiguous().view(torch.float16).float()
    levels = scales[:, :, None] * torch.tensor(ggml.IQ4_LEVELS).float()
    nearest = (weight.view(-1, 32, 1) - levels).abs().amin(dim=2)
    assert ((weight - read).view(-1, 32).abs() <= nearest + 2e-3 * weight.view(-1, 32).abs().amax(1, True)).all()


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ModelError, match="q_proj: rows of 40 weights cannot be q4_0: expected a multiple of 32"):
        ggml.quantize(torch.zeros(2, 40), "q4_0", name="q_proj")
    for bad in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ModelError, match="q_proj: a value is NaN, Inf or too large"):
            ggml.quantize(torch.full((1, 32), bad), "q4_0", name="q_proj")

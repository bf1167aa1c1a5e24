import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinlora.errors import ConfigError, ModelError
from twinlora.numerics import nf4, ops
from twinlora.numerics.formats import NF4Format

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_codebook_is_the_published_one():
    assert nf4.codebook().tolist() == PUBLISHED


def test_nearest_level_and_lower_code_on_a_tie():
    levels = nf4.codebook()
    borders = nf4.midpoints(levels)
    weight = torch.cat(
        [levels, borders, torch.nextafter(borders, torch.tensor(2.0)), torch.zeros(2), levels[:1].expand(16)]
    )
    packed = ops.quantize(weight, NF4Format(64, 0)).packed
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    assert codes[:16].tolist() == list(range(16))
    assert codes[16:31].tolist() == list(range(15))
    assert codes[31:46].tolist() == list(range(1, 16))


def test_measured_bits_per_weight():
    quantized = ops.quantize(torch.randn(4096, 4096))
    assert round(8 * quantized.nbytes / 4096**2, 3) == 4.127
    assert quantized.nbytes == NF4Format().stored_bytes(4096**2)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from(nf4.BLOCK_SIZES),
    nested=st.sampled_from([0, 32, 256]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
)
def test_error_is_within_half_a_level(shape, dtype, block, nested, scale):
    weight = (torch.randn(shape) * scale).to(dtype)
    quantized = ops.quantize(weight, NF4Format(block, nested))
    assert quantized.nbytes == NF4Format(block, nested).stored_bytes(weight.numel())
    back = quantized.dequantize(torch.float32)
    assert back.shape == weight.shape
    gap = (nf4.codebook().diff().max() / 2).item()
    flat = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % block)).view(-1, block)
    bound = flat.abs().amax(1, keepdim=True) * (gap + 1e-6)
    error = (
        torch.nn.functional.pad((back - weight.float()).flatten(), (0, -weight.numel() % block)).view(-1, block).abs()
    )
    if not nested:
        assert bool((error <= bound).all())
    else:  # a nested scale is off by at most half a step of the 8-bit map
        spread = bound.amax() - bound.amin()
        assert bool((error <= bound + 0.05 * spread + 1e-6 * bound.amax()).all())


def test_all_zero_blocks_stay_zero():
    for nested in (0, 256):
        assert not ops.quantize(torch.zeros(3, 65), NF4Format(64, nested)).dequantize().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_weight_is_an_error_that_names_the_tensor(bad):
    weight = torch.randn(8, 64)
    weight[3, 5] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.q_proj\.weight: 1 of 512"):
        ops.quantize(weight, name="layers.3.q_proj.weight")


def test_wrong_block_size():
    with pytest.raises(ConfigError, match="block size 48"):
        NF4Format(48)

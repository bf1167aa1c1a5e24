"""int8 and NF3 against brute force: every weight's nearest value, code by code, and bits where formats.py says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinlora.errors import ConfigError, ModelError
from twinlora.numerics import nf4, ops
from twinlora.numerics.formats import Format, Int8Format, NF3Format, NF4Format, parse

# Intel Neural Compressor's NF3_MAPPING: another derivation, the same digits.
PUBLISHED_NF3 = [
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0, 0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
]  # fmt: skip
FORMATS = [NF3Format(), NF3Format(32, 0), NF4Format(), Int8Format(), Int8Format(128, 256)]


def blocks_of(flat: torch.Tensor, block: int) -> list[torch.Tensor]:
    return list(flat.split(block))


def nearest(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The nearest of all values that a block's scale allows, by trying each of them."""
    levels = torch.arange(-127, 128) / 127 if fmt.kind == "int8" else nf4.codebook(fmt.bits)
    out = []
    for block in blocks_of(weight.float().flatten(), fmt.block_size):
        choices = levels * block.abs().max()
        out.append(choices[(block[:, None] - choices).abs().argmin(1)])
    return torch.cat(out).view(weight.shape)


def test_nf3_codebook_is_the_published_one():
    assert nf4.codebook(3).tolist() == pytest.approx(PUBLISHED_NF3, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=2),
    fmt=st.sampled_from([NF3Format(32, 0), NF3Format(64, 0), NF4Format(64, 0), Int8Format(), Int8Format(32)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_weight_becomes_the_nearest_value(shape, fmt, dtype):
    weight = torch.randn(shape).to(dtype)
    quantized = ops.quantize(weight, fmt)
    assert quantized.nbytes == fmt.stored_bytes(weight.numel())
    assert quantized.packed.nbytes == fmt.packed_bytes(weight.numel())
    found, best = quantized.dequantize(torch.float32), nearest(weight, fmt)
    assert found.shape == weight.shape
    distance = [(w - weight.float()).abs() for w in (found, best)]
    assert bool((distance[0] <= distance[1] + 1e-6 * weight.abs().max()).all())


def test_nf3_codes_lie_where_the_format_says():
    codes = torch.randint(0, 8, (5, 8))
    codes[:, 0] = 7  # each block's maximum is 1
    weight = nf4.codebook(3)[codes].repeat(1, 8)  # rows of 64
    packed = ops.quantize(weight, NF3Format(64, 0)).packed.view(5, 8, 3)
    for row in range(5):
        for part in range(8):
            number = int.from_bytes(bytes(packed[row, part].tolist()), "little")
            assert [(number >> 3 * i) & 7 for i in range(8)] == codes[row].tolist()


def test_int8_codes_are_whole_steps():
    weight = torch.arange(-127, 128).float()[None].repeat(2, 1)
    quantized = ops.quantize(weight, Int8Format(4096))
    assert quantized.packed.dtype == torch.int8
    assert quantized.packed.tolist() == weight.flatten().int().tolist()
    assert torch.equal(quantized.dequantize(torch.float32), weight)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_products_and_their_gradient_are_those_of_the_dequantised_weight(fmt):
    quantized = ops.quantize(torch.randn(40, 96), fmt)
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = torch.randn(2, 7, 96, dtype=dtype, requires_grad=True), torch.randn(2, 7, 40, dtype=dtype)
        weight = quantized.dequantize(dtype)
        y = x @ weight.T
        torch.testing.assert_close(ops.linear(x, quantized), y)
        (dx,) = torch.autograd.grad(ops.linear(x, quantized), x, dy)
        torch.testing.assert_close(dx, dy @ weight)
        torch.testing.assert_close(ops.linear_transposed(dy, quantized), dy @ weight)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_nothing_becomes_something_and_damage_shows(fmt):
    assert not ops.quantize(torch.zeros(3, 65), fmt).dequantize().any()
    weight = torch.randn(4, 64)
    weight[1, 3] = float("nan")
    with pytest.raises(ModelError, match=r"q_proj\.weight: 1 of 256 values are NaN or Inf"):
        ops.quantize(weight, fmt, name="q_proj.weight")


@pytest.mark.parametrize("fmt, bits", [(NF3Format(), 3.127), (NF4Format(), 4.127), (Int8Format(), 8.5)])
def test_bits_per_weight(fmt, bits):
    quantized = ops.quantize(torch.randn(1024, 1024), fmt)
    assert round(8 * quantized.nbytes / 1024**2, 3) == bits
    assert quantized.nbytes == fmt.stored_bytes(1024**2)


def test_names_are_read_back():
    for fmt in FORMATS:
        assert parse(fmt.name) == fmt
        assert type(parse(fmt.name)) is type(fmt)
    assert [fmt.name for fmt in FORMATS[:4:3]] == ["nf3-64-dq256", "int8-64"]
    with pytest.raises(ConfigError, match=r"format 'nf5-64': expected a name such as nf4-64-dq256"):
        parse("nf5-64")
    with pytest.raises(ConfigError, match="int8 block size 48: expected one of 32, 64"):
        parse("int8-48")

"""Against bitsandbytes' own CPU code: the same codes, scales and dequantised bits."""

import pytest
import torch

from twinlora.numerics import nf4, ops
from twinlora.numerics.formats import NF4Format

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(autouse=True)
def _uncompiled():
    """It hands odd shapes to torch.compile, which takes 20 seconds for the first one."""
    with torch.compiler.set_stance("force_eager"):
        yield


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_maps_are_equal():
    assert torch.equal(nf4.codebook(), functional.get_4bit_type("nf4", device="cpu").float())
    assert torch.equal(nf4.dynamic_map(), functional.create_dynamic_map().float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 256), (63, 65), (7, 3)])
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_codes_scales_and_dequantised_weights_are_equal(dtype, shape, block):
    weight = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=block, compress_statistics=False)
    ours = ops.quantize(weight, NF4Format(block, 0))
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_its_double_quantised_state(dtype):
    weight = torch.randn(96, 320).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    read = ops.QuantTensor(
        packed.flatten(), state.absmax, state.state2.absmax, state.offset, (96, 320), NF4Format(64, 256)
    )
    assert torch.equal(read.dequantize(dtype), functional.dequantize_4bit(packed, state))

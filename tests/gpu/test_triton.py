"""The kernels on a device, at real shapes, against the reference on the same device."""

import pytest
import torch

from twinlora.numerics import ops, reference, triton
from twinlora.numerics.formats import Int8Format, NF3Format, NF4Format
from twinlora.numerics.workspace import workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device and a CUDA build of torch"),
    pytest.mark.skipif(not triton.available(), reason="triton is not installed: pip install 'twinlora[gpu]'"),
]
DEVICE = torch.device("cuda")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(4096, 4096), (1024, 4096), (4096, 14336), (577, 2048), (7, 96), (3, 33), (1, 1), (5, 4097)]


def quantized(shape, fmt=None, dtype=torch.bfloat16):
    return ops.quantize((torch.randn(shape, device=DEVICE) * 0.02).to(dtype), fmt or NF4Format())


def no_worse(found, naive, truth):
    """In 16 bit what is rounded decides; in float32 the order of the sum, in which another one may have luck."""
    factor = 3 if found.dtype == torch.float32 else 1.1
    return (found.double() - truth).norm() <= factor * (naive.double() - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("dtype", TYPES)
def test_codes_have_the_reference_bits(shape, block, dtype):
    w = torch.randn(shape, device=DEVICE) * torch.rand(shape, device=DEVICE).mul(8).exp()
    w.view(-1)[: min(64, w.numel() // 3)] = 0
    w = w.to(dtype)
    q = ops.quantize(w, NF4Format(block, 256))
    packed, scales = reference.nf4_quantize(w, block)
    assert torch.equal(q.packed, packed)
    for found, wanted in zip(
        (q.scales, q.nested_scales, q.nested_offset), reference.scales_quantize(scales, 256), strict=True
    ):
        assert torch.equal(found, wanted)
    for out in TYPES:
        assert torch.equal(q.dequantize(out), reference.nf4_dequantize(*q.arguments, out))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [Int8Format(64), NF3Format(64, 256)], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", TYPES)
def test_other_formats_have_the_reference_bits(shape, form, dtype):
    w = torch.randn(shape, device=DEVICE).to(dtype)
    q = ops.quantize(w, form)
    for out in TYPES:
        assert torch.equal(q.dequantize(out), reference.blockwise_dequantize(*q.arguments, out))


@pytest.mark.parametrize("rows", [5, 2048])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (577, 2048), (130, 33)])
@pytest.mark.parametrize("form", [Int8Format(64), NF3Format(64, 256)], ids=lambda form: form.name)
def test_products_of_other_formats(rows, shape, form):
    q = ops.quantize(torch.randn(shape, device=DEVICE).bfloat16(), form)
    x, dy = (torch.randn(rows, n, device=DEVICE).bfloat16() for n in shape[::-1])
    w = q.dequantize(torch.float32).double()
    for name, given, truth in (
        ("blockwise_linear", x, x.double() @ w.T),
        ("blockwise_linear_transposed", dy, dy.double() @ w),
    ):
        naive = getattr(reference, name)(given, *q.arguments)
        assert no_worse(getattr(torch.ops.twinlora, name)(given, *q.arguments), naive, truth)


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64, 65, 2048])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1024, 14336), (577, 2048), (130, 33)])
@pytest.mark.parametrize("dtype", TYPES)
def test_products_are_as_exact_as_the_naive_ones(rows, shape, dtype):
    q = quantized(shape)
    x, dy = (torch.randn(rows, n, device=DEVICE).to(dtype) for n in shape[::-1])
    w = q.dequantize(torch.float32).double()
    for name, given, truth in (
        ("nf4_linear", x, x.double() @ w.T),
        ("nf4_linear_transposed", dy, dy.double() @ w),
    ):
        naive = getattr(reference, name)(given, *q.arguments)
        found = getattr(torch.ops.twinlora, name)(given, *q.arguments)
        assert no_worse(found, naive, truth)
        onto = torch.randn_like(found)
        naive, truth = onto + naive, onto.double() + truth
        getattr(torch.ops.twinlora, name + "_add_")(onto, given, *q.arguments)
        assert no_worse(onto, naive, truth)
    extra = torch.randn(16, shape[1], device=DEVICE).to(dtype)
    both = torch.ops.twinlora.nf4_linear_with(x, extra, *q.arguments)
    torch.testing.assert_close(
        both[:, shape[0] :], x @ extra.T, rtol=2e-2, atol=0.5 if dtype != torch.float32 else 1e-2
    )


@pytest.mark.parametrize("case", [((16,) * 32, list(range(33))), ((8, 64, 33), [0, 1, 700, 705]), ((256,), [0, 9])])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_grouped_lora(case, transposed, dtype):
    (ranks, starts), k, n = case, 4096, 1024
    a = [torch.randn(r, k, device=DEVICE).to(dtype) / 64 for r in ranks]
    b = [
        (torch.randn(r, n, device=DEVICE).T if transposed else torch.randn(n, r, device=DEVICE)).to(dtype)
        for r in ranks
    ]
    x, y = torch.randn(starts[-1], k, device=DEVICE).to(dtype), torch.randn(starts[-1], n, device=DEVICE).to(dtype)
    arguments = ([0.5 + i / 8 for i in range(len(ranks))], starts)
    truth, naive = y.double(), y.clone()
    reference.grouped_lora_(truth, x.double(), a, b, *arguments)
    reference.grouped_lora_(naive, x, a, b, *arguments)
    torch.ops.twinlora.grouped_lora_(y, x, a, b, *arguments)
    assert no_worse(y, naive, truth)


def test_results_repeat():
    q, x = quantized((4096, 4096)), torch.randn(3, 4096, device=DEVICE).bfloat16()
    assert torch.equal(ops.linear(x, q), ops.linear(x, q))


@pytest.mark.parametrize("rows", [4, 2048])
def test_nothing_but_the_output_and_the_workspace_is_allocated(rows):
    q, x = quantized((14336, 4096)), torch.randn(rows, 4096, device=DEVICE).bfloat16()
    ops.linear(x, q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = ops.linear(x, q)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 512
    assert workspace("nf4_linear", x, *q.arguments, target="cuda").total <= 100 << 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    q = ops.quantize(torch.randn(64, 128, device="cuda:1"))
    x = torch.randn(3, 128, device="cuda:1")
    torch.testing.assert_close(ops.linear(x, q), x @ q.dequantize(torch.float32).T)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_the_adapter_rides_in_the_products(kind):
    """A layer group on the device against the same on the CPU, in float32."""
    from torch import nn

    from twinlora.adapters.lora import LoraLinear
    from twinlora.adapters.targets import LayerConfig
    from twinlora.model.linear import QuantLinear, as_frozen, project

    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        made = []
        for n in (256, 64, 64):
            linear = nn.Linear(256, n, bias=False).requires_grad_(False)
            base = (
                QuantLinear.from_dense(linear, linear.weight, NF4Format(), "w") if kind == "nf4" else as_frozen(linear)
            )
            layer = LoraLinear(base, LayerConfig(rank=8, scale=2.0))
            nn.init.normal_(layer.lora_B, std=0.1)
            made.append(layer.to(device))
        x = torch.randn(100, 256).to(device).requires_grad_(True)
        ys = project(x, *made)
        wanted = [x, *(p for layer in made for p in (layer.lora_A, layer.lora_B))]
        gradients = torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys])
        found.append([t.detach().cpu() for t in (*ys, *gradients)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)

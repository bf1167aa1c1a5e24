import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from twinlora.numerics import cpu, ops
from twinlora.numerics.formats import Int8Format, NF3Format, NF4Format
from twinlora.numerics.loss import linear_cross_entropy


@pytest.mark.parametrize("shape", [(8, 64), (5, 33)])
@pytest.mark.parametrize("nested", [0, 32])
def test_opcheck(shape, nested):
    weight = torch.randn(shape)
    quantized = ops.quantize(weight, NF4Format(32, nested))
    library = torch.ops.twinlora
    opcheck(library.nf4_quantize.default, (weight, 32))
    opcheck(library.scales_quantize.default, (torch.rand(70), 32))
    opcheck(library.nf4_dequantize.default, (*quantized.arguments, torch.float32))
    x = torch.randn(3, shape[1], requires_grad=True)
    opcheck(library.nf4_linear.default, (x, *quantized.arguments))
    plain = x.detach()
    opcheck(library.nf4_linears.default, (plain, quantized.tensors * 2, [shape[0]] * 2, 32, nested))
    opcheck(library.dense_linears.default, (plain, [weight, torch.randn(2, shape[1])]))
    opcheck(library.nf4_linear_transposed.default, (torch.randn(3, shape[0]), *quantized.arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_its_gradient_are_those_of_the_dequantised_weight(dtype):
    quantized = ops.quantize(torch.randn(48, 96))
    x = torch.randn(2, 7, 96, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 7, 48, dtype=dtype)
    (dx,) = torch.autograd.grad(ops.linear(x, quantized), x, dy)
    weight = quantized.dequantize(dtype)
    y = torch.nn.functional.linear(x, weight)
    assert torch.equal(ops.linear(x, quantized), y)
    assert torch.equal(dx, torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("fmt", [Int8Format(32), NF3Format(32, 32)], ids=lambda fmt: fmt.name)
def test_opcheck_of_the_other_formats(fmt):
    weight = torch.randn(5, 33)
    quantized = ops.quantize(weight, fmt)
    library = torch.ops.twinlora
    opcheck(library.blockwise_quantize.default, (weight, fmt.bits, 32))
    opcheck(library.blockwise_dequantize.default, (*quantized.arguments, torch.bfloat16))
    x = torch.randn(3, 33, requires_grad=True)
    opcheck(library.blockwise_linear.default, (x, *quantized.arguments))
    opcheck(library.blockwise_linear_transposed.default, (torch.randn(3, 5), *quantized.arguments))


def test_backend_is_named():
    assert ops.backend("cpu") == f"cpu ({cpu.path() if cpu.paths() else 'reference'})"


class Seen(TorchDispatchMode):
    """The names of ops of ours."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "twinlora":
            self.names.append(func._schema.name.removeprefix("twinlora::"))
        return func(*args, **(kwargs or {}))


def _attention_step(q, kv, tables, cache):
    cache = cache.clone()
    out = ops.attention_step(q, kv, kv, (tables, tables), cache[0], cache[1], [2, 0], [5, 3], 0.1)
    return out, cache


_quantized = ops.quantize(torch.randn(48, 64))
CALLS = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5, 0.0, False), [(1, 3, 64), (64,)]),
    "swiglu": (ops.swiglu, [(1, 3, 64), (1, 3, 64)]),
    "dense_linears": (lambda x, w: ops.dense_linears(x, [w, w]), [(1, 3, 64), (48, 64)]),
    "nf4_linear": (lambda x: ops.linear(x, _quantized), [(1, 3, 64)]),
    "nf4_linears": (lambda x: ops.linears(x, [_quantized, _quantized]), [(1, 3, 64)]),
    "attention_step": (_attention_step, [(2, 4, 32), (2, 2, 32), (2, 32), (2, 3, 2, 8, 32)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_are_called_themselves_unless_a_mode_watches(name, monkeypatch):
    call, shapes = CALLS[name]
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    with torch.inference_mode():
        with Seen() as seen:
            dispatched = call(*inputs)
        assert seen.names == [name]
        if cpu.paths():
            monkeypatch.setattr(torch.ops, "twinlora", None)
        direct = call(*inputs)
    pairs = zip(direct, dispatched, strict=True) if isinstance(direct, tuple) else [(direct, dispatched)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "dense_linears", "attention_step"])
def test_fake_tensors_go_through_the_dispatcher(name):
    call, shapes = CALLS[name]
    with torch.no_grad(), FakeTensorMode():
        fakes = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    with torch.no_grad():  # the mode itself is not on
        out = call(*fakes)
    assert all(isinstance(x, FakeTensor) for x in (out if isinstance(out, tuple) else (out,)))


def test_whoever_wants_gradients_goes_through_the_dispatcher():
    x = torch.randn(3, 64, requires_grad=True)
    with Seen() as seen:
        ops.linear(x, _quantized)
    assert seen.names == ["nf4_linear"]
    assert ops.linear(x, _quantized).requires_grad


@pytest.mark.parametrize("rows", [1, 37, 300])
@pytest.mark.parametrize("train_head", [False, True])
def test_linear_cross_entropy(rows, train_head, monkeypatch):
    monkeypatch.setattr("twinlora.numerics.loss._CHUNK_ELEMENTS", {"cpu": 4096})  # many chunks
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(99, 16, requires_grad=train_head)
    labels = torch.randint(0, 99, (rows,))
    inputs = (hidden, weight) if train_head else (hidden,)
    found = linear_cross_entropy(hidden, weight, labels)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found * 3, inputs), torch.autograd.grad(expected * 3, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_linear_cross_entropy_survives_large_logits():
    hidden = torch.full((2, 4), 100.0)
    assert torch.isfinite(linear_cross_entropy(hidden, torch.eye(4) * 100, torch.tensor([0, 3])))

"""Norm, SwiGLU and loss: the reference against PyTorch's own, the kernels against float64 and the reference."""

import pytest
import torch
from torch.nn import functional as F

from twinlora.model.blocks import RMSNorm, SwiGLU
from twinlora.numerics import cpu, elementwise, ops  # noqa: F401  (ops declares them)

twin = torch.ops.twinlora
kernels = pytest.mark.skipif("avx512-bf16" not in cpu.paths(), reason="this machine has no kernels for blocks")


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


@kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [576, 70, 16, 1])
@pytest.mark.parametrize(("offset", "wide"), [(0.0, False), (1.0, True)])
def test_norm_kernel(threads, width, offset, wide):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, dy, w = torch.randn(3, 31, width).bfloat16(), torch.randn(3, 31, width).bfloat16(), torch.randn(width).bfloat16()
    found, rstd = cpu.rms_norm(x, w, 1e-5, offset, wide)
    naive, naive_rstd = elementwise.rms_norm(x, w, 1e-5, offset, wide)
    truth, true_rstd = elementwise.rms_norm(x.double(), w.double(), 1e-5, offset, wide)
    assert relative(found, truth) <= 1.01 * relative(naive, truth)
    torch.testing.assert_close(rstd, naive_rstd)
    dx = cpu.rms_norm_backward(dy, x, w, rstd, offset)
    naive_dx = elementwise.rms_norm_backward(dy, x, w, rstd, offset)
    truth = elementwise.rms_norm_backward(dy.double(), x.double(), w.double(), true_rstd, offset)
    if width > 1:
        assert relative(dx, truth) <= 1.01 * relative(naive_dx, truth)
    torch.set_num_threads(before)


@kernels
@pytest.mark.parametrize("shape", [(7, 1536), (1, 1), (33, 37)])
def test_swiglu_kernel(shape):
    gate, up, dy = (8 * torch.randn(shape).bfloat16() for _ in range(3))
    if gate.numel() > 1:
        gate.view(-1)[0] = -200.0  # the exponential overflows
    wide = [x.double() for x in (gate, up, dy)]
    bound = 1.05 * torch.finfo(torch.bfloat16).eps / 2
    assert relative(cpu.swiglu(gate, up), elementwise.swiglu(*wide[:2])) <= bound
    expected = elementwise.swiglu_backward(wide[2], *wide[:2])
    for found, truth in zip(cpu.swiglu_backward(dy, gate, up), expected, strict=True):
        assert relative(found, truth) <= bound


@kernels
@pytest.mark.parametrize("width", [49152, 77, 5])
def test_cross_entropy_kernel(width):
    logits, labels = 5 * torch.randn(9, width).bfloat16(), torch.randint(0, width, (9,))
    found, truth = logits.clone(), logits.double()
    losses = cpu.cross_entropy_(found, labels)
    expected = F.cross_entropy(truth.requires_grad_(), labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach().float())
    (gradient,) = torch.autograd.grad(expected.sum(), truth)
    assert relative(found, gradient) <= torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declared_as_they_behave(dtype):
    x, dy = torch.randn(4, 6, 48).to(dtype), torch.randn(4, 6, 48).to(dtype)
    w, rstd = torch.randn(48).to(dtype), torch.rand(4, 6)
    calls = [
        (twin.rms_norm, (x, w, 1e-5, 0.0, False)),
        (twin.rms_norm_backward, (dy, x, w, rstd, 0.0)),
        (twin.swiglu, (x, dy)),
        (twin.swiglu_backward, (dy, x, x)),
        (twin.cross_entropy_, (x[0].clone(), torch.randint(0, 48, (6,)))),
    ]
    checks = ("test_schema", "test_faketensor")
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_norm_trains_its_weight():
    norm, x = RMSNorm(torch.nn.Parameter(torch.rand(32)), 1e-6), torch.randn(5, 32, requires_grad=True)
    expected = F.rms_norm(x, (32,), norm.weight, 1e-6)
    dy = torch.randn(5, 32)
    found = torch.autograd.grad(norm(x), (x, norm.weight), dy)
    for a, b in zip(found, torch.autograd.grad(expected, (x, norm.weight), dy), strict=True):
        torch.testing.assert_close(a, b)


def test_gated_mlp_keeps_gate_and_up_only():
    """What down_proj saves of its input is computed again, with the same gradients."""
    torch.manual_seed(0)
    gate, up, down = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
    x, inputs = torch.randn(15, 16, requires_grad=True), []
    down.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    y = SwiGLU(gate, up, down)(x)
    assert y.grad_fn._saved_mat1.data_ptr() != inputs[0].data_ptr()
    expected = down(F.silu(gate(x)) * up(x))
    parameters = [x, *gate.parameters(), *up.parameters(), *down.parameters()]
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, parameters, dy)
    for a, b in zip(found, torch.autograd.grad(expected, parameters, dy), strict=True):
        torch.testing.assert_close(a, b)

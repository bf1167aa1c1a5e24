"""The CUDA backend without a device: its Triton kernels by Triton's interpreter, flash attention by a stand-in.

The interpreter cuts bfloat16 off where the device rounds, so that a result may be a whole unit in its last place away.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics.test_attention import plain, relative, starts
from twinlora.numerics import attention as reference
from twinlora.numerics import cuda, elementwise, ops  # noqa: F401  (ops declares them)

pytest.importorskip("triton", reason="the kernels need Triton (pip install triton)")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here: tests/gpu runs the kernels on it")

TYPES = [torch.float32, torch.bfloat16]


def bound(dtype):
    return 2e-6 if dtype == torch.float32 else torch.finfo(torch.bfloat16).eps


def rotation(tokens, size, dtype):
    angle = torch.rand(tokens, size // 2).repeat(1, 2) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "size"), [(3, 64), (1, 6), (40, 160)])
@pytest.mark.parametrize("back", [False, True])
def test_rotation(dtype, heads, size, back):
    x, (cos, sin) = torch.randn(5, 2 * heads, size).to(dtype)[:, :heads], rotation(5, size, dtype)
    found = cuda._kernels().rotate(x, cos, sin, back=back)
    assert relative(found, reference.rotate(*(t.double() for t in (x, cos, sin)), back=back)) < bound(dtype)
    whole = x.contiguous()
    assert torch.equal(cuda._rotate(whole, cos, sin, back=back), found)
    assert torch.equal(whole, found) == back  # going back needs no second tensor


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [576, 70, 16, 1, 5000])
@pytest.mark.parametrize(("offset", "wide"), [(0.0, False), (1.0, True), (1.0, False)])
def test_norm(dtype, width, offset, wide):
    x, dy, w = torch.randn(3, 7, width).to(dtype), torch.randn(3, 7, width).to(dtype), torch.randn(width).to(dtype)
    y, rstd = cuda.rms_norm(x, w, 1e-5, offset, wide)
    truth, true_rstd = elementwise.rms_norm(x.double(), w.double(), 1e-5, offset, wide)
    assert relative(y, truth) < (2 if dtype == torch.bfloat16 and not wide else 1) * bound(dtype)
    torch.testing.assert_close(rstd, true_rstd.float())
    dx = cuda.rms_norm_backward(dy, x, w, rstd, offset)
    truth = elementwise.rms_norm_backward(dy.double(), x.double(), w.double(), true_rstd, offset)
    if width > 1:  # else nothing reaches x
        assert relative(dx, truth) < 2 * bound(dtype)


@pytest.mark.parametrize("wide", [False, True])
def test_the_norm_rounds_where_it_is_told_to(wide):
    """Only with weights far from 1 do the two ways differ; values are exact in float32, whatever the interpreter cuts."""
    x, w = torch.randn(4, 64).bfloat16(), torch.full((64,), 1.5).bfloat16()
    rstd = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5)
    normal = x.float() * rstd
    if not wide:  # as the interpreter casts: the lower half of the word is cut off
        normal = (normal.view(torch.int32) & -65536).view(torch.float32)
    expected = ((normal * 1.5).view(torch.int32) & -65536).view(torch.float32)
    torch.testing.assert_close(cuda.rms_norm(x, w, 1e-5, 0.0, wide)[0].float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(7, 1536), (1, 1), (3, 37), (2, 3, 2100)])
def test_swiglu(dtype, shape):
    gate_up, dy = 8 * torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)  # rows lie apart, as in one product for both
    if gate.numel() > 1:
        gate[(0,) * gate.dim()] = -200.0  # the exponential overflows
    wide = [x.double() for x in (gate, up, dy)]
    assert relative(cuda.swiglu(gate, up), elementwise.swiglu(*wide[:2])) < bound(dtype)
    expected = elementwise.swiglu_backward(wide[2], *wide[:2])
    for found, truth in zip(cuda.swiglu_backward(dy, gate, up), expected, strict=True):
        assert found.isfinite().all()
        assert relative(found, truth) < bound(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [9000, 77, 5])
def test_cross_entropy(dtype, width):
    logits, labels = (5 * torch.randn(4, width)).to(dtype), torch.randint(0, width, (4,))
    logits[0] += 300.0  # exponentials without their maximum would overflow
    found, wide = logits.clone(), logits.double()
    losses = cuda.cross_entropy_(found, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, elementwise.cross_entropy_(wide, labels))
    assert relative(found, wide) < 4 * bound(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "size"), [((6, 2), 64), ((5, 1), 24), ((2, 2), 32)])
@pytest.mark.parametrize("window", [0, 5, 100])
def test_decoding_step(dtype, heads, size, window):
    """Lengths from nothing to more than one program's share of keys."""
    q, k, v = (torch.randn(3, h, size).to(dtype) for h in (heads[0], heads[1], heads[1]))
    keys, values = torch.randn(2, 5, heads[1], 700, size).to(dtype)
    rows, lengths, turn = [4, 0, 2], [650, 0, 33], rotation(3, size, dtype)
    runs = []
    for module, cast in ((cuda, dtype), (reference, torch.float64)):
        caches = [x.to(cast, copy=True) for x in (keys, values)]
        inputs = [x.to(cast) for x in (q, k, v, *turn)]
        runs.append((module.attention_step(*inputs, *caches, rows, lengths, 0.125, window), *caches))
    for found, truth in zip(*runs, strict=True):
        assert relative(found, truth) < 3 * bound(dtype)


def flash_forward(
    q, k, v, bounds, _, longest, __, dropout, causal, debug, *, scale, window_size_left, window_size_right
):
    """What torch documents of its kernel, in float64: the log-sums are [H, T], windows count keys beside the query."""
    lengths = bounds.diff().tolist()
    assert bounds.dtype == torch.int32
    assert longest == max(lengths)
    assert dropout == 0.0
    assert not debug
    assert causal == (window_size_left < 0)
    assert window_size_right == 0
    window = None if causal else window_size_left + 1
    out = plain(*(x.double() for x in (q, k, v)), lengths, scale, window)
    return out.to(q.dtype), scores(q, k, lengths, scale, window).t().contiguous(), None, None, None


def flash_backward(dout, q, k, v, out, lse, bounds, _, longest, __, dropout, causal, ___, ____, **how):
    assert lse.shape == (q.shape[1], q.shape[0])
    window = 0 if causal else how["window_size_left"] + 1
    wide, ends = [x.double() for x in (q, k, v)], bounds.tolist()
    exact = reference.attention(*wide, None, None, ends, how["scale"], window)
    found = reference.attention_backward(dout.double(), *wide, None, None, *exact, ends, how["scale"], window)
    return tuple(g.to(q.dtype) for g in found)


def scores(q, k, lengths, scale, window):
    """Log-sum of exponentials, float32 [T, H]."""
    ends = starts(lengths)
    return reference.attention(q.double(), k.double(), k.double(), None, None, ends, scale, window or 0)[1]


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)


@pytest.mark.parametrize("lengths", [[1], [5, 9, 1, 7]])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("rotated", [False, True])
def test_attention_around_flash(flash, lengths, window, rotated):
    """Rotation and its way back, windows, and the layout of the log-sums; the kernel itself is torch's."""
    tokens, ends = sum(lengths), starts(lengths)
    q, k, v, dout = (torch.randn(tokens, h, 16).bfloat16() for h in (6, 2, 2, 6))
    turn = rotation(tokens, 16, torch.bfloat16) if rotated else (None, None)
    wide = [None if x is None else x.double() for x in (q, k, v, *turn)]
    runs = []
    for module, inputs, dy in ((cuda, (q, k, v, *turn), dout), (reference, wide, dout.double())):
        out, lse = module.attention(*inputs, ends, 0.25, window)
        runs.append((out, lse, *module.attention_backward(dy, *inputs, out, lse, ends, 0.25, window)))
    assert runs[0][1].shape == (tokens, 6)
    assert runs[0][1].is_contiguous()
    for found, truth in zip(*runs, strict=True):
        if truth.norm() > 1e-6:
            assert relative(found, truth) < 4 * bound(torch.bfloat16)


def test_the_installed_torch_has_these_kernels():
    """The call of the wrapper fits the schema, on fake tensors: shapes and types come from torch's own registration."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(12, h, 64, dtype=torch.bfloat16) for h in (6, 2, 2))
        arguments = (q, k, v, None, None)
        cuda._bounds.cache_clear()
        out, lse = cuda.attention(*arguments, [0, 5, 12], 0.125, 0)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (12, 6), torch.float32)
        found = cuda.attention_backward(torch.empty_like(q), *arguments, out, lse, [0, 5, 12], 0.125, 3)
        assert [g.shape for g in found] == [q.shape, k.shape, v.shape]
    cuda._bounds.cache_clear()


@pytest.mark.parametrize("q", [torch.empty(3, 2, 64), torch.empty(3, 2, 12).half(), torch.empty(3, 2, 200).half()])
def test_what_flash_lacks_is_the_references(q, monkeypatch):
    monkeypatch.delattr(torch.ops.aten, "_flash_attention_forward", raising=False)
    assert not cuda._flash_takes(q)
    q = torch.randn(q.shape).to(q.dtype)
    assert torch.equal(
        cuda.attention(q, q, q, None, None, [0, 3], 0.1, 0)[0],
        reference.attention(q, q, q, None, None, [0, 3], 0.1, 0)[0],
    )


def test_without_triton_all_is_the_references(monkeypatch):
    monkeypatch.setattr(cuda, "_kernels", lambda: None)
    x = torch.randn(3, 8)
    assert torch.equal(cuda.rms_norm(x, x[0], 1e-5, 0.0, False)[0], elementwise.rms_norm(x, x[0], 1e-5, 0.0, False)[0])
    assert cuda.path() == "reference"


class OnTheseKernels(TorchDispatchMode):
    """Sends the ops of the CUDA backend there, whatever device their tensors are on."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        if space != "twinlora" or name not in cuda.OPS:
            return func(*args, **(kwargs or {}))
        self.names.add(name)
        return getattr(cuda, name)(*args)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_and_decoding_on_these_kernels(flash, monkeypatch, method):
    """Their parts fit together: some steps of a small llama follow those of the CPU, and so does an answer."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_models

    from twinlora.model.generate import generate

    config, device, curves, answers = gpu_models.shape("tiny"), torch.device("cpu"), [], []
    config.num_hidden_layers = 1
    for mode in (OnTheseKernels(), None):
        made = gpu_models.ours(config, method, device)
        made.recompute(True)
        with mode or contextlib.nullcontext():
            part = gpu_models.batch(config, 2, 12, device)
            curves.append([float(made.step(part)) for _ in range(3)])
            made.recompute(False)
            made.model.eval()
            answers.append(generate(made.model, [[1, 2, 3], [4]], max_new_tokens=4, stop=set()))
        if mode:
            assert mode.names == set(cuda.OPS)
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.01
    assert answers[0] == answers[1]


def test_the_kernels_compile_for_hopper():
    """To machine code, by Triton's own compiler, which needs no device: 16-byte loads, no spills, room on any device."""
    script = Path(__file__).with_name("ptx.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }
    done = subprocess.run([sys.executable, script, "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10
    for name, result in found.items():
        assert result["cubin"] > 0, name
        assert result["spills"] == 0, name
        assert result["wide"] >= 2, name
        assert result["shared"] <= 99 << 10, name  # bytes, the least of all devices from Ampere on
    assert found["_decode_kernel"]["tensor_cores"] > 0

"""Attention of packed sequences: the reference against the paper, the kernels against float64 and the reference."""

import itertools

import pytest
import torch

from twinlora.numerics import attention as reference
from twinlora.numerics import cpu, ops


def starts(lengths):
    return [0, *itertools.accumulate(lengths)]


def plain(q, k, v, lengths, scale, window):
    """Attention of each sequence alone, written as in the paper."""
    out, start = [], 0
    for n in lengths:
        a, b, c = (t[start : start + n].transpose(0, 1) for t in (q, k, v))
        b, c = (t.repeat_interleave(a.shape[0] // b.shape[0], 0) for t in (b, c))
        i = torch.arange(n)
        seen = (i[None] <= i[:, None]) & (True if window is None else i[None] > i[:, None] - window)
        scores = (a @ b.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        out.append((scores.softmax(-1) @ c).transpose(0, 1))
        start += n
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [[1], [5, 9, 1, 7], [40, 3, 41, 39, 2], [600, 3, 300, 299]])
@pytest.mark.parametrize("window", [None, 4, 270])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_forward_and_gradients(lengths, window, heads):
    tokens = sum(lengths)
    shapes = [(tokens, heads[0], 8), (tokens, heads[1], 8), (tokens, heads[1], 8)]
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    dy = torch.randn(shapes[0], dtype=torch.float64)
    found = ops.attention(q, k, v, starts(lengths), 0.3, window)
    expected = plain(q, k, v, lengths, 0.3, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_error_in_bfloat16_is_no_worse_than_the_naive_one():
    lengths = [70, 64, 200]
    q, k, v = (torch.randn(sum(lengths), h, 64) for h in (6, 2, 2))
    truth = plain(q, k, v, lengths, 0.125, None)
    small = [t.bfloat16() for t in (q, k, v)]
    naive = (plain(*small, lengths, 0.125, None).float() - truth).norm()
    assert (ops.attention(*small, starts(lengths), 0.125).float() - truth).norm() <= naive * 1.05


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.skipif("avx512-bf16" not in cpu.paths(), reason="this machine has no kernels for attention")
@pytest.mark.parametrize("lengths", [[1], [31, 1, 33], [300, 1, 257, 600]])
@pytest.mark.parametrize(("heads", "size"), [((3, 1), 64), ((4, 4), 32), ((2, 1), 96)])
@pytest.mark.parametrize("window", [0, 50, 300])
@pytest.mark.parametrize("rotated", [False, True])
def test_kernels_are_as_exact_as_the_reference(lengths, heads, size, window, rotated):
    tokens, ends = sum(lengths), starts(lengths)
    q, k, v, dout = (torch.randn(tokens, h, size).bfloat16() for h in (*heads, heads[1], heads[0]))
    angle = torch.rand(tokens, size // 2).repeat(1, 2) * 6
    rotation = (angle.cos().bfloat16(), angle.sin().bfloat16()) if rotated else (None, None)
    wide = [None if x is None else x.double() for x in (q, k, v, *rotation)]
    runs = []
    for module, inputs, dy in (
        (cpu, (q, k, v, *rotation), dout),
        (reference, (q, k, v, *rotation), dout),
        (reference, wide, dout.double()),
    ):
        out, lse = module.attention(*inputs, ends, size**-0.5, window)
        runs.append((out, *module.attention_backward(dy, *inputs, out, lse, ends, size**-0.5, window), lse))
    for found, naive, truth in zip(*runs, strict=True):
        if truth.norm() > 1e-6:  # one query sees one key: no gradient reaches q and k
            assert relative(found, truth) <= 1.05 * relative(naive, truth) + 1e-6


@pytest.mark.skipif("avx512-bf16" not in cpu.paths(), reason="this machine has no kernels for attention")
def test_kernels_do_not_depend_on_threads_or_neighbours():
    q, k, v, dout = (torch.randn(200, h, 64).bfloat16() for h in (6, 2, 2, 6))
    before, results = torch.get_num_threads(), []
    for threads, ends in ((1, [0, 70, 200]), (2, [0, 70, 200]), (2, [0, 30, 70, 200])):
        torch.set_num_threads(threads)
        out, lse = cpu.attention(q, k, v, None, None, ends, 0.125, 0)
        results.append((out, *cpu.attention_backward(dout, q, k, v, None, None, out, lse, ends, 0.125, 0)))
    torch.set_num_threads(before)
    for one, two, other in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[70:], other[70:])


def test_heads_may_be_slices_of_one_tensor():
    qkv = torch.randn(90, 10 * 64).bfloat16()
    q, k, v = (x.view(90, -1, 64) for x in qkv.split([6 * 64, 2 * 64, 2 * 64], dim=1))
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), [0, 90], 0.125)
    assert torch.equal(ops.attention(q, k, v, [0, 90], 0.125), expected)
    transposed = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert torch.equal(ops.attention(*transposed, [0, 90], 0.125), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [False, True])
def test_declared_as_it_behaves(dtype, rotated):
    q, k, v = (torch.randn(20, h, 32).to(dtype).requires_grad_() for h in (4, 2, 2))
    rotation = (torch.rand(20, 32).to(dtype), torch.rand(20, 32).to(dtype)) if rotated else (None, None)
    arguments = (q, k, v, *rotation, [0, 7, 20], 0.2, 0)
    torch.library.opcheck(torch.ops.twinlora.attention.default, arguments)


@pytest.mark.skipif("avx512-bf16" not in cpu.paths(), reason="this machine has no kernels for attention")
@pytest.mark.parametrize("window", [0, 5])
def test_step_kernel(window):
    q, k, v = (torch.randn(3, h, 64).bfloat16() for h in (6, 2, 2))
    cos, sin = torch.randn(2, 3, 64).bfloat16()
    keys, values = torch.randn(2, 5, 2, 90, 64).bfloat16()
    runs = []
    for module, cast in ((cpu, torch.bfloat16), (reference, torch.bfloat16), (reference, torch.float64)):
        caches = [x.to(cast, copy=True) for x in (keys, values)]
        inputs = [x.to(cast) for x in (q, k, v, cos, sin)]
        runs.append((module.attention_step(*inputs, *caches, [4, 0, 2], [80, 0, 33], 0.125, window), *caches))
    for found, naive, truth in zip(*runs, strict=True):
        assert relative(found, truth) <= 1.05 * relative(naive, truth)

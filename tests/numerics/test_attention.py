"""Attention of packed sequences: the reference against the paper, the kernels against float64 and the reference."""

import itertools

import pytest
import torch

from twinlora.numerics import attention as reference
from twinlora.numerics import cpu, ops

kernels = pytest.mark.usefixtures("path")


@pytest.fixture(params=[path for path in cpu.paths() if path in ("avx512-bf16", "amx-bf16")])
def path(request):
    """Each path of this machine that has kernels for attention; where there is none, nothing is tested."""
    best = cpu.path()
    cpu.use_path(request.param)
    yield request.param
    cpu.use_path(best)


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


@kernels
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


@kernels
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1)])  # groups of 1, 3 and 8
@pytest.mark.parametrize(("lengths", "window"), [([1000], 0), ([1, 700, 40, 290], 0), ([1100, 64], 300)])
def test_kernels_against_torchs_attention(heads, lengths, window):
    tokens, ends = sum(lengths), starts(lengths)
    inputs = [torch.randn(tokens, h, 64).bfloat16() for h in (heads[0], heads[1], heads[1])]
    dout = torch.randn(tokens, heads[0], 64).bfloat16()
    out, lse = cpu.attention(*inputs, None, None, ends, 0.125, window)
    gradients = cpu.attention_backward(dout, *inputs, None, None, out, lse, ends, 0.125, window)
    wide, expected = [x.double().requires_grad_() for x in inputs], []
    for start, stop in itertools.pairwise(ends):
        q, k, v = (x[start:stop].transpose(0, 1) for x in wide)
        i = torch.arange(stop - start)
        seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - (window or tokens))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.125, enable_gqa=True)
        expected.append(y.transpose(0, 1))
    truth = torch.cat(expected)
    for found, true in zip((out, *gradients), (truth, *torch.autograd.grad(truth, wide, dout.double())), strict=True):
        assert relative(found, true) < 0.006
        for start, stop in itertools.pairwise(ends):  # short sequences are not lost among long ones
            if stop - start > 1:
                assert relative(found[start:stop], true[start:stop]) < 0.01


@kernels
@pytest.mark.parametrize(
    ("lengths", "heads", "window"),
    [
        ([1000], (9, 3), 0),  # heads, and their queries in ranges
        ([700, 650], (8, 1), 0),
        ([1200, 300, 1, 40], (6, 2), 500),
        ([800], (4, 4), 0),  # nothing to cut in the backward pass
    ],
)
def test_kernels_do_not_depend_on_threads(lengths, heads, window):
    tokens, ends = sum(lengths), starts(lengths)
    q, k, v, dout = (torch.randn(tokens, h, 64).bfloat16() for h in (*heads, heads[1], heads[0]))
    rotation = torch.randn(2, tokens, 64).bfloat16().unbind()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(3):
                out, lse = cpu.attention(q, k, v, *rotation, ends, 0.125, window)
                gradients = cpu.attention_backward(dout, q, k, v, *rotation, out, lse, ends, 0.125, window)
                results.append((out, lse, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@kernels
def test_kernels_do_not_depend_on_neighbours():
    """Long sequences are cut by what share of the work they are, and then dK and dV are summed in parts."""
    q, k, v, dout = (torch.randn(1200, h, 64).bfloat16() for h in (6, 2, 2, 6))
    results = []
    for ends in ([0, 700, 1070, 1200], [0, 30, 700, 1070, 1200]):
        out, lse = cpu.attention(q, k, v, None, None, ends, 0.125, 0)
        results.append((out, lse, *cpu.attention_backward(dout, q, k, v, None, None, out, lse, ends, 0.125, 0)))
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        start = 1070 if name in ("dk", "dv") else 700
        assert torch.equal(one[start:], other[start:])


def cost(query, stop, keys):
    """Squares of scores, 32 by 32; without a window."""
    blocks = range(query // 32, -(-stop // 32))
    assert keys == 32 * blocks[-1] + 32
    return sum(b + 1 for b in blocks)


@kernels
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (8, 1), (12, 12)])
@pytest.mark.parametrize("lengths", [[512], [1000, 3000, 7], [50] * 16, [129, 128, 31]])
def test_items_cover_every_query_of_every_head_once(lengths, heads, backward):
    items, _ = cpu.attention_work(starts(lengths), *heads, 64, 0, 2, backward=backward)
    seen = torch.zeros(len(lengths), heads[0], max(lengths), dtype=torch.int)
    for sequence, first, last, query, stop, _ in items:
        seen[sequence, first:last, query:stop] += 1
        assert first // (heads[0] // heads[1]) == (last - 1) // (heads[0] // heads[1])  # they share keys
    for length, found in zip(lengths, seen, strict=True):
        assert (found[:, :length] == 1).all()
        assert (found[:, length:] == 0).all()
    means = []
    for _, found in itertools.groupby(items, key=lambda item: item[0]):
        costs = [cost(query, stop, keys) * (last - first) for _, first, last, query, stop, keys in found]
        means.append(sum(costs) / len(costs))
    assert len(means) == len(lengths)  # side by side
    assert means == sorted(means, reverse=True)


@kernels
@pytest.mark.parametrize(
    ("lengths", "heads", "forward", "backward"),
    [
        ([512], (9, 3), 18, 18),
        ([512, 512], (9, 3), 36, 18),
        ([2048], (32, 8), 64, 32),
        ([512], (12, 12), 24, 12),  # no heads that share keys
        ([50] * 16, (9, 3), 48, 48),  # too short to pay
        ([512] * 22, (9, 3), 66, 66),  # enough already
    ],
)
def test_few_items_are_cut_into_more_of_about_equal_cost(lengths, heads, forward, backward):
    for wanted, is_backward in ((forward, False), (backward, True)):
        items, _ = cpu.attention_work(starts(lengths), *heads, 64, 0, 2, backward=is_backward)
        costs = [cost(query, stop, keys) * (last - first) for _, first, last, query, stop, keys in items]
        assert len(items) == wanted
        assert max(costs) < 1.4 * sum(costs) / len(costs)


@kernels
def test_parts_of_gradients_are_those_of_the_heads_at_work():
    part = 2 * 4 * 8192 * 128
    for threads, heads, most in (
        (1, (32, 8), 2),
        (2, (32, 8), 4),
        (16, (32, 8), 21),
        (2, (32, 1), 4),
        (64, (32, 8), 32),
    ):
        items, parts = cpu.attention_work([0, 8192], *heads, 128, 0, threads, backward=True)
        assert len(items) == 32
        assert parts == most * part
    for backward, heads in ((False, (32, 8)), (True, (8, 8))):
        assert cpu.attention_work([0, 8192], *heads, 128, 0, 2, backward=backward)[1] == 0


@kernels
def test_a_key_that_is_as_good_as_unseen_has_no_gradient():
    """Of less than normal numbers nothing is computed: that takes a hundred times as long."""
    q, k, v = (torch.ones(64, 1, 32, dtype=torch.bfloat16) for _ in range(3))
    k[3] = -8  # its scores are 288 below those of the others
    inputs = [x.requires_grad_() for x in (q, k, v)]
    _, dk, dv = torch.autograd.grad(ops.attention(*inputs, [0, 64], 1.0).sum(), inputs)
    assert not dv[3].any()
    assert not dk[3].any()
    assert dv[2].all()


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


@kernels
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    "rows, lengths", [([4, 0, 2], [80, 0, 33]), ([1] * 40 + [3] + [2] * 3, [*range(50, 90), 0, 5, 6, 7])]
)
def test_step_kernel(window, rows, lengths):
    """One token of a sequence, or several, each of which sees those before it."""
    q, k, v = (torch.randn(len(rows), h, 64).bfloat16() for h in (6, 2, 2))
    cos, sin = torch.randn(2, len(rows), 64).bfloat16()
    keys, values = torch.randn(2, 5, 2, 90, 64).bfloat16()
    runs = []
    for module, cast in ((cpu, torch.bfloat16), (reference, torch.bfloat16), (reference, torch.float64)):
        caches = [x.to(cast, copy=True) for x in (keys, values)]
        inputs = [x.to(cast) for x in (q, k, v, cos, sin)]
        runs.append((module.attention_step(*inputs, *caches, rows, lengths, 0.125, window), *caches))
    for found, naive, truth in zip(*runs, strict=True):
        assert relative(found, truth) <= 1.05 * relative(naive, truth)

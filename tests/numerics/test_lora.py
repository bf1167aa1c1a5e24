"""Adapters of different ranks in one batch, against one row at a time."""

import contextlib
import itertools

import pytest
import torch
from torch.library import opcheck

from twinlora.numerics import lora, ops, reference


def case(dtype, rows, ranks, n, k, *, transposed):
    x, y = torch.randn(sum(rows) + 3, k).to(dtype), torch.randn(sum(rows) + 3, n).to(dtype)
    a = [(torch.randn(r, k) / k**0.5).to(dtype) for r in ranks]
    b = [torch.randn(r, n).to(dtype).T if transposed else torch.randn(n, r).to(dtype) for r in ranks]
    starts = [2]  # rows before and behind have no adapter
    for count in rows:
        starts.append(starts[-1] + count)
    return y, x, a, b, [0.5 * (i + 1) for i in range(len(ranks))], starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "rows, ranks, n, k",
    [
        ([1], [1], 1, 1),
        ([1, 3, 0, 16], [16, 5, 2, 33], 200, 70),
        ([2, 40], [8, 4], 64, 96),
        ([4, 5], [64, 3], 576, 576),
    ],
)
def test_every_row_gets_its_own_adapter(dtype, transposed, rows, ranks, n, k):
    torch.manual_seed(0)
    y, x, a, b, scales, starts = case(dtype, rows, ranks, n, k, transposed=transposed)
    exact, naive, found = y.double(), y.clone(), y.clone()
    for i, (start, stop) in enumerate(itertools.pairwise(starts)):
        for row in range(start, stop):
            exact[row] += scales[i] * (b[i].double() @ (a[i].double() @ x[row].double()))
    ops.grouped_lora_(found, x, a, b, scales, starts)
    reference.grouped_lora_(naive, x, a, b, scales, starts)
    untouched = [*range(starts[0]), *range(starts[-1], len(y))]
    assert torch.equal(found[untouched], y[untouched])
    error, bound = (found - exact).norm(), (naive - exact).norm()
    assert error <= 1.2 * bound + 1e-6 * exact.norm()
    assert bound <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * exact.norm()


def test_opcheck():
    y, x, a, b, scales, starts = case(torch.float32, [2, 1], [4, 2], 12, 8, transposed=True)
    opcheck(torch.ops.twinlora.grouped_lora_.default, (y, x, a, b, scales, starts))
    q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    keys, values = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    cos, sin = torch.randn(5, 8), torch.randn(5, 8)
    opcheck(torch.ops.twinlora.attention_extend.default, (q, k, k, cos, sin, keys, values, 1, 6, 0.3, 4))


here = pytest.mark.skipif(
    not lora.has_tables(torch.device("cpu"), torch.bfloat16), reason="no kernel for this processor"
)


@here
def test_a_table_is_its_adapters_one_by_one():
    """Two layers with one input; the second lacks an adapter that the first has, and one was dropped."""
    torch.manual_seed(0)
    y, x, a, b, scales, starts = case(torch.bfloat16, [2, 3, 1], [16, 8, 4], 96, 64, transposed=True)
    other = case(torch.bfloat16, [1], [4], 40, 64, transposed=True)
    wanted = [y.clone(), torch.randn(len(x), 40).bfloat16()]
    found = [t.clone() for t in wanted]
    ops.grouped_lora_(wanted[0], x, a, b, scales, starts)
    ops.grouped_lora_(wanted[1], x, other[2], other[3], other[4], starts[1:3])
    tables = [lora.LoraTable(), lora.LoraTable()]
    for number in (2, 0):  # in any order
        tables[0].put(number, a[number], b[number], scales[number])
    tables[0].put(1, a[1], b[1], scales[1])
    tables[1].put(1, other[2][0], other[3][0], other[4][0])
    tables[1].put(0, other[2][0], other[3][0], other[4][0])
    tables[1].drop(0)
    route = torch.tensor([[n, starts[n], starts[n + 1]] for n in range(3)])
    lora.add(found, x, tables, route)
    assert all(torch.equal(w, f) for w, f in zip(wanted, found, strict=True))


@contextlib.contextmanager
def with_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@here
@pytest.mark.parametrize("size", [4096, 1000])
def test_what_a_row_gets_depends_on_it_alone(size):
    """However many rows share its adapter, and however many threads share that adapter's rank and columns."""
    torch.manual_seed(0)
    x, y = torch.randn(5, size).bfloat16(), torch.randn(5, size).bfloat16()
    a, b = (torch.randn(33, size) / size**0.5).bfloat16(), torch.randn(33, size).bfloat16().T

    def added(first, last):
        out = y[first:last].clone()
        ops.grouped_lora_(out, x[first:last].contiguous(), [a], [b], [0.5], [0, last - first])
        return out

    with with_threads(1):
        alone = torch.cat([added(row, row + 1) for row in range(5)])
    for threads, rows in itertools.product([1, 2, 3], [1, 2, 3, 4, 5]):
        with with_threads(threads):
            assert torch.equal(added(0, rows), alone[:rows])


@here
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layers, adapters", [((96,), 1), ((200, 16, 40), 2), ((33, 1), 9)])
def test_products_with_what_adapters_add_are_one_after_the_other(threads, layers, adapters):
    torch.manual_seed(0)
    x, weights = torch.randn(2 * adapters, 576).bfloat16(), [torch.randn(n, 576).bfloat16() for n in layers]
    tables, kept = [], []
    for number, n in enumerate(layers):
        tables.append(lora.LoraTable())
        for key in range(number % 2, adapters):  # every second layer lacks the first
            a, b = torch.randn(3 + key, 576).bfloat16(), torch.randn(3 + key, n).bfloat16().T
            kept.append((a, b))
            tables[-1].put(key, a, b, 0.5)
    route = torch.tensor([[key, 2 * key, 2 * key + 1 + key % 2] for key in range(adapters)])
    with with_threads(threads):
        found = lora.multiply(x, weights, tables, route)
        wanted = ops.dense_linears(x, weights)
        lora.add(wanted, x, tables, route)
    assert found is not None
    assert all(torch.equal(w, f) for w, f in zip(wanted, found, strict=True))
    assert lora.multiply(x.float(), [weight.float() for weight in weights], tables, route) is None

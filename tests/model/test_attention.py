import pytest
import torch

from twinlora.model.attention import Layout, packed_attention


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
    found = packed_attention(q, k, v, Layout(lengths), 0.3, window)
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
    assert (packed_attention(*small, Layout(lengths), 0.125).float() - truth).norm() <= naive * 1.05


def test_positions_restart():
    assert Layout([2, 3]).positions().tolist() == [[0, 1, 0, 1, 2]]

"""A pass of mixed chunks sees what one pass over each whole sequence sees."""

import pytest
import torch

from twinlora.model.attention import Layout
from twinlora.serve.kvcache import Pass, SlotCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_chunks_equal_one_pass(dtype, window):
    torch.manual_seed(0)
    lengths, heads, size = [13, 6, 300], (4, 2), 32
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, size).to(dtype) for h in (heads[0], heads[1], heads[1]))
    angle = torch.rand(total, size // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    whole = Layout(lengths)
    expected = whole.attend(0, q, k, v, (cos, sin), 0.2, window)
    cache, slots, found = SlotCache(5, 300), [3, 0, 1], torch.empty_like(expected)
    cuts = [[5, 1, 4, 1, 2], [1, 1, 4], [100, 170, 1, 29]]
    done = [0, 0, 0]
    for number in range(5):
        chunks, tokens = [], []
        for i, counts in enumerate(cuts):
            if number < len(counts):
                chunks.append((slots[i], done[i], counts[number]))
                tokens += range(whole.starts[i] + done[i], whole.starts[i] + done[i] + counts[number])
                done[i] += counts[number]
        layout, index = Pass(cache, chunks, "cpu"), torch.tensor(tokens)
        rotation = (cos[index], sin[index])
        found[index] = layout.attend(0, q[index], k[index], v[index], rotation, 0.2, window)
        if number == 2:  # the first sequence goes on in a copy
            cache.copy(3, 4, done[0])
            slots[0] = 4
    assert done == lengths
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)


def test_impossible_passes_are_caught():
    cache = SlotCache(2, 8)
    for chunks in ([(2, 0, 1)], [(0, 7, 2)], [(0, 0, 1), (0, 1, 1)], [(0, 0, 0)]):
        with pytest.raises(AssertionError):
            Pass(cache, chunks, "cpu")

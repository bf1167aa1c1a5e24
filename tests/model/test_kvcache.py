"""The cache: steps one token at a time see what one pass over the whole sequence sees."""

import pytest
import torch

from twinlora.model.attention import Layout
from twinlora.model.kvcache import KVCache, Prefill, Step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_steps_equal_one_pass(dtype, window):
    torch.manual_seed(0)
    lengths, new, heads, size = [5, 1, 9], 3, (4, 2), 32
    longest = [n + new for n in lengths]
    total = sum(longest)
    q, k, v = (torch.randn(total, h, size).to(dtype) for h in (heads[0], heads[1], heads[1]))
    angle = torch.rand(total, size // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    whole = Layout(longest)
    expected = whole.attend(0, q, k, v, (cos, sin), 0.2, window)

    def part(tokens):
        index = torch.tensor(tokens)
        return *(x[index] for x in (q, k, v)), (cos[index], sin[index])

    cache = KVCache(3, max(longest))
    prompts = [whole.starts[i] + t for i, n in enumerate(lengths) for t in range(n)]
    found = Prefill(cache, lengths).attend(0, *part(prompts), 0.2, window)
    torch.testing.assert_close(found, expected[torch.tensor(prompts)])
    for t in range(new):
        rows = [2, 0, 1] if t == 0 else [0, 2]  # a row leaves
        tokens = [whole.starts[i] + lengths[i] + t for i in rows]
        step = Step(cache, rows)
        assert step.positions().tolist() == [[lengths[i] + t for i in rows]]
        found = step.attend(0, *part(tokens), 0.2, window)
        step.advance()
        torch.testing.assert_close(
            found,
            expected[torch.tensor(tokens)],
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=2e-2 if dtype == torch.bfloat16 else 1e-6,
        )


def test_layers_share_the_rotation_of_a_pass():
    """Other layouts wait in lists for their pass, and would hold the tables of all before."""
    tables = torch.rand(1, 3, 32), torch.rand(1, 3, 32)
    for layout, shared in ((Prefill(KVCache(1, 8), [3]), True), (Layout([3]), False)):
        first, again = layout.rotation(tables), layout.rotation(tables)
        assert first[0].shape == (3, 32)
        assert (first[0] is again[0]) == shared
        other = tables[0] + 1, tables[1]
        assert torch.equal(layout.rotation(other)[0], other[0][0])

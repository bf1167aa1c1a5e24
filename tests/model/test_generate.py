import pytest
import torch

from twinlora.model import swap
from twinlora.model.generate import generate, is_ragged
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import NF4Format


@pytest.fixture(params=["stock blocks", "our blocks"])
def load(request, tiny):
    """A loader of the tiny model in float32, with transformers' blocks and cache or with ours."""

    def load(**arguments):
        model = load_model(resolve(str(tiny)), dtype=torch.float32, **arguments)
        if request.param == "our blocks":
            swap.replace_blocks(model)
        assert is_ragged(model) == (request.param == "our blocks")
        return model

    return load


@pytest.mark.parametrize("quantize", [None, NF4Format()])
def test_a_batch_answers_as_transformers_does_one_by_one(load, quantize):
    model = load(quantize=quantize)
    prompts = [torch.randint(0, 250, (n,)).tolist() for n in (3, 11, 7, 1)]
    expected = []
    for prompt in prompts:
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=257, pad_token_id=258
        )
        expected.append([t for t in whole[0, len(prompt) :].tolist() if t not in (257, 258)])
    assert generate(model, prompts, max_new_tokens=12, stop={257}) == expected


def test_rows_that_end_leave_the_batch(load):
    model = load()
    prompts = [torch.randint(0, 250, (n,)).tolist() for n in (4, 9, 6)]
    free = generate(model, prompts, max_new_tokens=8, stop=set())
    stop = {free[0][2]}  # ends the first row early, and whichever others say it
    expected = [row[: row.index(free[0][2])] if free[0][2] in row else row for row in free]
    assert generate(model, prompts, max_new_tokens=8, stop=stop) == expected


def test_streaming_and_seeded_sampling(load):
    model = load()
    seen = []
    arguments = {"max_new_tokens": 6, "stop": set(), "temperature": 1.0}
    first = generate(model, [[1, 2]], generator=torch.Generator().manual_seed(3), on_token=seen.append, **arguments)
    assert first == [seen]
    assert generate(model, [[1, 2]], generator=torch.Generator().manual_seed(3), **arguments) == first

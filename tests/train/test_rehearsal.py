"""The longest micro-batch runs first, changes nothing, and explains itself when memory runs out."""

import pytest
import torch

from tests.conftest import chat, write_jsonl
from tests.train.test_loop import options, same
from twinlora.errors import OutOfMemory
from twinlora.reporter import Reporter
from twinlora.train import rehearsal
from twinlora.train.inputs import read_inputs
from twinlora.train.loop import train
from twinlora.train.notes import Notes
from twinlora.train.rehearsal import longest_micro_batch


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_has_no_effect_on_the_result(tiny, data_file, tmp_path, monkeypatch, method):
    arguments = {"method": method, "lr": 1e-3} | ({"dropout": 0.1} if method == "lora" else {})
    with_it = train(options(tiny, data_file, tmp_path / "with", **arguments))
    ran = []
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **__: ran.append(1))
    without = train(options(tiny, data_file, tmp_path / "without", **arguments))
    assert ran
    assert same(dict(with_it.model.named_parameters()), dict(without.model.named_parameters()))


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_the_longest_of_all_steps(tiny, data_file, tmp_path, packed):
    given = options(tiny, data_file, tmp_path / "r", micro_batch_tokens=150, epochs=2)
    inputs = read_inputs(given, Notes(Reporter()))
    found = longest_micro_batch(inputs, inputs.steps(given), given, 150, packed=packed)
    size = sum(len(e.ids) for e in found) if packed else max(len(e.ids) for e in found) * len(found)
    from twinlora.data.packing import make_batch

    batches = (make_batch(inputs.step_examples(step, given), 150, packed=packed) for step in range(inputs.steps(given)))
    sizes = ((micro.tokens if packed else micro.input_ids.numel()) for b in batches for micro in b.micro_batches)
    assert size == max(sizes)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_running_out_of_memory_says_what_to_lower(tiny, data_file, tmp_path, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(rehearsal, "loss_sum", exhausted)
    with pytest.raises(OutOfMemory, match=r"has \d+ tokens in 4 row\(s\)[\s\S]*--micro-batch-tokens \(now 2048\)"):
        train(options(tiny, data_file, tmp_path / "r", on_oom="stop"))
    with pytest.raises(OutOfMemory, match=r"in 1 row\(s\)[\s\S]*--max-length \(now 400\)(?![\s\S]*gradient)"):
        train(options(tiny, data_file, tmp_path / "s", max_length=400, gradient_checkpointing="auto"))
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, data_file, tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(rehearsal, "loss_sum", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(options(tiny, data_file, tmp_path / "r"))


def test_memory_that_really_runs_out(tiny, tmp_path):
    """On the CPU torch raises a RuntimeError without a class of its own."""
    import resource

    rows = write_jsonl(tmp_path / "long.jsonl", [chat("a" * 4000, "b" * 4000)] * 64)
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115, PTH123
    given = options(
        tiny, rows, tmp_path / "r", batch_size=64, micro_batch_tokens=10**6, max_length=9000, dtype="float32",
        packing="off", fused=False, on_oom="stop",
    )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20), before[1]))
    try:
        with pytest.raises(OutOfMemory, match="lower --micro-batch-tokens"):
            train(given)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

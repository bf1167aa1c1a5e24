"""On a device: every op against float64, training against the CPU, and what a run does when memory really runs out."""

from pathlib import Path

import pytest
import torch

from tests.conftest import chat, write_jsonl
from tests.train.test_loop import metrics, options, same, weights
from tests.train.test_memory import record
from twinlora.numerics import cuda, ops
from twinlora.train import offload
from twinlora.train.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device and a CUDA build of torch"),
]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [chat("say " + "ab" * (i % 9), f"word {i}") for i in range(32)])


@pytest.fixture
def long_rows(tmp_path):
    return write_jsonl(tmp_path / "long.jsonl", [chat("a" * 1500, "b" * 1500)] * 32)


def test_ops_and_first_steps(monkeypatch):
    """The checks of benchmarks/gpu.py: all of them in one list, so that one failure does not hide the others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_checks
    from gpu_measure import Setting

    results = {name: check() for name, check in gpu_checks.sections(Setting(torch.device("cuda"), False, 3))}
    assert {name: result for name, result in results.items() if not result["passed"]} == {}
    assert {"attention, bfloat16", "decoding step, float32", "5 steps, qlora"} <= results.keys()


def test_the_kernels_are_what_ran():
    assert ops.backend("cuda") == "cuda (triton)"
    assert cuda._flash_takes(torch.empty(1, 1, 64, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_follows_the_cpus_curve(tiny, rows, tmp_path, method):
    curves = []
    for device in ("cpu", "cuda"):
        train(options(tiny, rows, tmp_path / device, method=method, device=device, dtype="bfloat16", epochs=3))
        curves.append([line["loss"] for line in metrics(tmp_path / device)])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.05


def test_float32_follows_it_closely(tiny, rows, tmp_path):
    curves = []
    for device in ("cpu", "cuda"):
        train(options(tiny, rows, tmp_path / device, device=device, dtype="float32"))
        curves.append([line["loss"] for line in metrics(tmp_path / device)])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3


def test_offloading_and_recomputation_give_the_same_run(tiny, rows, tmp_path, monkeypatch):
    """Within the noise of the device: attention's backward pass adds up in no fixed order."""
    monkeypatch.setattr(offload, "_SMALL", 256)
    changes = [
        {},
        {"offload": ["optimizer", "activations"]},
        {"gradient_checkpointing": "on", "offload": ["activations"]},
        {"method": "full", "lr": 1e-3},
        {"method": "full", "lr": 1e-3, "offload": ["optimizer"]},
    ]
    losses = []
    for number, change in enumerate(changes):
        given = {"device": "cuda", "dtype": "bfloat16"} | change
        losses.append(train(options(tiny, rows, tmp_path / str(number), **given)).record["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[2] == pytest.approx(losses[0], abs=0.02)
    assert losses[4] == pytest.approx(losses[3], abs=0.02)


def test_activations_leave_the_device():
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (torch.nn.Linear(1024, 1024), torch.nn.GELU())]
    model = torch.nn.Sequential(*layers).cuda()
    x, held, gradients = torch.randn(4096, 1024, device="cuda", requires_grad=True), [], []
    for hooks in (offload.HostActivations(model), None):
        before = torch.cuda.memory_allocated()
        if hooks is None:
            y = model(x)
        else:
            with hooks:
                y = model(x)
        held.append(torch.cuda.memory_allocated() - before)
        gradients.append(torch.autograd.grad(y.sum(), [x, *model.parameters()]))
        del y
    assert held[0] < 0.2 * held[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_memory_that_really_runs_out(tiny, long_rows, tmp_path):
    """Under a cap the run goes on with less, and its loss is that of a run without one."""
    given = {
        "device": "cuda", "dtype": "bfloat16", "batch_size": 32, "micro_batch_tokens": 10**6, "max_length": 4000,
    }  # fmt: skip
    free = train(options(tiny, long_rows, tmp_path / "free", **given)).record
    cap = int(0.6 * free["peak_device_bytes"])
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        short = train(options(tiny, long_rows, tmp_path / "short", **given)).record
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert record(tmp_path / "short")["memory"]["retries"] >= 1
    assert short["peak_device_bytes"] <= cap
    assert short["loss"] == pytest.approx(free["loss"], abs=0.02)


def test_copies_of_weights_leave_room_for_a_step(tiny, rows, tmp_path):
    given = {"method": "qlora", "device": "cuda", "dtype": "bfloat16"}
    plain = train(options(tiny, rows, tmp_path / "a", **given)).record
    copied = train(options(tiny, rows, tmp_path / "b", dense_copies="auto", **given)).record
    assert record(tmp_path / "b")["memory"]["dense_copies"]["copied"] == 14
    assert copied["loss"] == pytest.approx(plain["loss"], abs=0.02)
    assert not same(weights(tmp_path / "a"), {})


def test_liger_agrees():
    """Another party's kernels, where theirs compute the same; float32, so that only the order of sums differs."""
    norm = pytest.importorskip("liger_kernel.ops.rms_norm", reason="needs liger-kernel")
    swiglu = pytest.importorskip("liger_kernel.ops.swiglu", reason="needs liger-kernel")
    twin = torch.ops.twinlora
    x, dy, w = torch.randn(6, 96, device="cuda"), torch.randn(6, 96, device="cuda"), torch.randn(96, device="cuda")
    for mode, offset, wide in (("llama", 0.0, False), ("gemma", 1.0, True)):
        given = x.clone().requires_grad_()
        theirs = norm.LigerRMSNormFunction.apply(given, w, 1e-5, offset, mode, False)
        y, rstd = twin.rms_norm(x, w, 1e-5, offset, wide)
        torch.testing.assert_close(y, theirs)
        (dx,) = torch.autograd.grad(theirs, given, dy)
        torch.testing.assert_close(twin.rms_norm_backward(dy, x, w, rstd, offset), dx)
    gate, up = torch.randn(2, 5, 70, device="cuda")
    torch.testing.assert_close(twin.swiglu(gate, up), swiglu.swiglu_forward(gate, up)[2])
    dy = torch.randn(5, 70, device="cuda")
    ours, theirs = twin.swiglu_backward(dy, gate, up), swiglu.swiglu_backward(gate.clone(), up.clone(), dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declared_as_they_behave(dtype):
    twin = torch.ops.twinlora
    x, w = torch.randn(4, 6, 48, device="cuda").to(dtype), torch.randn(48, device="cuda").to(dtype)
    heads = [torch.randn(20, h, 32, device="cuda").to(dtype).requires_grad_() for h in (4, 2, 2)]
    calls = [
        (twin.rms_norm, (x, w, 1e-5, 0.0, False)),
        (twin.rms_norm_backward, (x, x, w, torch.rand(4, 6, device="cuda"), 0.0)),
        (twin.swiglu, (x, x)),
        (twin.swiglu_backward, (x, x, x)),
        (twin.cross_entropy_, (x[0].clone(), torch.randint(0, 48, (6,), device="cuda"))),
        (twin.attention, (*heads, None, None, [0, 7, 20], 0.2, 0)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_losses_are_those_of_the_whole_logits():
    """Several chunks of the head, with the gradient of hidden rows."""
    from torch.nn import functional as F

    from twinlora.numerics.loss import linear_cross_entropy

    hidden = torch.randn(3000, 64, device="cuda", requires_grad=True)
    weight, labels = torch.randn(90001, 64, device="cuda"), torch.randint(0, 90001, (3000,), device="cuda")
    found = linear_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for a, b in zip(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

"""What a run gives up when memory runs out, and what it may keep elsewhere: the results stay the same."""

import json

import pytest
import torch
import transformers

from tests.conftest import chat, write_jsonl
from tests.train.test_loop import metrics, options, same, weights
from twinlora.errors import Interrupted, ModelError, OutOfMemory
from twinlora.model import forward
from twinlora.model.copies import CopiedLinear, copy_layers, drop_copies
from twinlora.model.linear import QuantLinear
from twinlora.numerics import ops
from twinlora.train import memory, offload, rehearsal, step
from twinlora.train.loop import train


class Allocator:
    """Lets a forward pass fail whose activations, if they are kept, are of more than `most` tokens."""

    def __init__(self, monkeypatch, most, keeps=lambda model: True, only=lambda calls: True):
        self.most, self.keeps, self.only, self.calls, self.failed = most, keeps, only, 0, 0
        for module in (rehearsal, step):
            monkeypatch.setattr(module, "loss_sum", self.loss_sum)

    def loss_sum(self, model, micro, *, plain_head):
        self.calls += 1
        if micro.tokens > self.most and self.keeps(model) and self.only(self.calls):
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        return forward.loss_sum(model, micro, plain_head=plain_head)


def keeps_activations(model):
    return not model.base_model.layers[0].gradient_checkpointing


def record(run):
    return json.loads((run / "run.json").read_text())


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [chat("say " + "ab" * (i % 9), f"word {i}") for i in range(16)])


def test_recomputation_comes_first_and_changes_no_bit(tiny, rows, tmp_path, monkeypatch):
    train(options(tiny, rows, tmp_path / "plain"))
    allocator = Allocator(monkeypatch, 100, keeps_activations)
    train(options(tiny, rows, tmp_path / "short"))
    assert allocator.failed == 1
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "short"))
    found = record(tmp_path / "short")
    assert found["memory"] | {"checkpointing": True, "micro_batch_tokens": 2048, "retries": 1} == found["memory"]
    (line,) = [line for line in found["notes"] if "out of memory" in line]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB): activations are recomputed from now on" in line
    assert "more" not in line


@pytest.mark.parametrize("switch", ["on", "off"])
def test_smaller_micro_batches_for_the_same_batch(tiny, rows, tmp_path, monkeypatch, switch):
    """As if they had been asked for: the same steps, and the loss of the whole batch."""
    allocator = Allocator(monkeypatch, 100)
    train(options(tiny, rows, tmp_path / "halved", dtype="float32", gradient_checkpointing=switch))
    limit = record(tmp_path / "halved")["memory"]["micro_batch_tokens"]
    assert allocator.failed >= 1
    assert limit <= 100
    asked = options(tiny, rows, tmp_path / "asked", dtype="float32", micro_batch_tokens=limit)
    train(asked)
    assert same(weights(tmp_path / "halved"), weights(tmp_path / "asked"))
    monkeypatch.undo()
    whole = train(options(tiny, rows, tmp_path / "whole", dtype="float32")).record
    assert record(tmp_path / "halved")["result"]["loss"] == pytest.approx(whole["loss"], abs=2e-4)
    assert record(tmp_path / "halved")["result"]["trained_tokens"] == whole["trained_tokens"]


def test_a_step_that_fails_starts_anew(tiny, rows, tmp_path, monkeypatch):
    """In the middle of a batch, with dropout: nothing of the failed attempt is left, no random number is lost."""
    arguments = {"dropout": 0.2, "micro_batch_tokens": 120, "gradient_checkpointing": "off", "dtype": "float32"}
    monkeypatch.setattr(memory.Memory, "_give_way", lambda self, part, reason, **_: None)  # as it was before
    train(options(tiny, rows, tmp_path / "plain", **arguments))
    allocator = Allocator(monkeypatch, 0, only=lambda calls: calls == 5)
    train(options(tiny, rows, tmp_path / "again", **arguments))
    assert allocator.failed == 1
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "again"))


def test_a_resumed_run_continues_with_what_was_found(tiny, rows, tmp_path, monkeypatch):
    """The second part meets no lack of memory, and yet computes as the first one did."""
    import os
    import signal

    given = {"epochs": 2, "gradient_checkpointing": "auto", "dtype": "float32"}
    Allocator(monkeypatch, 100)
    train(options(tiny, rows, tmp_path / "whole", **given))
    kept, sent = step.loss_sum, []

    def interrupted(model, micro, *, plain_head):
        logged = (tmp_path / "cut" / "metrics.jsonl").exists() and len(metrics(tmp_path / "cut"))
        if logged == 3 and not sent:  # a second signal would end the process
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return kept(model, micro, plain_head=plain_head)

    monkeypatch.setattr(step, "loss_sum", interrupted)
    with pytest.raises(Interrupted):
        train(options(tiny, rows, tmp_path / "cut", **given))
    monkeypatch.undo()
    train(options(tiny, rows, tmp_path / "cut", resume=True, **given))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    now, before = (record(tmp_path / name)["memory"] for name in ("cut", "whole"))
    assert (now["micro_batch_tokens"], now["checkpointing"]) == (before["micro_batch_tokens"], True)
    assert now["micro_batch_tokens"] < 2048


def test_an_evaluation_goes_on_with_less(tiny, rows, tmp_path, monkeypatch):
    """It keeps no activations: nothing is recomputed for its sake."""
    from twinlora.evaluate import metrics as evaluation

    def loss_sum(model, micro, *, plain_head):
        if micro.tokens > 200:
            raise MemoryError
        return forward.loss_sum(model, micro, plain_head=plain_head)

    given = {"eval": rows, "dtype": "float32"}
    expected = train(options(tiny, rows, tmp_path / "a", **given)).record
    monkeypatch.setattr(evaluation, "loss_sum", loss_sum)
    found = train(options(tiny, rows, tmp_path / "b", **given)).record
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    used = record(tmp_path / "b")["memory"]
    assert used["micro_batch_tokens"] <= 200 < 2048
    assert (used["checkpointing"], used["retries"] > 0) == (False, True)


def test_a_model_that_cannot_recompute_gets_smaller_micro_batches(tiny, rows, tmp_path, monkeypatch):
    Allocator(monkeypatch, 100)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    train(options(tiny, rows, tmp_path / "r"))
    found = record(tmp_path / "r")["memory"]
    assert (found["checkpointing"], found["micro_batch_tokens"] <= 100) == (False, True)
    with pytest.raises(ModelError, match="LlamaForCausalLM does not support it; use --gradient-checkpointing off"):
        train(options(tiny, rows, tmp_path / "s", gradient_checkpointing="on"))


def test_one_row_that_does_not_fit_is_the_end(tiny, rows, tmp_path, monkeypatch):
    Allocator(monkeypatch, 10)
    with pytest.raises(OutOfMemory, match=r"in 1 row\(s\)[\s\S]*lower --max-length[\s\S]*--method qlora"):
        train(options(tiny, rows, tmp_path / "r"))


def test_an_update_that_fails_is_not_tried_again(tiny, rows, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    with pytest.raises(OutOfMemory, match="lower --micro-batch-tokens"):
        train(options(tiny, rows, tmp_path / "r"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_offloading_changes_no_bit(tiny, rows, tmp_path, monkeypatch, method):
    monkeypatch.setattr(offload, "_SMALL", 256)
    arguments = {"method": method, "lr": 1e-3, "checkpoint_every": 2} | ({"dropout": 0.1} if method == "lora" else {})
    plain = train(options(tiny, rows, tmp_path / "a", **arguments))
    there = train(options(tiny, rows, tmp_path / "b", offload=["optimizer", "activations"], **arguments))
    assert same(dict(plain.model.named_parameters()), dict(there.model.named_parameters()))
    assert record(tmp_path / "b")["memory"]["offloaded_bytes"] > 10_000
    assert any("frees nothing, since this run is on the CPU" in line for line in record(tmp_path / "b")["notes"])
    norms = [[line["grad_norm"] for line in metrics(tmp_path / name)] for name in "ab"]
    assert norms[0] == norms[1]


def test_offloading_moves_activations_and_never_weights(monkeypatch):
    monkeypatch.setattr(offload, "_SMALL", 64)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    hooks, moved = offload.HostActivations(model), []
    pack = hooks.pack_hook
    hooks.pack_hook = lambda t: moved.append((t.shape, not isinstance(pack(t), torch.Tensor))) or pack(t)
    x = torch.randn(8, 32, requires_grad=True)
    with hooks:
        y = model(x)
    assert {went for shape, went in moved if shape == (8, 32)} == {True}
    assert {went for shape, went in moved if shape == (32, 32)} == {False}
    found = torch.autograd.grad(y.sum(), [x, *model.parameters()])
    for a, b in zip(found, torch.autograd.grad(model(x).sum(), [x, *model.parameters()]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", ["auto", "40KiB"])
def test_copies_of_weights_change_no_bit_and_say_what_they_cost(tiny, rows, tmp_path, given):
    arguments = {"method": "qlora", "lr": 1e-2}
    train(options(tiny, rows, tmp_path / "a", **arguments))
    result = train(options(tiny, rows, tmp_path / "b", dense_copies=given, **arguments))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    found = record(tmp_path / "b")["memory"]["dense_copies"]
    assert found["layers"] == 14
    assert found["copied"] == (14 if given == "auto" else 5)
    assert found["nbytes"] <= (found["spare_bytes"] if given == "auto" else 40 << 10)
    (line,) = [line for line in record(tmp_path / "b")["notes"] if line.startswith("dense_copies")]
    assert f"{found['copied']} of 14 quantised layers have a 16-bit copy" in line
    assert not any(isinstance(m, CopiedLinear) for m in result.model.modules())


def test_copies_are_the_first_to_go(tiny, rows, tmp_path, monkeypatch):
    allocator = Allocator(monkeypatch, 0, only=lambda calls: calls == 3)
    train(options(tiny, rows, tmp_path / "r", method="qlora", dense_copies="1GiB"))
    assert allocator.failed == 1
    found = record(tmp_path / "r")
    assert found["memory"] | {"dense_copies": None, "checkpointing": False, "retries": 1} == found["memory"]
    assert any("the 16-bit copies of weights are given up" in line for line in found["notes"])


@pytest.mark.parametrize("rows", [3, 100])
def test_a_copied_layer_multiplies_as_the_stored_one(rows):
    weight = ops.quantize(torch.randn(48, 128).bfloat16())
    model = torch.nn.Sequential(QuantLinear(weight, torch.nn.Parameter(torch.randn(48).bfloat16())))
    stored = model[0]
    x, dy = torch.randn(rows, 128).bfloat16().requires_grad_(), torch.randn(rows, 48).bfloat16()
    expected = [stored(x), stored.multiply(x.detach()), stored.multiply_transposed(dy)]
    expected.append(torch.autograd.grad(expected[0], x, dy)[0])
    made = copy_layers(model, 1 << 20, torch.bfloat16)
    assert (made.copied, made.nbytes, made.share) == (1, 48 * 128 * 2, 1.0)
    layer = model[0]
    assert isinstance(layer, CopiedLinear)
    found = [layer(x), layer.multiply(x.detach()), layer.multiply_transposed(dy)]
    found.append(torch.autograd.grad(found[0], x, dy)[0])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    y, dx = torch.randn(rows, 48).bfloat16(), torch.randn(rows, 128).bfloat16()
    sums = [y.float() + found[1].float(), dx.float() + found[2].float()]
    layer.multiply_add_(y, x.detach())
    layer.multiply_transposed_add_(dx, dy)
    for a, b in zip((y, dx), sums, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.3)
    assert layer.precision == stored.precision
    drop_copies(model)
    assert model[0] is stored

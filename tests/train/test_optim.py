"""float16's loss scaling, LoRA+'s groups, and the choice of a type."""

import json

import pytest
import torch
from torch import nn

from tests.conftest import chat, write_jsonl
from twinlora import machine
from twinlora.config import OptimizerOptions, TrainOptions
from twinlora.model.load import pick_dtype
from twinlora.train.loop import train
from twinlora.train.optim import MasterAdamW


def layer():
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def steps(module, optimizer, factors):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for factor in factors:
        optimizer.backward((module(x) ** 2).sum() * factor)
        optimizer.step(0.1, 1.0)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_scaled_loss_gives_the_same_steps():
    runs = []
    for scaled in (False, True):
        module = layer()
        optimizer = MasterAdamW(dict(module.named_parameters()), OptimizerOptions(), scaled=scaled)
        runs.append(steps(module, optimizer, [1.0, 2.0, 0.5]))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_an_overflow_changes_nothing_but_the_factor_and_that_is_saved():
    module = layer()
    optimizer = MasterAdamW(dict(module.named_parameters()), OptimizerOptions(), scaled=True)
    before, factor = steps(module, optimizer, [1.0]), optimizer.scaler.get_scale()
    after = steps(module, optimizer, [float("inf")])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert optimizer.scaler.get_scale() == factor / 2
    other = layer()
    again = MasterAdamW(dict(other.named_parameters()), OptimizerOptions(), scaled=True)
    again.load_state_tensors(optimizer.state_tensors())
    assert again.scaler.get_scale() == factor / 2
    assert all(torch.equal(p, after[name]) for name, p in other.named_parameters())


def test_b_learns_faster_with_lora_plus():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW({"x.lora_A": a, "x.lora_B": b}, OptimizerOptions(lora_plus_ratio=4))
    optimizer.backward((a + b).sum())
    optimizer.step(0.01, 10.0)
    torch.testing.assert_close(1 - b, 4 * (1 - a))
    assert a.max() < 1


def test_float16_trains(tiny, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [chat("say ab", f"word {i}") for i in range(8)])
    values = {"model": str(tiny), "data": data, "output": tmp_path / "run", "method": "lora", "dtype": "float16"}
    record = train(TrainOptions(**values, epochs=6, batch_size=4, lr=1e-2, warmup_steps=0)).record
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.3
    assert record["skipped_steps"] == sum("grad_norm" in x and x["grad_norm"] is None for x in losses)


@pytest.mark.parametrize("rates, expected", [((9, 5), torch.bfloat16), ((4, 5), torch.float32)])
def test_the_faster_type_is_chosen_and_a_detour_is_said(monkeypatch, rates, expected):
    narrow, wide = (1e9 * rate for rate in rates)
    monkeypatch.setattr(machine, "product_rates", lambda *dtypes: [narrow, wide])
    dtype, reason = pick_dtype("auto", torch.device("cpu"))
    assert dtype == expected
    if expected == torch.float32:
        assert reason == "float32: this CPU multiplies at 5 GFLOP/s, in bfloat16 at 4"
    else:
        assert reason is None
    assert pick_dtype("float16", torch.device("cpu")) == (torch.float16, None)

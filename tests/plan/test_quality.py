"""The figures of the expectations against the files and the arithmetic that they name."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from twinlora.evaluate.stats import paired_interval, ratio_interval
from twinlora.numerics import ops
from twinlora.plan.quality import FORMATS, SMALL, expected, rounding

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_what_nf4_costs_a_small_model_is_what_the_result_says():
    ways = json.loads((RESULTS / "banking77.json").read_text())["ways"]
    lora, qlora = (
        [statistics.mean(row) for row in zip(*(run["hits"] for run in ways[f"twinlora-{m}"].values()), strict=True)]
        for m in ("lora", "qlora")
    )
    found = expected("qlora", SMALL - 1)
    assert (found.points, found.low, found.high) == pytest.approx(
        tuple(100 * value for value in paired_interval(qlora, lora)), abs=0.05
    )
    assert "61.3 against 63.8" in found.source
    assert round(100 * statistics.mean(qlora), 1) == 61.3
    assert round(100 * statistics.mean(lora), 1) == 63.8


def test_what_a_mix_costs_a_small_model_is_what_the_result_says():
    ways = json.loads((RESULTS / "hybrid.json").read_text())["ways"]
    base = ways["16bit"]["runs"]

    def difference(name):
        runs = ways[name]["runs"]
        tokens, rows = next(iter(runs.values()))["loss_tokens"], []
        for of in (runs, base):
            rows.append([statistics.mean(row) for row in zip(*(of[seed]["loss_rows"] for seed in runs), strict=True)])
        return ratio_interval([ours - theirs for ours, theirs in zip(*rows, strict=True)], tokens)

    mean, low, high = difference("4")
    source = expected("hybrid", SMALL - 1).source
    assert f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) at 4.0 bits" in source
    assert f"NF4 {difference('nf4-64-dq256')[0]:+.3f}" in source
    assert ways["4"]["bits_per_linear_weight"] == pytest.approx(4.0, abs=0.01)


def test_what_papers_measured_on_large_models():
    t5 = {  # arXiv 2305.14314, table 3: Rouge-L of T5 80M, 250M, 780M, 3B, 11B
        "full": (40.1, 42.1, 48.0, 54.3, 62.0), "lora": (40.5, 42.6, 47.1, 55.4, 60.7),
        "int8": (40.4, 42.9, 45.4, 56.5, 60.7),
    }  # fmt: skip
    for method, scores in t5.items():
        points = statistics.mean(scores) - statistics.mean(t5["lora"])
        assert expected(method, SMALL).points == pytest.approx(points, abs=0.06)
    assert expected("qlora", SMALL).points == pytest.approx(53.1 - 53.0)
    assert all(expected(m, n).source for m in ("full", "lora", "int8", "qlora", "hybrid") for n in (1, 10**12))


def test_rounding_errors_are_those_of_the_formats():
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    nf4 = (ops.quantize(weight).dequantize(torch.float32) - weight).square().mean()
    scale = weight.view(-1, 64).abs().amax(1, keepdim=True) / 127
    int8 = ((weight.view(-1, 64) / scale).round() * scale).view_as(weight)
    ratio = float((int8 - weight).square().mean() / nf4)
    assert {f.name: f.rounding for f in FORMATS}["int8"] == pytest.approx(ratio, rel=0.05)
    bits = {f.name: f.bits for f in FORMATS}
    assert bits["nf4"] == pytest.approx(8 * ops.quantize(weight).nbytes / weight.numel(), abs=0.001)


def test_more_bits_never_round_more():
    errors = [rounding(bits / 10) for bits in range(30, 165)]
    assert errors == sorted(errors, reverse=True)
    assert rounding(16) == 0
    assert rounding(FORMATS[1].bits) == 1
    assert rounding(32, 32) == 0
    assert rounding(16, 32) > 0

"""What is derived between simulated settings, against the settings simulated themselves."""

import dataclasses

import pytest
import torch

from tests.conftest import tiny_config
from twinlora.config import PlanOptions
from twinlora.plan.overhead import Overhead
from twinlora.plan.rows import RESERVE, solve
from twinlora.plan.ways import Conditions, Ways
from twinlora.plan.workload import assumed


@pytest.fixture(scope="module")
def maker():
    """Of a llama whose weights outweigh what a micro-batch keeps; batches of one micro-batch, or of up to 8."""
    config = tiny_config(num_hidden_layers=6, hidden_size=256, intermediate_size=512, vocab_size=2000)
    options = PlanOptions(model="tiny", batch_size=8, length=128, rows=8, micro_batch_tokens=1024)
    return Ways(config, assumed(options), Conditions(options, "cuda", torch.bfloat16, None, Overhead(0, 0)))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_derived_peak_is_near_the_simulated_one(maker, method):
    way = next(way for way in maker.make() if way.method == method)
    derived = [candidate for candidate in way.candidates if not candidate.exact]
    assert len(derived) >= 2
    assert {candidate.micro_batches for candidate in way.candidates} == {1, 2, 4, 8}
    for candidate in derived:
        alone = solve(dataclasses.replace(way, candidates=(candidate,)), 1 << 40, RESERVE)
        simulated = next(c for c in maker.exact(alone).candidates if c.exact)
        assert candidate.peak == pytest.approx(simulated.peak, rel=0.015), (candidate, simulated)

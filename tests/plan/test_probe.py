"""Steps of small models: what is seen of them is what a plan counts."""

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from twinlora.numerics import cpu
from twinlora.plan import probe
from twinlora.plan.speed import launched, names
from twinlora.plan.work import Counts

CPU = torch.device("cpu")


def seen(step):
    """Names of its calls."""
    return {names(kinds[0])[0] for kinds in step.calls}


def made(like, dtype=torch.float32, **changes):
    step, *_ = probe.steps(replace(like, **changes), CPU, dtype)
    step.look_within()
    return step


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_a_step_does_what_is_counted(rank):
    """With a kernel for every operation, those that run are those that a plan counts."""
    if not cpu.paths() or not cpu.has_blocks():
        pytest.skip("this processor has no kernels between the products")
    step = made(probe.TINY, torch.bfloat16, rank=rank)
    ran = Counts(Counter(kind for kinds in step.calls for kind in kinds))
    assert ran.flops == pytest.approx(step.counts.flops, rel=0.01)
    assert launched(ran) == pytest.approx(launched(step.counts), rel=0.01)
    waited = {"elementwise _local_scalar_dense"}  # for the loss
    assert {names(kind)[0] for kind in ran.calls_of} - waited == {names(kind)[0] for kind in step.counts.calls_of}


def test_layers_have_the_formats_in_turn_and_every_format_is_seen():
    precision = probe.MIXED.precision()
    assert probe.TINY.precision() is None
    assert len(precision) == 8 * 7
    assert [precision[f"model.layers.{i}.mlp.up_proj"] for i in range(5)] == [*probe.MIXED.formats, "16bit"]
    step = made(probe.TINY, formats=probe.MIXED.formats)
    assert {"product dense_linears narrow float32", "nf4 product nf4_linears float32"} <= seen(step)
    assert {"int8 product blockwise_linear float32", "nf3 product blockwise_linear_transposed float32"} <= seen(step)
    assert {"product mm narrow float32", "norm rms_norm"} <= seen(step)


def test_every_batch_is_a_step_of_its_tokens():
    short, long = list(probe.steps(replace(probe.TINY, batches=((8, 24), (96,))), CPU, torch.float32))
    assert [short.tokens, long.tokens] == [32, 96]
    assert 2 < sum(long.counts.flops.values()) / sum(short.counts.flops.values()) < 4
    assert short.run() > 0


def test_without_a_rank_all_weights_are_trained():
    assert max(len(kinds) for kinds in made(probe.TINY, rank=None).calls) == 4 * 9 + 3, "parameters of one update"
    assert max(len(kinds) for kinds in made(probe.TINY).calls) == 4 * 7 * 2


def test_seconds_of_a_call_are_its_median_and_include_what_is_waited_for():
    x = torch.ones(4)
    waited = []
    with probe.Watch(lambda: waited.append(time.sleep(0.01))) as watch:
        y = x + x
        y.view(2, 2)
    assert [kinds[0].op for kinds, _ in watch.calls] == ["add"], "a view is no work"
    assert len(waited) == 2
    assert watch.calls[0][1] >= 0.01
    step = made(probe.TINY)
    kinds = step.calls[0]
    step._seconds = {kinds: [5.0, 1.0, 2.0]}
    assert step.seconds_of == {kinds: 2.0}

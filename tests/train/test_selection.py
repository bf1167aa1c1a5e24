"""Early stopping and the best evaluation."""

import contextlib
import json

import pytest

from tests.conftest import chat, write_jsonl
from tests.train.test_loop import Notes, metrics, options, same, weights
from twinlora.adapters import passport
from twinlora.config import TrainOptions, validated
from twinlora.errors import ConfigError
from twinlora.train import loop
from twinlora.train.loop import train


@pytest.fixture
def held_out(tmp_path):
    """Rows that training on others makes worse in the end."""
    return write_jsonl(tmp_path / "eval.jsonl", [chat("say abab", f"{i * 7919} nothing like it") for i in range(6)])


def _options(tiny, data_file, output, held_out, **changes):
    values = {"epochs": 5, "lr": 5e-2, "dropout": 0.1, "eval": held_out, "eval_every": 3, "checkpoint_every": 4}
    return options(tiny, data_file, output, **values | changes)


def _curve(run):
    return {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}


def test_the_best_evaluation_is_what_is_saved(tiny, data_file, tmp_path, held_out):
    result = train(_options(tiny, data_file, tmp_path / "best", held_out))
    curve = _curve(tmp_path / "best")
    best = min(curve, key=curve.get)
    assert best < 30, "the rows must not fit"
    record = json.loads((tmp_path / "best" / "run.json").read_text())["result"]
    assert (record["saved_step"], record["eval_loss"], record["steps"]) == (best, curve[best], 30)
    assert record["last_eval_loss"] == curve[30]
    assert passport.read(tmp_path / "best" / "adapter").steps == best
    # the weights are those of that step: training on from them gives its evaluation
    last = train(_options(tiny, data_file, tmp_path / "last", held_out, keep_best=False))
    assert (last.record["saved_step"], last.record["eval_loss"]) == (30, curve[30])
    assert not same(weights(tmp_path / "best"), weights(tmp_path / "last"))
    again = train(
        options(
            tiny, data_file, tmp_path / "again", init_adapter=tmp_path / "best", lr=1e-30, max_steps=1, eval=held_out
        )
    )
    assert again.record["eval_loss"] == pytest.approx(curve[best], abs=1e-6)
    assert result.record["eval_loss"] == curve[best]


def test_patience_stops_and_both_survive_resume(tiny, data_file, tmp_path, held_out):
    whole = train(_options(tiny, data_file, tmp_path / "whole", held_out, patience=2)).record
    curve = _curve(tmp_path / "whole")
    steps = list(curve)
    best = min(curve, key=curve.get)
    assert whole["stopped_early"] is True
    assert whole["steps"] == steps[-1] == best + 6 < 30
    cut = _options(tiny, data_file, tmp_path / "cut", held_out, patience=2)
    for fail_at in (2, 5, 1, 99):
        with pytest.MonkeyPatch.context() as patch:
            step, calls = loop.train_step, []

            def failing(*args, calls=calls, step=step, fail_at=fail_at, **kwargs):
                calls.append(1)
                if len(calls) > fail_at:
                    raise RuntimeError("power cut")
                return step(*args, **kwargs)

            patch.setattr(loop, "train_step", failing)
            ends = contextlib.nullcontext() if fail_at == 99 else pytest.raises(RuntimeError, match="power cut")
            with ends:
                train(cut.model_copy(update={"resume": (tmp_path / "cut").exists()}))
    assert _curve(tmp_path / "cut") == curve
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    # a run that stopped is finished: resuming it trains no further
    notes = Notes()
    assert train(cut.model_copy(update={"resume": True}), notes).record["steps"] == steps[-1]
    assert _curve(tmp_path / "cut") == curve
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_patience_needs_evaluations(tiny, data_file, tmp_path):
    values = {"model": "m", "data": data_file, "method": "lora", "output": tmp_path / "r", "patience": 2}
    with pytest.raises(ConfigError, match="needs eval and eval_every"):
        validated(TrainOptions, values | {"eval": data_file})

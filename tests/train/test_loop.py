import json
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Notes, chat, write_jsonl
from tests.processes import Program
from twinlora.adapters import files, passport
from twinlora.config import OptimizerOptions, TrainOptions
from twinlora.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingDiverged
from twinlora.train.loop import train
from twinlora.train.optim import learning_rate


def options(tiny, data, output, **changes):
    values = {
        "model": str(tiny),
        "data": data,
        "method": "lora",
        "output": output,
        "rank": 4,
        "batch_size": 4,
        "lr": 5e-3,
        "warmup_steps": 2,
    }
    if changes.get("method") == "full":
        del values["rank"]
    return TrainOptions(**(values | changes))


def weights(run):
    return load_file(run / "adapter" / files.WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_learns_and_leaves_its_record(tiny, data_file, tmp_path, method):
    lr = 1e-3 if method == "full" else 2e-2
    result = train(
        options(tiny, data_file, tmp_path / "r", method=method, epochs=6, lr=lr, eval=data_file, eval_every=9)
    )
    lines = metrics(tmp_path / "r")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == result.record["steps"] == 36
    assert losses[-1] < 0.6 * losses[0]
    assert [line["step"] for line in lines if "eval_loss" in line] == [9, 18, 27, 36]
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["result"]["eval_loss"] == result.record["eval_loss"]
    assert record["packed"] is True
    wanted = {
        "steps",
        "loss",
        "eval_loss",
        "tokens",
        "tokens_per_second",
        "seconds",
        "peak_rss_bytes",
        "peak_device_bytes",
    }
    assert wanted | {"trainable_parameters", "backend"} <= record["result"].keys()
    if method == "full":
        assert (tmp_path / "r" / "model" / "model.safetensors").is_file()
        return
    seal = passport.read(tmp_path / "r" / "adapter")
    assert seal.system == "Be brief."
    assert seal.base_precision == ({"nf4-64-dq256": 14, "bfloat16": 1} if method == "qlora" else {"bfloat16": 15})


@pytest.mark.parametrize(
    "change",
    [{}, {"packing": "off"}, {"micro_batch_tokens": 64}, {"gradient_checkpointing": True}, {"fused": False}],
    ids=str,
)
def test_ways_to_run_the_same_step_agree(tiny, data_file, tmp_path, change):
    """Packed, padded, split, recomputed, on stock blocks: the same losses in float32."""
    expected = train(options(tiny, data_file, tmp_path / "a", dtype="float32")).record
    found = train(options(tiny, data_file, tmp_path / "b", dtype="float32", **change)).record
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-4)
    assert found["trained_tokens"] == expected["trained_tokens"]
    if change.get("packing") == "off":
        assert json.loads((tmp_path / "b" / "run.json").read_text())["packed"] is False


def test_stock_blocks_and_ours_follow_one_curve_in_bfloat16(tiny, data_file, tmp_path):
    curves = []
    for fused in (True, False):
        train(options(tiny, data_file, tmp_path / str(fused), fused=fused, epochs=3))
        curves.append([line["loss"] for line in metrics(tmp_path / str(fused))])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.03


def test_repeats_are_bit_identical_and_the_seed_counts(tiny, data_file, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(options(tiny, data_file, tmp_path / name, seed=seed, dropout=0.1))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_options_reach_the_arithmetic(tiny, data_file, tmp_path):
    plain = train(options(tiny, data_file, tmp_path / "plain")).record
    changes = [
        {"lr": 1e-3}, {"alpha": 8.0}, {"scheduler": "cosine"}, {"scheduler": "constant"}, {"warmup_steps": 1}, {"dropout": 0.5},
        {"max_grad_norm": 0.01}, {"weight_decay": 0.5}, {"beta1": 0.5}, {"beta2": 0.9}, {"shuffle": False}, {"batch_size": 6},
        {"target": ["q_proj"]}, {"epochs": 2}, {"max_steps": 3}, {"dtype": "float32"}, {"rank": 2}, {"method": "qlora"},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        found = train(options(tiny, data_file, tmp_path / str(number), **change)).record
        assert found["loss"] != plain["loss"], change
    blocks = train(options(tiny, data_file, tmp_path / "q", method="qlora", double_quant=False)).record
    assert blocks["base_precision"]["nf4-64"] == 14


def test_resume_is_bit_identical(tiny, data_file, tmp_path):
    arguments = {"epochs": 3, "dropout": 0.1, "checkpoint_every": 4}
    train(options(tiny, data_file, tmp_path / "whole", **arguments))
    # The same schedule cut short: kill the run by an error after the checkpoint of step 8.
    cut = options(tiny, data_file, tmp_path / "cut", **arguments)
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 11:
                raise RuntimeError("power cut")
            return step(*args, **kwargs)

        from twinlora.train import loop

        step = loop.train_step
        patch.setattr(loop, "train_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            train(cut)
    notes = Notes()
    train(cut.model_copy(update={"resume": True}), notes)
    assert "resume: continuing after step 8 of 18" in notes.lines
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    drop = ("seconds",)
    curves = [
        [{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / n)] for n in ("whole", "cut")
    ]
    assert curves[0] == curves[1]


def _start(tiny, data, run, *extra):
    arguments = ["--model", str(tiny), "--data", str(data), "--method", "lora", "--output", str(run), "--rank", "4"]
    arguments += ["--batch-size", "2", "--epochs", "8", "--checkpoint-every", "7", "--dropout", "0.1"]
    return Program(["train", *arguments, *extra], run.with_suffix(".log"))


def _wait_for_metrics(run, program, lines):
    while program.running:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= lines:
            return
        time.sleep(0.005)


def test_sigkill_at_random_moments_then_resume_ends_bit_identical(tiny, data_file, tmp_path):
    status, said = _start(tiny, data_file, tmp_path / "whole").end()
    assert status == 0, said
    moment, run = random.Random(0), tmp_path / "killed"
    for attempt in range(3):
        program = _start(tiny, data_file, run, *(["--resume"] if attempt else []))
        before = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
        _wait_for_metrics(run, program, max(1, before) + moment.randrange(1, 30))
        time.sleep(moment.random() * 0.05)
        program.signal(signal.SIGKILL)
        program.end()
    status, said = _start(tiny, data_file, run, "--resume").end()
    assert status == 0, said
    assert "continuing after step" in said
    assert same(weights(tmp_path / "whole"), weights(run))
    assert [line["loss"] for line in metrics(tmp_path / "whole")] == [line["loss"] for line in metrics(run)]
    assert not list(run.glob(".*adapter*"))
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(tiny, data_file, tmp_path, number, expected):
    run = tmp_path / "r"
    program = _start(tiny, data_file, run)
    _wait_for_metrics(run, program, 3)
    program.signal(number)
    status, said = program.end()
    assert status == expected, said
    assert "continue with the same command and --resume" in said
    step = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()


def test_resume_without_a_checkpoint_starts_at_zero_and_says_so(tiny, data_file, tmp_path):
    notes = Notes()
    result = train(options(tiny, data_file, tmp_path / "r", resume=True), notes)
    assert any("no checkpoint" in line and "starting at step 0" in line for line in notes.lines)
    assert result.record["steps"] == 6


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "missing"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tiny, data_file, tmp_path, damage):
    run = tmp_path / "r"
    train(options(tiny, data_file, run, checkpoint_every=2, keep_checkpoints=3))
    reference = weights(run)
    newest = run / "checkpoints" / "step-000006"
    tensors = newest / "state.safetensors"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "flip":
        blob = bytearray(tensors.read_bytes())
        blob[-1] ^= 1
        tensors.write_bytes(blob)
    elif damage == "manifest":
        (newest / "manifest.json").write_text("[]")
    else:
        tensors.unlink()
    notes = Notes()
    train(options(tiny, data_file, run, checkpoint_every=2, keep_checkpoints=3, resume=True), notes)
    assert any(line.startswith("skipped step-000006") for line in notes.lines)
    assert "resume: continuing after step 4 of 6" in notes.lines
    assert same(weights(run), reference)


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tiny, data_file, tmp_path):
    train(options(tiny, data_file, tmp_path / "r"))
    with pytest.raises(CheckpointError, match=r"options.lr: was 0.005, now 0.001"):
        train(options(tiny, data_file, tmp_path / "r", resume=True, lr=1e-3))
    other = write_jsonl(data_file, [chat("other", "data")] * 24)
    with pytest.raises(CheckpointError, match="the content of data "):
        train(options(tiny, other, tmp_path / "r", resume=True))


def test_an_earlier_run_is_not_touched_unless_asked(tiny, data_file, tmp_path):
    run = tmp_path / "r"
    train(options(tiny, data_file, run))
    (run / "mine.txt").write_text("keep")
    before = weights(run)
    with pytest.raises(ConfigError, match="--resume to continue it, --overwrite"):
        train(options(tiny, data_file, run, seed=1))
    assert same(weights(run), before)
    train(options(tiny, data_file, run, seed=1, overwrite=True))
    assert not same(weights(run), before)
    assert (run / "mine.txt").read_text() == "keep"


def test_two_runs_in_one_directory(tiny, data_file, tmp_path):
    run = tmp_path / "r"
    program = _start(tiny, data_file, run)
    _wait_for_metrics(run, program, 2)
    with pytest.raises(ConfigError, match="another process is writing"):
        train(options(tiny, data_file, run, overwrite=True))
    program.signal(signal.SIGKILL)
    program.end()


def test_a_loss_that_is_not_finite_names_step_and_rows(tiny, data_file, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step [2-9]\d*: loss [\s\S]*train.jsonl:\d+"):
        train(options(tiny, data_file, tmp_path / "r", method="full", lr=1e30, warmup_steps=0, epochs=5))


def test_nothing_is_written_when_the_data_is_wrong(tiny, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [chat("a" * 4000, "b")])
    with pytest.raises(DataError):
        train(options(tiny, bad, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_starting_from_an_adapter(tiny, data_file, tmp_path):
    train(options(tiny, data_file, tmp_path / "a"))
    begun = train(options(tiny, data_file, tmp_path / "b", init_adapter=tmp_path / "a", max_steps=1, shuffle=False))
    fresh = train(options(tiny, data_file, tmp_path / "c", max_steps=1, shuffle=False))
    assert begun.record["loss"] < fresh.record["loss"]


def test_schedules():
    linear = OptimizerOptions(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, 8, linear) for s in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    constant = OptimizerOptions(lr=1.0, warmup_steps=0, scheduler="constant")
    assert {learning_rate(s, 8, constant) for s in range(8)} == {1.0}
    cosine = OptimizerOptions(lr=1.0, warmup_steps=0, scheduler="cosine")
    assert learning_rate(4, 8, cosine) == pytest.approx(0.5)


def test_a_models_own_code_runs_only_where_it_is_trusted(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "own"
    shutil.copytree(tiny, model)
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        train(options(model, data_file, tmp_path / "no", max_steps=1))
    found = train(options(model, data_file, tmp_path / "yes", max_steps=1, trust_remote_code=True))
    assert type(found.model).__module__.startswith("transformers_modules")

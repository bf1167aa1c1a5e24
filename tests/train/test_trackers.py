"""Trackers get the records of metrics.jsonl. TensorBoard is the real one, the others stand-ins that write calls down."""

import json
import sys

import pytest

from tests.train.test_loop import Notes, metrics, options
from twinlora.errors import BackendError
from twinlora.train import loop, trackers
from twinlora.train.loop import train

# What we call of each library, with the signatures that it has (wandb 0.31, mlflow 3.17, trackio 0.43).
STAND_INS = {
    "wandb": """
calls = []
class Run:
    def log(self, data, step=None, commit=None): calls.append(("log", step, data))
    def finish(self, exit_code=None, quiet=None): calls.append(("finish", exit_code))
def init(*, project=None, id=None, name=None, config=None, resume=None):
    calls.append(("init", project, name, id, resume)); print("welcome"); return Run()
""",
    "mlflow": """
from types import SimpleNamespace
calls = []
def set_experiment(experiment_name=None): calls.append(("experiment", experiment_name))
def start_run(run_id=None, experiment_id=None, run_name=None):
    calls.append(("init", run_name, run_id)); return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "given"))
def log_params(params): calls.append(("params", sorted(params)))
def log_metrics(metrics, step=None): calls.append(("log", step, metrics))
def end_run(status="FINISHED"): calls.append(("finish", status))
""",
    "trackio": """
calls = []
class Run:
    def log(self, metrics, step=None): calls.append(("log", step, metrics))
    def finish(self): calls.append(("finish",))
def init(project, name=None, config=None, resume="never", embed=True):
    calls.append(("init", project, name, resume)); return Run()
""",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def make(name):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / f"{name}.py").write_text(STAND_INS[name])
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setitem(sys.modules, name, None)  # so that the stand-in is taken out again
        del sys.modules[name]
        for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "TRACKIO_PROJECT"):
            monkeypatch.delenv(variable, raising=False)
        import importlib

        return importlib.import_module(name).calls

    return make


def _sent(run):
    return [(r["step"], {k: v for k, v in r.items() if k != "step"}) for r in metrics(run)]


@pytest.mark.parametrize("name", STAND_INS)
def test_records_go_to_the_library(tiny, data_file, tmp_path, stand_in, name, capsys):
    calls = stand_in(name)
    run = tmp_path / "r"
    given = options(tiny, data_file, run, report_to=[name], eval=data_file, eval_every=3, checkpoint_every=4)
    train(given)
    assert [call[1:] for call in calls if call[0] == "log"] == _sent(run)
    assert calls[-1][0] == "finish"
    assert calls[-1][1:] in ((), (0,), ("FINISHED",))
    assert capsys.readouterr().out == ""  # stdout belongs to --json
    first = next(call for call in calls if call[0] == "init")
    calls.clear()
    train(given.model_copy(update={"resume": True}))
    again = next(call for call in calls if call[0] == "init")
    known = json.loads((run / "trackers.json").read_text())[name]
    assert known in again
    assert again == first or name == "mlflow"  # mlflow hands out the id itself


def test_a_run_that_fails_is_marked(tiny, data_file, tmp_path, stand_in, monkeypatch):
    calls = stand_in("wandb")

    def failing(*_, **__):
        raise RuntimeError("power cut")

    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(RuntimeError):
        train(options(tiny, data_file, tmp_path / "r", report_to=["wandb"]))
    assert calls[-1] == ("finish", 1)


def test_a_tracker_that_breaks_is_left_out_with_a_line(tiny, data_file, tmp_path, stand_in):
    stand_in("trackio")

    def broken(*_, **__):
        raise OSError("no route to host")

    sys.modules["trackio"].Run.log = broken
    notes = Notes()
    assert train(options(tiny, data_file, tmp_path / "r", report_to=["trackio"]), notes).record["steps"] == 6
    assert [line for line in notes.lines if "report_to" in line] == [
        "report_to trackio: failed at step 1 and is left out: OSError: no route to host"
    ]


def test_one_that_does_not_start_is_an_error_before_the_weights(tiny, data_file, tmp_path, stand_in, monkeypatch):
    stand_in("wandb")

    def refused(**_):
        raise ValueError("no API key")

    sys.modules["wandb"].init = refused
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(BackendError, match="report_to wandb: cannot start: ValueError: no API key"):
        train(options(tiny, data_file, tmp_path / "r", report_to=["wandb"]))


def test_a_missing_library_is_named_with_its_pip_line_before_anything_else(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loop, "read_inputs", lambda *_: pytest.fail("inputs were read"))
    with pytest.raises(BackendError, match=r"report_to wandb, mlflow: not installed; pip install wandb mlflow"):
        train(options(tiny, data_file, tmp_path / "r", report_to=["wandb", "mlflow"]))


def test_tensorboard_has_each_record_once_also_after_a_resume(tiny, data_file, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = options(
        tiny, data_file, tmp_path / "r", report_to=["tensorboard"], eval=data_file, eval_every=3, checkpoint_every=2
    )
    with monkeypatch.context() as patch:
        step, calls = loop.train_step, []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 6:
                raise RuntimeError("power cut")
            return step(*args, **kwargs)

        patch.setattr(loop, "train_step", failing)
        with pytest.raises(RuntimeError):
            train(given)
    train(given.model_copy(update={"resume": True}))
    events = accumulator.EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    lines = metrics(tmp_path / "r")
    for name in ("loss", "lr", "eval_loss"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in lines if name in r]

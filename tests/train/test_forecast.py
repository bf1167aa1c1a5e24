"""A prediction beside every run, and runs that the planner sets up."""

import json

import pytest
import torch

from tests.train.test_loop import options
from twinlora import machine
from twinlora.adapters.merge import Merged
from twinlora.cli.main import parse_options
from twinlora.errors import ConfigError, OutOfMemory
from twinlora.export.bnb import save_bnb
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.load import resolve
from twinlora.numerics.formats import NF4Format
from twinlora.plan import answer, predict, score
from twinlora.plan.overhead import Overhead
from twinlora.train import memory, rehearsal
from twinlora.train.loop import train

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
PLANNED = {"plan": "auto", "max_steps": 2}  # one workload, so that its steps are simulated once


@pytest.fixture
def history(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINLORA_HISTORY", str(tmp_path / "history.jsonl"))
    return tmp_path / "history.jsonl"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What is measured goes to a directory of the test; what a process takes is measured elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (predict, answer):
        monkeypatch.setattr(module, "overhead", lambda: Overhead(300 << 20, 1 << 20))


def document(path):
    return json.loads((path / "run.json").read_text())


def test_a_run_has_its_prediction_beside_it_and_joins_the_history(tiny, data_file, tmp_path, history):
    record = train(options(tiny, data_file, tmp_path / "r", method="qlora")).record
    found = document(tmp_path / "r")["result"]["predicted"]
    assert found == record["predicted"]
    assert sum(found["by_cause"].values()) == found["peak_bytes"]
    assert found["by_cause"]["quantisation constants"] > 0
    assert "fragmentation" in found["by_cause"]
    assert 0.5 < record["step_peak_rss_bytes"] / found["peak_bytes"] < 2
    (run,) = score.read(print)
    assert (run.method, run.measured_peak_bytes) == ("qlora", record["step_peak_rss_bytes"])
    assert run.measured_step_seconds == pytest.approx(record["seconds"] / record["steps"])


def test_no_prediction_is_made_where_none_is_kept(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "predict", pytest.fail)
    assert train(options(tiny, data_file, tmp_path / "r")).record["predicted"] is None


def test_a_prediction_that_fails_fails_no_run(tiny, data_file, tmp_path, history, monkeypatch):
    def broken(*_, **__):
        raise ValueError("cannot be simulated\nat all")

    monkeypatch.setattr(predict, "predict", broken)
    assert train(options(tiny, data_file, tmp_path / "r")).record["predicted"] is None
    assert "no prediction beside this run: ValueError: cannot be simulated" in document(tmp_path / "r")["notes"]
    assert not history.exists()


def test_a_history_that_cannot_be_written_fails_no_run(tiny, data_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TWINLORA_HISTORY", str(tmp_path / "file" / "history.jsonl"))
    assert train(options(tiny, data_file, tmp_path / "r")).record["predicted"]
    assert any("missing from the history" in note for note in document(tmp_path / "r")["notes"])


def test_the_planner_sets_a_run_up_and_a_resumed_one_stays(tiny, data_file, tmp_path, monkeypatch):
    given = PLANNED | {"method": None, "goal": "memory"}
    first = train(options(tiny, data_file, tmp_path / "r", **given)).record
    assert first["method"] in ("lora", "qlora", "hybrid")
    assert any(note.startswith("plan: Choose") for note in document(tmp_path / "r")["notes"])
    monkeypatch.setattr("twinlora.plan.auto.planned_options", pytest.fail)
    again = train(options(tiny, data_file, tmp_path / "r", resume=True, **given)).record
    assert again["method"] == first["method"]


def test_of_a_base_in_4_bits_qlora_alone_is_chosen(tiny, tokenizer, data_file, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_bnb(Merged(Checkpoint(resolve(str(tiny))), None), base, tokenizer, torch.bfloat16, NF4Format())
    for number, (given, method) in enumerate(((None, "qlora"), ("lora", "lora"))):
        run = tmp_path / f"r{number}"
        train(options(base, data_file, run, method=given, plan="auto", goal="accuracy", max_steps=1))
        assert document(run)["options"]["method"] == method
        said = any("stored in 4 bits" in note for note in document(run)["notes"])
        assert said == (given is None)


def test_what_is_given_stays_as_it_is(tiny, data_file, tmp_path):
    given = PLANNED | {"method": "qlora", "gradient_checkpointing": "on"}
    train(options(tiny, data_file, tmp_path / "r", **given))
    chosen = document(tmp_path / "r")["options"]
    assert (chosen["method"], chosen["gradient_checkpointing"]) == ("qlora", "on")


def test_a_hybrid_is_planned_as_its_file_of_layers_says(tiny, data_file, tmp_path):
    layers = [f"model.layers.{i}.{linear}" for i in range(2) for linear in LINEARS]
    for kind, bits in (("int8-64", "8.5"), ("nf3-64-dq256", "3.1")):
        file, run = tmp_path / f"{kind}.json", tmp_path / kind
        file.write_text(json.dumps(dict.fromkeys(layers, kind)))
        train(options(tiny, data_file, run, **PLANNED | {"method": "hybrid", "layer_precision": file}))
        assert any(f"hybrid at {bits} bits" in note for note in document(run)["notes"] if note.startswith("plan: "))


def test_what_fits_nowhere_is_said_before_a_weight_is_loaded(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**6)
    monkeypatch.setattr(machine, "rss_bytes", lambda: 0)
    with pytest.raises(ConfigError, match=r"Nothing fits into 1 MiB"):
        train(options(tiny, data_file, tmp_path / "r", **PLANNED, method=None))


def test_a_method_is_asked_for(tiny, data_file, tmp_path):
    with pytest.raises(ValueError, match="choose lora, qlora, hybrid or full, or plan auto"):
        options(tiny, data_file, tmp_path / "r", method=None)


def test_running_out_of_memory_names_the_cause(tiny, data_file, tmp_path, history, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(rehearsal, "loss_sum", exhausted)
    with pytest.raises(OutOfMemory, match=r"predicted peak [\d.]+ GiB[\s\S]*what a pass holds took more"):
        train(options(tiny, data_file, tmp_path / "r"))


@pytest.mark.parametrize(
    "weights, trained, total, said",
    [(2000, 10, 10**9, "the weights take"), (1000, 1000, 10**9, "what trains takes"),
     (1000, 10, 2000, "nothing exceeded that, there are 0.00 GiB"),
     (1000, 10, 2500, "nothing exceeded that, but of 0.00 GiB others hold 0.00 GiB"),
     (1000, 10, 10**9, "what a pass holds took more")],
)  # fmt: skip
def test_the_cause_is_what_exceeds_its_prediction(weights, trained, total, said, monkeypatch):
    monkeypatch.setattr(predict, "_memory", lambda device: (total, 700))
    causes = {"weights": 900, "quantisation constants": 100, "adapter": 40, "gradients": 40, "optimiser": 80}
    causes |= {"activations": 500, "loss head": 100, "workspace": 0, "runtime": 300}
    prediction = predict.Prediction(sum(causes.values()), causes, None, None)
    assert said in predict.blame(prediction, weights=weights, trained=trained, device=torch.device("cpu"))


def test_a_run_that_goes_on_with_less_says_which_cause_took_more(tiny, data_file, tmp_path, history, monkeypatch):
    kept, calls = rehearsal.loss_sum, []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return kept(*args, **kwargs)

    monkeypatch.setattr(rehearsal, "loss_sum", once)
    train(options(tiny, data_file, tmp_path / "r", max_steps=1))
    (note,) = [note for note in document(tmp_path / "r")["notes"] if note.startswith("out of memory: predicted peak")]
    assert note.endswith("what a pass holds took more")


def test_full_float32_weights_are_their_own_masters(tiny, data_file, tmp_path, history, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(rehearsal, "loss_sum", exhausted)
    with pytest.raises(OutOfMemory, match="what a pass holds took more"):
        train(options(tiny, data_file, tmp_path / "r", method="full", dtype="float32", on_oom="stop"))


def test_what_did_not_run_as_planned_joins_no_history(tiny, data_file, tmp_path, history, monkeypatch):
    """Neither a run that is resumed with what an earlier part of it gave up, nor one that was at its end."""
    given = {"max_steps": 2, "dtype": "float32"}
    train(options(tiny, data_file, tmp_path / "r", **given))
    assert len(score.read(print)) == 1
    train(options(tiny, data_file, tmp_path / "r", resume=True, **given))
    assert len(score.read(print)) == 1

    monkeypatch.setattr(memory.Memory, "state", lambda self: {"micro_batch_tokens": 300, "checkpointing": False})
    train(options(tiny, data_file, tmp_path / "less", **given))
    assert len(score.read(print)) == 1


def test_what_is_given_bounds_what_is_chosen(tiny, data_file, tmp_path, own_cache):
    given = PLANNED | {"method": "hybrid", "bits": 6.5, "gradient_checkpointing": "off", "micro_batch_tokens": 30}
    train(options(tiny, data_file, tmp_path / "r", **given))
    chosen, notes = (document(tmp_path / "r")[key] for key in ("options", "notes"))
    assert (chosen["bits"], chosen["gradient_checkpointing"], chosen["micro_batch_tokens"]) == (6.5, "off", 30)
    assert any("hybrid at 6.5 bits" in note and "keeping activations" in note for note in notes)


@pytest.mark.parametrize("given, most", [([], 8192), (["--micro-batch-tokens", "2048"], 2048)])
def test_what_is_not_given_is_the_planners_to_choose(tiny, data_file, tmp_path, monkeypatch, given, most):
    asked = []

    def planned(options, *_, **__):
        asked.append(options.micro_batch_tokens)
        raise ConfigError("enough")

    monkeypatch.setattr("twinlora.plan.auto.plan", planned)
    arguments = ["--model", str(tiny), "--data", str(data_file), "--output", str(tmp_path / "r"), "--plan", "auto"]
    with pytest.raises(ConfigError, match="enough"):
        train(parse_options("train", [*arguments, *given]))
    assert asked == [most]


def test_scales_are_those_of_the_checkpoint(tiny, tokenizer, data_file, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_bnb(Merged(Checkpoint(resolve(str(tiny))), None), base, tokenizer, torch.bfloat16, NF4Format(64, 0))
    train(options(base, data_file, tmp_path / "r", method=None, plan="auto", max_steps=1))
    assert document(tmp_path / "r")["options"]["double_quant"] is False


def test_a_hybrid_run_is_predicted_in_its_own_formats(tiny, data_file, tmp_path, history, own_cache):
    record = train(options(tiny, data_file, tmp_path / "r", method="hybrid", bits=6, max_steps=1)).record
    causes = record["predicted"]["by_cause"]
    stored = causes["weights"] + causes["quantisation constants"]
    assert stored == pytest.approx(record["base_weight_bytes"], rel=1e-3)


def test_the_budget_of_a_hybrid_base_stays_as_it_is(tiny, data_file, tmp_path, own_cache):
    given = PLANNED | {"method": "hybrid", "memory": "110KB"}
    record = train(options(tiny, data_file, tmp_path / "r", **given)).record
    assert record["base_weight_bytes"] <= 110_000
    found = document(tmp_path / "r")
    assert (found["options"]["memory"], found["options"]["bits"]) == ("110KB", None)
    stored = [note for note in found["notes"] if note.startswith("hybrid: ")][-1]
    bits = float(stored.split()[1])
    planned = next(note for note in found["notes"] if note.startswith("plan: Choose hybrid at "))
    assert float(planned.split()[4]) == pytest.approx(bits, abs=0.1), "planned at the bits that it has"

"""A whole plan, over a simulation that is arithmetic; one over the real one."""

import json
import shutil

import pytest

from tests.conftest import chat, write_jsonl
from tests.plan import fake
from tests.plan.test_model import quantised
from twinlora.cli.main import main
from twinlora.config import PlanOptions
from twinlora.errors import ConfigError, DataError, ModelError
from twinlora.plan import answer, ways
from twinlora.plan.overhead import Overhead
from twinlora.plan.words import command
from twinlora.reporter import Reporter

GIB = 2**30


@pytest.fixture
def simulated(monkeypatch):
    ways._done.clear()
    monkeypatch.setattr(ways, "simulate", fake.simulate)
    monkeypatch.setattr(answer, "overhead", lambda: Overhead(300 << 20, 1 << 20))
    yield
    ways._done.clear()


def plan(**options):
    return answer.plan(PlanOptions(**({"model": "llama-7b", "device": "RTX 4090"} | options)), Reporter())


def row(found, method):
    return next(row for row in found.rows if row.method == method)


def test_peaks_are_the_simulation_of_the_largest_micro_batch(simulated):
    found = plan(length=512, batch_size=16)
    lora = row(found, "lora")
    assert lora.fit == "fits"
    tokens = lora.setting.micro_batch_tokens
    each = fake.PER_TOKEN // (5 if lora.setting.checkpointing else 1)
    assert lora.by_cause["activations"] == pytest.approx(tokens * each, rel=1e-6)
    assert row(found, "full").fit == "does not fit"
    assert row(found, "qlora").peak < lora.peak
    assert found.choice.method == "lora"
    assert lora.setting.micro_batch_tokens * lora.setting.micro_batches == 16 * 512


def test_what_may_fit_is_simulated_and_not_only_interpolated(simulated):
    found = plan(memory="15GiB")
    assert found.choice.row.setting.exact
    close = [row for row in found.rows if abs(row.needed / row.memory - 1) < 0.05 and row.method != "hybrid"]
    assert all(row.setting.exact for row in close)


@pytest.mark.parametrize("goal, method", [("balanced", "lora"), ("memory", "qlora"), ("edge", "qlora")])
def test_the_goal_decides(simulated, goal, method):
    assert plan(goal=goal).choice.method == method


def test_memory_decides_and_solving_again_says_what_would_change_it(simulated):
    small = plan(memory="9GiB")
    assert small.choice.method == "qlora"
    up = next(change for change in small.changes if change.memory and change.memory > 9 * GIB)
    assert up.method == "hybrid"
    # At the border itself two settings of a mix are as good as each other, so a little beyond it.
    assert plan(memory=f"{1.02 * up.memory / GIB:.3f}GiB").choice.method == "hybrid"
    assert plan(memory=f"{0.98 * up.memory / GIB:.3f}GiB").choice.method == "qlora"
    assert plan(memory="3GiB").choice.reason == "nothing fits"


def test_the_longest_row_of_the_data_decides_and_packing_counts(simulated, tmp_path, tiny):
    rows = [chat("a" * 20, "b" * 20)] * 40 + [chat("a" * 300, "b" * 60)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = plan(model=str(tiny), data=[str(data)], batch_size=8, micro_batch_tokens=1024)
    longest = found.workload.longest
    assert longest > 360
    assert found.workload.largest(1).lengths == (longest,)
    assert sum(found.workload.largest(1024).lengths) <= 1024
    padded = plan(model=str(tiny), data=[str(data)], batch_size=8, micro_batch_tokens=8192, packing="off")
    packed = plan(model=str(tiny), data=[str(data)], batch_size=8, micro_batch_tokens=8192)
    assert padded.workload.largest(8192).size(packed=False) == 8 * longest
    assert packed.workload.largest(8192).size(packed=True) < 4 * longest
    assert packed.workload.tokens == padded.workload.tokens
    filled = {-(-sum(len(row.ids) for row in batch) // 64) for batch in packed.workload.batches}
    assert 1 < packed.workload.sizes(8192) == len(filled) < len(packed.workload.batches) + 1
    assert padded.workload.sizes(8192) == len({max(len(r.ids) for r in b) * len(b) for b in padded.workload.batches})
    (count, mean), (count_padded, mean_padded) = (w.workload.micro_batches(8192) for w in (packed, padded))
    assert count * mean == pytest.approx(packed.workload.tokens)
    assert count_padded * mean_padded > 1.3 * packed.workload.tokens


def test_time_grows_with_the_epochs(simulated):
    once, twice = plan(), plan(epochs=2)
    assert row(twice, "lora").seconds == pytest.approx(2 * row(once, "lora").seconds)
    assert row(twice, "lora").tokens_per_second == pytest.approx(row(once, "lora").tokens_per_second)


def test_the_command_is_one_that_train_takes(simulated, tmp_path, tiny):
    from twinlora.cli.main import parse_options

    data = write_jsonl(tmp_path / "my rows.jsonl", [chat("a", "b")] * 4)
    found = plan(model=str(tiny), data=[str(data)], rank=8, batch_size=2, memory="12GiB")
    import shlex

    words = shlex.split(found.command)
    options = parse_options("train", words[2:])
    assert (options.method, options.rank, options.batch_size) == (found.choice.method, 8, 2)
    assert options.data == [str(data)]
    assert options.micro_batch_tokens == found.choice.row.setting.micro_batch_tokens
    assert plan().command is None  # a shape without a checkpoint has nothing to train from


def test_of_a_base_in_4_bits_qlora_alone_is_planned(simulated, tmp_path):
    found = plan(model=quantised(tmp_path, bnb_4bit_use_double_quant=False), memory="30GiB", goal="accuracy")
    assert [row.method for row in found.rows] == ["qlora"]
    assert "stored in 4 bits" in found.left_out
    assert found.sentences[0].startswith("Choose QLoRA: no other way was planned")
    assert found.options.double_quant is False
    assert found.document()["left_out"] == found.left_out
    assert plan(memory="30GiB").left_out is None
    assert plan(memory="3GiB", model=quantised(tmp_path)).choice.method is None
    assert [row.method for row in plan(init="loftq").rows] == ["qlora"]


def test_a_cpu_without_the_pool_of_tensors_loses_memory_that_is_not_planned(simulated, monkeypatch):
    def said(**options):
        return any("heap loses to holes" in note for note in plan(**options).notes)

    monkeypatch.setattr(answer.pool, "refusal", lambda: None)
    assert not said(device="cpu")
    monkeypatch.setattr(answer.pool, "refusal", lambda: "there is none")
    assert said(device="cpu")
    assert not said(device="RTX 4090")


def test_gb_is_told_from_gib(simulated):
    assert "24 GB are 22.4 GiB" in plan(memory="24GB").notes[0]
    assert plan(memory="24GiB").memory == 24 * GIB
    assert not any("GiB" in note for note in plan(memory="24GiB").notes)
    assert "30.0 GiB as given are more than RTX 4090 has: 24.0 GiB" in plan(memory="30GiB").notes


def test_the_articles_figures_stand_beside_ours(simulated):
    claims = " ".join(plan(model="gpt3-175b", device="H200").claims)
    assert "0.57 %" in claims  # 40 M of 7 B: the arithmetic of the fake
    assert "wrong" in claims
    assert not any("24 GB" in claim for claim in plan().claims)


def test_an_unknown_device_is_asked_to_be_measured(simulated):
    with pytest.raises(ConfigError, match=r"never guessed(.|\n)*RTX 4090(.|\n)*--calibrate"):
        plan(device="RTX 4090 Super")
    with pytest.raises(ModelError, match="llama-7b"):
        plan(model="llama7b")


def test_no_rates_are_said_and_no_times_are_made_up(simulated, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = plan(device="cpu", dtype="bfloat16", memory="64GiB")
    assert all(row.seconds is None for row in found.rows)
    assert any("--calibrate" in note for note in found.notes)


def test_the_terminal_gets_everything_and_nothing_is_cut(simulated, capsys):
    from rich.console import Console

    from twinlora.cli.plan import show

    for width, memory in ((80, "9GiB"), (120, "9GiB"), (80, "2GiB"), (80, "400GiB")):
        console = Console(width=width, record=True, highlight=False)
        console.print(show(plan(memory=memory), width))
        text = console.export_text()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        assert ("does not fit" in text) == (memory != "400GiB")
        assert "quantisation constants" in text
        assert "changes" in text
    capsys.readouterr()


def test_on_a_narrow_terminal_nothing_is_cut_either(simulated, capsys, monkeypatch):
    from rich.console import Console

    from twinlora.cli.plan import _show_plan

    shown = []
    for columns in (80, 50):
        terminal = Console(width=columns, highlight=False, soft_wrap=True, emoji=False)
        monkeypatch.setattr("twinlora.cli.plan.out", terminal)
        _show_plan(plan(memory="9GiB"))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "…" not in shown[0]


def test_what_the_heap_loses_is_a_cause_on_a_cpu_alone(simulated, capsys):
    found = plan(device="cpu", memory="400GiB")
    for planned in found.rows:
        tokens = planned.setting.micro_batch_tokens
        assert planned.by_cause["fragmentation"] == pytest.approx(tokens * fake.HOLES, rel=1e-6)
        assert planned.peak == sum(planned.by_cause.values())
    assert main(["plan", "llama-7b", "--device", "cpu", "--memory", "400GiB"]) == 0
    assert "fragmentation" in capsys.readouterr().out
    assert main(["plan", "llama-7b", "--device", "RTX 4090"]) == 0
    assert "fragmentation" not in capsys.readouterr().out


def test_what_is_simulated_is_said(simulated):
    rows = {row["method"]: row for row in plan(memory="15GiB").document()["rows"]}
    assert rows["lora"]["simulated"]
    assert not rows["hybrid"]["simulated"], "its layers are chosen later"
    found = plan(memory=f"{rows['int8']['needed_bytes']}B")
    assert row(found, "int8").setting.exact, "so close to the border"


def test_without_something_to_train_from_a_line_says_why_there_is_no_command(simulated):
    found = plan(model="gpt3-175b", memory="2000GiB")
    assert found.command is None
    assert any(note.startswith("no command: built-in shape") for note in found.notes)


def test_what_a_process_holds_already_counts(simulated):
    options = PlanOptions(model="llama-7b", device="cpu", memory="64GiB")
    bare, held = (answer.plan(options, Reporter(), held=held) for held in (0, 5 * GIB))
    assert row(held, "lora").by_cause["runtime"] - row(bare, "lora").by_cause["runtime"] == 5 * GIB - (300 << 20)


def test_data_of_which_an_epoch_shows_nothing_is_one_message(simulated, tmp_path, tiny):
    data = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")] * 10)
    with pytest.raises(DataError, match=r"would show none; give at least @0\.051"):
        plan(model=str(tiny), data=[f"{data}@0.01"])


def test_json_is_one_document(simulated, capsys):
    assert main(["plan", "llama-7b", "--device", "A40", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["choice"] == "lora"
    assert {row["method"] for row in document["rows"]} == {"full", "lora", "int8", "qlora", "hybrid"}
    for found in document["rows"]:
        assert sum(found["by_cause"].values()) == found["peak_bytes"]
        assert found["expected"]["source"]


def test_a_model_that_is_not_packed_is_planned_padded(simulated, tmp_path, tiny):
    """Rows of gemma 2 and of a GPT-2 with dropout are filled up to the longest of their micro-batch."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("x" * 10, "y")] * 15 + [chat("x" * 400, "y")])
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    given = {"model": str(model), "data": [str(rows)], "device": "RTX 4090"}
    packed = plan(**given).ways
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    padded = plan(**given).ways
    activations = [made[1].candidates[0].by_cause["activations"] for made in (packed, padded)]
    lengths = [len(e.ids) for e in answer.tokenised(PlanOptions(**given), answer.describe(str(model)), print).examples]
    assert activations[0] == sum(lengths) * fake.PER_TOKEN
    assert activations[1] == max(lengths) * len(lengths) * fake.PER_TOKEN


@pytest.mark.parametrize("given, least", [({}, 3.13), ({"double_quant": False}, 3.5), ({"block_size": 128}, 3.07)])
def test_no_fewer_bits_are_planned_than_the_formats_take(simulated, given, least):
    found = plan(memory="3.4GiB", **given)
    assert row(found, "hybrid").bits == least
    assert f"--bits {least:.2f} " in command(row(found, "hybrid"), found.options, "m")
    scales = 32 / given.get("block_size", 64)
    assert row(found, "int8").bits == 8 + scales


def test_rows_that_were_assumed_long_pass(simulated, tiny):
    assert "--max-length 4096" in plan(model=str(tiny), length=4096, memory="24GiB").command
    assert "--max-length" not in plan(model=str(tiny), memory="24GiB").command


def test_float32_has_no_times_by_peaks_of_16_bit(simulated):
    found = plan(dtype="float32")
    assert found.rates is None
    assert any("16-bit products" in note for note in found.notes)


def test_calibration_is_of_a_device_that_is_here(capsys, monkeypatch):
    measured = []
    monkeypatch.setattr("twinlora.plan.calibrate.calibrate", lambda device, _: measured.append(device) or 1 / 0)
    assert main(["plan", "--calibrate", "--device", "RTX 4090"]) == 2
    assert "--calibrate measures this machine, not 'RTX 4090'" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main(["plan", "--calibrate", "--device", "cpu"])
    assert [device.type for device in measured] == ["cpu"]


def test_a_missing_model_is_one_message(capsys):
    assert main(["plan"]) == 2
    assert "model is missing" in capsys.readouterr().err


def test_the_real_simulation_of_a_tiny_model(tiny, monkeypatch, tmp_path):
    found = plan(model=str(tiny / "config.json"), length=64, batch_size=2, rows=4, micro_batch_tokens=128)
    lora, qlora = row(found, "lora"), row(found, "qlora")
    config = found.planned.config
    assert lora.way.parameters == config.vocab_size * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
    assert lora.way.quantised_weights == pytest.approx(2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128), rel=0.02)
    assert qlora.by_cause["weights"] < lora.by_cause["weights"]
    assert lora.seconds > 0
    assert found.command is None


def test_memory_without_a_unit_is_refused_and_the_least_memory_is_planned_for(simulated, capsys):
    assert main(["plan", "llama-7b", "--memory", "3"]) == 2
    assert "'3' is less than a MiB: give a unit, for example 24GiB" in capsys.readouterr().err
    assert plan(memory="1MiB").choice.reason == "nothing fits"

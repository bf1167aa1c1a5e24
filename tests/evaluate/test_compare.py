import json
import os
import random
import signal
import threading
import time

import pytest

from tests.conftest import Notes, chat, write_jsonl
from tests.evaluate.results import way
from tests.processes import FORKED
from twinlora.cli.main import main
from twinlora.config import CompareOptions
from twinlora.data.sources import read_rows
from twinlora.errors import ConfigError, DataError, Interrupted, OutOfMemory
from twinlora.evaluate import compare as module
from twinlora.evaluate import worker
from twinlora.evaluate.metrics import Prediction
from twinlora.evaluate.report import SearchPoint, load
from twinlora.model.load import resolve
from twinlora.reporter import Reporter


def letters(count, seed):
    """A task that a tiny model learns: answer with the one letter that the message repeats."""
    generator = random.Random(seed)
    return [chat(generator.choice("ab") * generator.randrange(2, 9) + f" {seed}{i}", "x") for i in range(count)]


def options(tiny, tmp_path, **changes):
    data, test = write_jsonl(tmp_path / "tr.jsonl", letters(40, 1)), write_jsonl(tmp_path / "te.jsonl", letters(10, 2))
    values = {
        "model": str(tiny), "data": data, "eval": test, "output": tmp_path / "out", "lr_grid": [1e-3, 1e-2, 3.0],
        "batch_size": 8, "validation_rows": 8, "max_new_tokens": 4, "warmup_steps": 2,
    }  # fmt: skip
    return CompareOptions(**(values | changes))


def test_two_methods_in_their_own_processes(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "get_context", lambda _: FORKED)
    data, test = write_jsonl(tmp_path / "tr.jsonl", letters(160, 1)), write_jsonl(tmp_path / "te.jsonl", letters(10, 2))
    arguments = ["--model", str(tiny), "--data", str(data), "--eval", str(test), "--output", str(tmp_path / "out")]
    arguments += ["--methods", "lora,full", "--lr-grid", "1e-3,1e-2", "--batch-size", "8", "--validation-rows", "8"]
    general = tmp_path / "general.txt"
    general.write_text("A first paragraph\nof two lines.\n\n\n第二段。\n", encoding="utf-8")
    arguments += ["--metric", "exact-match,chrf", "--general", str(general)]
    assert main(["compare", *arguments, "--max-new-tokens", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    report = load(tmp_path / "out" / "report.json")
    assert document == report.model_dump(mode="json")
    assert [way.method for way in report.ways] == ["base", "lora", "full"]
    assert report.data["rows"] == {"train": 152, "search": 38, "validation": 8, "test": 10}
    base, lora, full = report.ways
    assert base.scores["exact-match"].value < 0.3
    assert lora.scores["exact-match"].value > 0.6
    assert list(lora.scores) == ["exact-match", "chrf"]
    assert lora.scores["chrf"].value >= lora.scores["exact-match"].value
    assert base.general.before == base.general.after == lora.general.before == full.general.before
    assert lora.general.after != full.general.after != base.general.after
    assert [(d.a, d.b) for d in report.forgetting] == [("lora", "base"), ("full", "base"), ("lora", "full")]
    rise = lora.general.after - lora.general.before
    assert report.forgetting[0].value == pytest.approx(rise)
    assert len(lora.general.tokens) == 2, "the paragraphs of the file"
    assert full.trainable_parameters > lora.trainable_parameters > 0
    assert lora.curve[0].loss == pytest.approx(full.curve[0].loss, abs=1e-3), "same start, same first rows"
    assert len(lora.search) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert report.verdict.sentence.split(":")[0] in page
    assert main(["compare", *arguments]) == 2
    assert "give --overwrite" in capsys.readouterr().err


def test_what_quantising_costs_is_measured_apart_from_forgetting(tiny, tmp_path):
    from twinlora.config import ModelOptions
    from twinlora.evaluate import worker
    from twinlora.evaluate.general import encode_texts, read_texts
    from twinlora.evaluate.metrics import row_losses
    from twinlora.evaluate.opening import open_model

    chosen = options(tiny, tmp_path, dtype="float32")
    found = worker.measure_quantised(chosen, "qlora")
    means = {}
    for precision in ("16bit", "nf4"):
        opened = open_model(
            ModelOptions(model=str(tiny), dtype="float32"), {}, precision=precision, reporter=Reporter()
        )
        examples = encode_texts(opened.tokenizer, read_texts(None), chosen.max_length)
        rows = row_losses(opened.model, examples, micro_batch_tokens=512, packed=False, plain_head=False)
        means[precision] = sum(row.total for row in rows) / sum(row.tokens for row in rows)
    assert found.before == found.after == pytest.approx(means["nf4"], rel=1e-4)
    assert abs(means["nf4"] - means["16bit"]) > 1e-2
    now = found.model_copy(update={"after": 9.0, "rows_after": [1.0]})
    assert module._since(found, now).before == found.after


def test_hybrid_beside_lora_with_one_choice_of_precisions_for_all_its_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_in_process", lambda name, function, *arguments: function(*arguments))
    sizes, answer = [], worker.predict

    def watched(*arguments, batch_size, **more):
        sizes.append(batch_size)
        return answer(*arguments, batch_size=batch_size, **more)

    monkeypatch.setattr(worker, "predict", watched)
    few = {"search_rows": 9, "eval_batch_size": 5}
    chosen = options(tiny, tmp_path, methods=["lora", "hybrid"], bits=5, lr_grid=[1e-2], dtype="float32", **few)
    report = module.compare(chosen)
    assert (report.data["rows"]["search"], set(sizes)) == (9, {5})
    _, lora, hybrid = report.ways
    assert hybrid.base_weight_bytes < lora.base_weight_bytes
    assert len(hybrid.base_precision) > 2
    assert hybrid.general.before != lora.general.before, "forgetting is counted from its own base"
    layers = json.loads((tmp_path / "out" / "data" / "layer_precision.json").read_text())
    for run in ("search/hybrid-lr0.01", "runs/hybrid"):
        assert (
            json.loads((tmp_path / "out" / run / "adapter" / "twinlora.json").read_text())["layer_precision"] == layers
        )
    assert any("--precision auto" in command for command in report.next_commands)


def test_rows_on_which_the_methods_disagree_are_shown_first():
    said = [Prediction(f"p{i}", "x", f"o{i}") for i in range(9)]
    ways = [
        way(m, scores) for m, scores in (("base", [0.0] * 9), ("lora", [1.0] * 9), ("qlora", [1.0] * 7 + [0.0, 1.0]))
    ]
    samples = module._samples({w.method: said for w in ways}, ways)
    assert [sample.prompt for sample in samples] == ["p7", "p0", "p1", "p2", "p3", "p4"]
    assert samples[0].scores == {"base": 0.0, "lora": 1.0, "qlora": 0.0}


def test_best_rate_and_its_edge():
    points = [SearchPoint(lr=lr, validation_loss=loss, seconds=1) for lr, loss in ((1, 3.0), (2, 2.0), (3, None))]
    assert module._best(points) == (2, False)
    assert module._best(points[:2]) == (2, True)
    assert module._best(points[1:2]) == (2, False), "one rate is a choice, not a search"
    assert module._best(points[2:]) == (None, False)


def test_validation_rows_are_disjoint_from_test_rows_and_training_rows(tiny, tmp_path):
    shared = letters(6, 1)
    test = write_jsonl(tmp_path / "shared.jsonl", shared)
    notes = Notes()
    train, validation, held_out = module._split(options(tiny, tmp_path, eval=test, validation_rows=32), notes)
    assert (len(train), len(validation), len(held_out)) == (8, 32, 6)
    assert not {module._prompt(r) for r in validation} & {module._prompt(r) for r in [*train, *held_out]}
    assert notes.lines[2:] == ["data: 6 of 40 training rows ask what a test row asks; test figures flatter"]
    with pytest.raises(DataError, match="6 validation row"):
        module._split(options(tiny, tmp_path, eval=test, validation=test), notes)
    with pytest.raises(DataError, match="too few"):
        module._split(options(tiny, tmp_path, validation_rows=39), notes)
    twice = write_jsonl(tmp_path / "twice.jsonl", letters(20, 1) * 2)
    train, validation, _ = module._split(options(tiny, tmp_path, data=twice, validation_rows=6), notes)
    assert not {module._prompt(r) for r in validation} & {module._prompt(r) for r in train}
    with pytest.raises(DataError, match=r"40 validation row.s. ask what a training row asks"):
        module._split(options(tiny, tmp_path, validation=tmp_path / "tr.jsonl"), notes)


@pytest.mark.parametrize(
    "changes, message",
    [({"target": ["q_porj"]}, "q_porj"), ({"max_length": 9}, "tokens"), ({"block_size": 77}, "block size 77"),
     ({"layers": "99"}, "99"), ({"methods": ["hybrid"], "bits": 2.0}, "bits")],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_an_earlier_comparison_is_removed(tiny, tmp_path, changes, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        module.compare(options(tiny, tmp_path, overwrite=True, **changes))
    assert (tmp_path / "out" / "report.json").exists()


def test_a_method_that_fails_takes_nothing_from_the_others(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "get_context", lambda _: FORKED)
    kept = module._in_process

    def in_process(what, function, *arguments):
        if what == "qlora":
            raise OutOfMemory("out of memory; lower --micro-batch-tokens\nmore")
        return kept(what, function, *arguments)

    monkeypatch.setattr(module, "_in_process", in_process)
    found = module.compare(options(tiny, tmp_path, methods=["qlora", "lora"], lr_grid=[1e-2]))
    assert [way.method for way in found.ways] == ["base", "lora"]
    assert list(found.failed) == ["qlora"]
    assert "QLoRA failed (out of memory; lower --micro-batch-tokens). Mend that" in found.verdict.sentence
    assert load(tmp_path / "out" / "report.json") == found


@pytest.mark.parametrize(
    "changes",
    [{"lr_grid": [1e-3, 1e-3]}, {"lr_grid": [-1.0]}, {"methods": ["lora", "lora"]}, {"metric": []}],
)
def test_wrong_options(tiny, tmp_path, changes):
    with pytest.raises(ValueError, match="expected"):
        options(tiny, tmp_path, **changes)


def test_metrics_and_texts_are_checked_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(DataError, match="10 of 10 rows do not expect a JSON object"):
        module.compare(options(tiny, tmp_path, metric=["json-fields"]))
    with pytest.raises(DataError, match=r"none.txt: cannot be read"):
        module.compare(options(tiny, tmp_path, general=tmp_path / "none.txt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mark", [".comparison", "report.json"])
def test_an_earlier_comparison_is_not_overwritten_unasked(tiny, tmp_path, mark):
    source = resolve(str(tiny))
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds runs, but is not a comparison of ours; give another --output"):
        module._claim(options(tiny, tmp_path, overwrite=True), source)
    (tmp_path / "out" / mark).write_text("{}")
    with pytest.raises(ConfigError, match="holds an earlier comparison"):
        module._claim(options(tiny, tmp_path), source)
    module._claim(options(tiny, tmp_path, overwrite=True), source)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".comparison", "mine.txt"]


@pytest.mark.parametrize("name", ["data", "eval", "validation", "general", "model"])
def test_what_is_read_is_not_removed(tiny, tmp_path, name):
    inside = tmp_path / "out" / "data" / "x"
    inside.parent.mkdir(parents=True)
    (tmp_path / "out" / "report.json").write_text("{}")
    if name == "model":
        inside = tmp_path / "out" / "runs" / "full" / "model"
        inside.mkdir(parents=True)
        for file in tiny.iterdir():
            os.link(file, inside / file.name)
    else:
        write_jsonl(inside, letters(20, 5))
    given = options(tiny, tmp_path, overwrite=True, **{name: str(inside)})
    with pytest.raises(ConfigError, match="is read here, and lies where"):
        module._claim(given, resolve(given.model))
    assert inside.exists()


def _hang(options, test):
    (options.output / "pid").write_text(str(os.getpid()))
    time.sleep(300)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_of_a_run_and_says_what_is_lost(tiny, tmp_path, monkeypatch, number):
    monkeypatch.setattr(module, "get_context", lambda _: FORKED)
    monkeypatch.setattr(worker, "measure_base", _hang)
    pid = tmp_path / "out" / "pid"

    def stop():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted, match=r"what was measured is lost.*the same command with --overwrite") as caught:
        module.compare(options(tiny, tmp_path))
    assert caught.value.exit_status == 128 + number
    assert str(caught.value).startswith(f"stopped by {number.name}; ")
    end = time.monotonic() + 60
    while _alive(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(int(pid.read_text()))


def test_methods_get_the_options_that_they_have(tiny, tmp_path):
    given = options(tiny, tmp_path, methods=["lora", "full"], rank=4, dora=True, lora_plus_ratio=4.0)
    assert module._of_method(given, "lora") == given
    given = given.model_copy(update={"block_size": 128})
    assert [module._of_method(given, name).block_size for name in ("lora", "qlora", "full")] == [64, 128, 64]
    assert worker.train_options(module._of_method(given, "lora"), "lora").rank == 4
    full = worker.train_options(module._of_method(given, "full"), "full")
    assert (full.rank, full.dora, full.lora_plus_ratio, full.batch_size) == (16, False, 1.0, 8)


def test_errors_in_a_process_arrive_here(tiny, tmp_path):
    import os

    from twinlora.errors import BackendError

    with pytest.raises(BackendError, match="probe: its process died"):
        module._in_process("probe", os._exit, 9)
    with pytest.raises(ValueError, match="invalid literal"):
        module._in_process("probe", int, "x")


def test_sources_of_any_form_and_weight_reach_the_runs(tiny, tmp_path):
    data = tmp_path / "tr.csv"
    data.write_text("question,answer\n" + "".join(f"p{i},c\n" for i in range(40)))
    more = write_jsonl(tmp_path / "more.jsonl", letters(20, 3))
    test = write_jsonl(tmp_path / "te.jsonl", letters(4, 2))
    columns = ["prompt=question", "completion=answer"]
    sources = [str(data), f"{more}@0.5"]
    given = options(tiny, tmp_path, data=sources, eval=test, columns=columns, validation_rows=8, methods=["lora"])
    rows, validation, held_out = module._split(given, Notes())
    splits = module._write(given, rows, validation, held_out)
    again = worker._train_options(given, "lora", 1e-3, splits.train, splits.validation, tmp_path / "r")
    assert again.columns == []
    assert len(again.data) == 2
    assert {(r.weight, r.where.rsplit("/", 1)[1].split(":")[0]) for r in read_rows(again.data)} == {
        (1.0, "train-1.jsonl"),
        (0.5, "train-0.5.jsonl"),
    }


def test_texts_have_no_exact_match(tiny, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match=r"3 rows without an answer in words[\s\S]*--metric loss"):
        module.compare(options(tiny, tmp_path, eval=texts), Notes())

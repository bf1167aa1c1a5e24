"""What is to be shipped, found or refused before anything is written."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from tests.conftest import Notes, chat, write_jsonl
from tests.export.conftest import run
from twinlora.adapters import passport
from twinlora.adapters.files import read_adapter
from twinlora.config import ExportOptions, MergeOptions
from twinlora.errors import AdapterError, BackendError, ConfigError, DataError, ModelError
from twinlora.export import ship
from twinlora.export.subject import open_subject


def opened(run_directory, out, **options):
    reporter = Notes()
    return open_subject(MergeOptions(run=run_directory, output=out, rows=2, **options), reporter), reporter


@pytest.fixture
def own(base, rows, tmp_path):
    """A run on a copy of the base that a test may spoil, and that copy."""
    shutil.copytree(base, tmp_path / "base")
    return run(tmp_path / "base", rows, tmp_path / "run", method="lora", max_steps=1), tmp_path / "base"


def test_a_base_that_has_moved_is_named_anew(own, tmp_path):
    trained, base = own
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"(?s)no such directory.*if the base has moved, give --model with its place"):
        opened(trained, tmp_path / "out")
    subject, _ = opened(trained, tmp_path / "out", model=str(tmp_path / "moved"))
    assert subject.source.path == (tmp_path / "moved").resolve()


def test_another_base_is_refused(lora, tiny, tmp_path):
    with pytest.raises(
        AdapterError, match=r"(?s)trained on another base model\n.*trained on: .*loading on: .*give --mo"
    ):
        opened(lora, tmp_path / "out", model=str(tiny))


def test_another_tokenizer_is_refused_and_another_template_said(own, tmp_path):
    trained, base = own
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "bot")
    tokenizer.save_pretrained(base)
    _, reporter = opened(trained, tmp_path / "out")
    assert any("trained with another chat template" in line for line in reporter.lines)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(base)
    with pytest.raises(AdapterError, match="was trained with another tokenizer"):
        opened(trained, tmp_path / "out")


def test_a_damaged_or_unfinished_run_is_said(lora, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(lora, copy)
    for text in ('{"options": {', "[1]", '{"options": 3}', ""):
        (copy / "run.json").write_text(text)
        with pytest.raises(AdapterError, match=r"run.json: damaged \(.*\); delete it, and name held-out rows"):
            opened(copy, tmp_path / "out")
        with pytest.raises(AdapterError, match=r"run.json: damaged"):
            opened(copy / "adapter", tmp_path / "out")
    shutil.rmtree(copy / "adapter")
    (copy / "run.json").unlink()
    with pytest.raises(AdapterError, match=r"did not finish, and has no adapter yet; continue it .*--resume"):
        opened(copy, tmp_path / "out")


def test_an_adapter_takes_no_rows_of_a_run_that_it_is_not_of(lora, tmp_path):
    """It lies in the directory of a run, under another name than the run's own."""
    copy = tmp_path / "copy"
    shutil.copytree(lora, copy)
    (copy / "adapter").rename(copy / "guest")
    with pytest.raises(DataError, match="no rows to compare on are known"):
        opened(copy / "guest", tmp_path / "out")


def test_a_peft_directory_with_a_config_of_its_model_is_an_adapter(lora, base, tmp_path):
    shutil.copytree(read_adapter(lora).directory, tmp_path / "a")
    shutil.copyfile(base / "config.json", tmp_path / "a" / "config.json")
    subject, _ = opened(tmp_path / "a", tmp_path / "out", gate=False)
    assert subject.adapter is not None


def test_a_whole_model_has_no_base(base, tmp_path):
    with pytest.raises(ConfigError, match=r"is a whole model and has no base; leave it out"):
        opened(base, tmp_path / "out", model=str(base))


def test_rows_longer_than_the_model_are_cut_and_said(lora, tmp_path):
    rows = write_jsonl(tmp_path / "long.jsonl", [chat("x" * 600, "ab")])
    subject, reporter = opened(lora, tmp_path / "out", data=[str(rows)])
    assert [len(example.ids) for example in subject.examples] == [256]
    assert any("cut to 256 tokens: 1 examples" in line for line in reporter.lines)


def test_a_program_that_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ship.importlib.util, "find_spec", lambda name: None)
    for to, package in (("bnb", "bitsandbytes"), ("peft", "peft"), ("gguf", "xllamacpp"), ("gguf-lora", "xllamacpp")):
        options = ExportOptions(run=tmp_path / "nothing", output=tmp_path / "out", to=to)
        with pytest.raises(BackendError, match=f"pip install {package}, or write it unseen with --no-gate$"):
            ship.export(options)
    options = ExportOptions(run=tmp_path / "nothing", output=tmp_path / "out", to="gguf", edge=True, gate=False)
    with pytest.raises(BackendError, match=r"with --no-gate and without --edge$"):
        ship.export(options)


def test_a_deployed_adapter_without_its_run_is_said_not_to_be_proved(base, rows, tmp_path):
    trained = run(base, rows, tmp_path / "run", method="lora", deploy="q8_0", max_steps=1)
    shutil.copytree(trained / "adapter", tmp_path / "a")
    data = json.loads((trained / "run.json").read_text())["options"]["data"]
    _, reporter = opened(tmp_path / "a", tmp_path / "out", data=data)
    assert any("not compared to the bit" in line for line in reporter.lines)
    _, reporter = opened(trained, tmp_path / "out", data=data)
    assert not any("not compared to the bit" in line for line in reporter.lines)


def test_a_peft_adapter_is_compared_on_the_base_that_is_asked_for(qlora, tmp_path):
    for kind, expected in (("auto", "dequantised"), ("16bit", "16bit")):
        options = ExportOptions(run=qlora, output=tmp_path / kind, to="peft", base=kind, rows=2)
        assert ship.export(options)["base"] == expected


def test_the_passport_stays_with_an_exported_adapter(lora, tmp_path):
    ship.export(ExportOptions(run=lora, output=tmp_path / "p", to="peft", rows=2))
    assert passport.read(tmp_path / "p") == passport.read(read_adapter(lora).directory)

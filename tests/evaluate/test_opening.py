"""What eval and chat find out before a base is loaded, and what they say about it."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import twinlora
from tests.conftest import Notes
from twinlora.config import ChatOptions
from twinlora.errors import AdapterError
from twinlora.evaluate import opening


def opened(base, directory):
    reporter = Notes()
    options = ChatOptions(model=str(base), dtype="float32", device="cpu")
    opening.open_model(options, {"a": directory}, precision="16bit", reporter=reporter)
    return reporter.lines


def saved(tiny, directory, **options):
    model, _ = twinlora.load(tiny, dtype="float32", device="cpu")
    twinlora.attach(model, **({"rank": 2} | options)).save_pretrained(directory)
    return directory


def forbid_loading(monkeypatch):
    monkeypatch.setattr(opening, "load_model", lambda *_, **__: pytest.fail("the base was loaded"))


def test_whole_modules_are_refused_before_the_base_is_loaded(tiny, tmp_path, monkeypatch):
    adapter = saved(tiny, tmp_path / "a", modules_to_save=["lm_head"])
    forbid_loading(monkeypatch)
    with pytest.raises(AdapterError) as caught:
        opened(tiny, adapter)
    assert f"`twinlora merge {adapter} --output DIR`, then give --model DIR" in str(caught.value)


def test_another_tokenizer_is_refused_before_the_base_is_loaded(tiny, tmp_path, monkeypatch):
    adapter = saved(tiny, tmp_path / "a")
    base = shutil.copytree(tiny, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(base)
    forbid_loading(monkeypatch)
    with pytest.raises(AdapterError, match="was trained with another tokenizer"):
        opened(base, adapter)


def test_another_template_is_said_once(tiny, tmp_path):
    adapter = saved(tiny, tmp_path / "a")
    assert not any("template" in line for line in opened(tiny, adapter))
    paper = json.loads((adapter / "twinlora.json").read_text())
    (adapter / "twinlora.json").write_text(json.dumps(paper | {"chat_template_sha256": "0" * 64}))
    assert sum("trained with another chat template" in line for line in opened(tiny, adapter)) == 1


def test_hashes_that_cannot_be_kept_are_a_note(tiny, tmp_path, monkeypatch):
    adapter = saved(tiny, tmp_path / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert any("fingerprint not kept" in line for line in opened(tiny, adapter))

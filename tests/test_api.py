"""`import twinlora`: cheap, and strict about options."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import twinlora
from tests.conftest import chat, write_jsonl
from twinlora.adapters import files, passport
from twinlora.adapters.lora import lora_layers
from twinlora.errors import AdapterError, ConfigError


def test_importing_costs_nothing_until_it_is_used():
    code = "import sys, twinlora; assert 'torch' not in sys.modules; twinlora.load; assert 'torch' in sys.modules"
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(twinlora.__all__) <= set(dir(twinlora))
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has .*finetune"):
        twinlora.trian  # noqa: B018


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda tiny: twinlora.load(tiny, precison="nf4"), r"twinlora.load.*\n.*precison.*\n.*known options: .*precision"),
        (lambda tiny: twinlora.load(tiny, precision="int4"), r"precision: .*'16bit' or 'nf4'.*\(got 'int4'\)"),
        (lambda tiny: twinlora.attach(twinlora.load(tiny)[0], ranks=4), r"ranks.*\n.*known options: .*rank"),
        (lambda tiny: twinlora.attach(twinlora.load(tiny)[0], init="loftq"), "while they are quantised"),
        (lambda tiny: twinlora.finetune(model=str(tiny), speed=1), r"3 problem\(s\)"),
    ],
)  # fmt: skip
def test_wrong_options(tiny, call, message):
    with pytest.raises(ConfigError, match=message):
        call(tiny)


def test_a_prompt_may_be_text_or_messages(tiny):
    model, tokenizer = twinlora.load(tiny)
    model.train()
    said = twinlora.generate(model, tokenizer, "hello", max_new_tokens=8)
    assert model.training
    assert said == twinlora.generate(model, tokenizer, [{"role": "user", "content": "hello"}], max_new_tokens=8)
    drawn = {twinlora.generate(model, tokenizer, "hello", max_new_tokens=8, temperature=2.0, seed=s) for s in range(4)}
    assert len(drawn) > 1
    tokenizer.chat_template = None
    assert twinlora.generate(model, tokenizer, "hello", max_new_tokens=8) != said
    with pytest.raises(ConfigError, match="no chat template"):
        twinlora.generate(model, tokenizer, [{"role": "user", "content": "hello"}])


def test_an_adapter_goes_on_training_and_keeps_its_passport(tiny, tmp_path, capsys):
    model, tokenizer = twinlora.load(tiny, precision="nf4")
    twinlora.attach(model, rank=2).save_pretrained(tmp_path / "a")
    kept = passport.read(tmp_path / "a")
    assert (kept.method, kept.steps, kept.base_model) == ("qlora", None, str(tiny))
    again, _ = twinlora.load(tiny, adapter=tmp_path / "a")
    assert "trained on 14 layers nf4-64-dq256, 1 layers" in capsys.readouterr().err
    assert again.training
    assert all(layer.lora_B.requires_grad for layer in lora_layers(again).values())
    other = tmp_path / "other"
    changed = twinlora.load(tiny)[0]
    changed.model.norm.weight.data += 1
    changed.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(AdapterError, match="another base"):
        twinlora.load(other, adapter=tmp_path / "a")


def test_loading_needs_no_cache(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    twinlora.load(tiny)
    assert "fingerprint not kept" in capsys.readouterr().err


def test_loading_checks_the_tokenizer(tiny, tmp_path):
    model, tokenizer = twinlora.load(tiny)
    twinlora.attach(model, rank=2).save_pretrained(tmp_path / "a")
    base = shutil.copytree(tiny, tmp_path / "base")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(base)
    with pytest.raises(AdapterError, match="was trained with another tokenizer"):
        twinlora.load(base, adapter=tmp_path / "a")


def test_what_our_loop_trained_saves_itself_too(tiny, tmp_path):
    data = write_jsonl(tmp_path / "t.jsonl", [chat(f"say {i}", f"word {i}") for i in range(8)])
    run = twinlora.finetune(model=str(tiny), data=data, method="lora", output=tmp_path / "run", rank=2, batch_size=4)
    run.model.save_pretrained(tmp_path / "again")
    saved, again = files.read_adapter(tmp_path / "run"), files.read_adapter(tmp_path / "again")
    assert all(torch.equal(saved.tensors[name][1], b) for name, (_, b) in again.tensors.items())
    assert passport.read(tmp_path / "again") == passport.read(tmp_path / "run" / "adapter")

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import twinlora
from twinlora.adapters import files
from twinlora.adapters.inspect import inspect
from twinlora.adapters.lora import lora_layers
from twinlora.cli.main import main

IDS = torch.arange(20)[None]


def saved(tiny, directory, *, trained=True, **options):
    model, _ = twinlora.load(tiny, dtype="float32")
    twinlora.attach(model, **({"rank": 4} | options))
    for layer in lora_layers(model).values() if trained else ():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    model.save_pretrained(directory)
    return model.eval()


def inspected(directory):
    return inspect(files.read_adapter(directory))


def loaders(found):
    return {loader.name: loader for loader in found.loaders}


def test_figures_are_those_of_the_matrices(tiny, tmp_path):
    model = saved(tiny, tmp_path, rank_pattern=["q_proj=7"], alpha_pattern=["v_proj=5"])
    found = inspected(tmp_path)
    layers = lora_layers(model)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.bytes == sum((tmp_path / name).stat().st_size for name in (files.CONFIG, files.WEIGHTS))
    assert found.passport.method == "lora"
    for layer in found.layers:
        ours = layers[layer.name]
        assert (layer.rank, layer.scale) == (ours.rank, ours.scale)
        assert layer.update_norm == pytest.approx(ours.update().norm().item(), rel=1e-5)
        assert layer.a_norm == pytest.approx(ours.lora_A.norm().item(), rel=1e-5)
        assert layer.shape == (ours.base.out_features, ours.base.in_features)


def test_whether_it_does_anything(tiny, tmp_path):
    saved(tiny, tmp_path / "zero", trained=False)
    saved(tiny, tmp_path / "trained")
    saved(tiny, tmp_path / "whole", trained=False, modules_to_save=["lm_head"])
    assert inspected(tmp_path / "zero").does_nothing
    assert not inspected(tmp_path / "trained").does_nothing
    assert not inspected(tmp_path / "whole").does_nothing


@pytest.mark.parametrize(
    "options, vllm, llama",
    [
        ({"rank": 9}, "yes --max-lora-rank 16", "yes as GGUF, by twinlora export --to gguf-lora"),
        ({"rank": 300}, "yes --max-lora-rank 320", "yes as GGUF"),
        ({"rank": 600}, "no rank 600 is above its limit of 512", "yes as GGUF"),
        ({"dora": True}, "no no DoRA", "no no DoRA"),
        ({"modules_to_save": ["lm_head"]}, "no no modules_to_save (lm_head)", "no no modules_to_save (lm_head)"),
        ({"alpha_pattern": ["q_proj=8"]}, "no would scale 2 of 14 layers wrongly", "yes as GGUF"),
        ({"rank_pattern": ["q_proj=8"]}, "no would scale 2 of 14 layers wrongly", "yes as GGUF"),
        ({"rank_pattern": ["q_proj=8"], "alpha_pattern": ["q_proj=64"]}, "yes --max-lora-rank 8", "yes as GGUF"),
    ],
)  # fmt: skip
def test_what_loads_it(tiny, tmp_path, options, vllm, llama):
    saved(tiny, tmp_path, **options)
    found = loaders(inspected(tmp_path))
    for name, expected in (("vLLM", vllm), ("llama.cpp", llama)):
        assert f"{'yes' if found[name].loads else 'no'} {found[name].detail}".startswith(expected)


def test_rslora_as_peft_writes_it(tiny, tmp_path):
    saved(tiny, tmp_path)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    (tmp_path / files.CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    found = loaders(inspected(tmp_path))
    assert found["vLLM"].loads
    assert found["llama.cpp"].loads


@pytest.mark.parametrize("options", [{}, {"dora": True, "modules_to_save": ["lm_head"], "rank_pattern": ["q_proj=8"]}])
def test_transformers_loads_what_we_say_it_loads(tiny, tmp_path, options):
    pytest.importorskip("peft")
    model = saved(tiny, tmp_path / "a", **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
        model.save_pretrained(tmp_path / "a")
    assert loaders(inspected(tmp_path / "a"))["transformers"].loads
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs.load_adapter(str(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-4)


def test_the_verb(tiny, tmp_path, capsys):
    saved(tiny, tmp_path / "a")
    saved(tiny, tmp_path / "zero", trained=False, dora=True)
    assert main(["adapter", "inspect", str(tmp_path / "a"), "--model", str(tiny)]) == 0
    shown = capsys.readouterr().out
    for part in ("LoRA, rank 4, scale 8", "14 layers", "parameters, ", "mean KL", "--max-lora-rank 8"):
        assert part in shown
    assert main(["adapter", "inspect", str(tmp_path / "a"), "--model", str(tiny), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["mean_kl"] > 0.01
    assert document["layers"] == json.loads(
        json.dumps([dataclasses.asdict(x) for x in inspected(tmp_path / "a").layers])
    )
    assert main(["adapter", "inspect", str(tmp_path / "zero"), "--model", str(tiny), "--json"]) == 0
    assert abs(json.loads(capsys.readouterr().out)["mean_kl"]) < 1e-4, "a DoRA at its start"
    assert main(["adapter", "inspect", str(tmp_path / "none")]) == 2
    assert main(["adapter", "inspec", "x"]) == 2
    assert "did you mean adapter inspect?" in capsys.readouterr().err


def test_the_verb_needs_no_cache(tiny, tmp_path, monkeypatch, capsys):
    saved(tiny, tmp_path / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["adapter", "inspect", str(tmp_path / "a"), "--model", str(tiny)]) == 0
    assert "fingerprint not kept" in capsys.readouterr().err


def test_the_verb_checks_the_tokenizer(tiny, tmp_path, capsys):
    saved(tiny, tmp_path / "a")
    base = shutil.copytree(tiny, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(base)
    assert main(["adapter", "inspect", str(tmp_path / "a"), "--model", str(base)]) == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err

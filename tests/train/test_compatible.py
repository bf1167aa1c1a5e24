"""What a model without weights shows, before anything is loaded or an earlier run removed; `train --for` and the
nearest options, which are then accepted."""

import json
import re
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import chat, write_jsonl
from twinlora.adapters import files
from twinlora.cli.main import main
from twinlora.config import TrainOptions
from twinlora.errors import ConfigError, DataError, InputError
from twinlora.train.loop import train


def options(tiny, data_file, tmp_path, **changes) -> TrainOptions:
    values = {"model": str(tiny), "data": data_file, "method": "lora", "max_steps": 1}
    values |= {"rank": 4, "alpha": 8} if changes.get("method") != "full" else {}
    return TrainOptions(**(values | {"output": tmp_path / "run"} | changes))


@pytest.mark.parametrize(
    ("program", "changes", "reason", "nearest"),
    [
        ("vllm", {"dora": True}, "no DoRA", "without --dora"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "no modules_to_save (lm_head)", "without --modules-to-save"),
        ("vllm", {"rank": 600}, "rank 600 is above its limit of 512", "with --rank 512"),
        ("vllm", {"rank": 300, "init": "pissa"}, "rank 600 is above its limit of 512", "with --rank 256"),
        (
            "vllm",
            {"rank_pattern": ["q_proj=8"]},
            "would scale 2 of 14 layers wrongly",
            "with --alpha-pattern q_proj=16",
        ),
        ("vllm", {"alpha_pattern": ["q_proj=16"]}, "would scale 2 of 14 layers wrongly", "without --alpha-pattern"),
        ("vllm", {"rslora": True, "rank_pattern": ["q_proj=16"]}, "would scale 2", "with --alpha-pattern q_proj=16"),
        ("llama.cpp", {"dora": True, "modules_to_save": ["norm"]}, "no DoRA", "without --dora, --modules-to-save"),
    ],
)
def test_refused_with_the_nearest(tiny, data_file, tmp_path, program, changes, reason, nearest):
    with pytest.raises(ConfigError) as error:
        train(options(tiny, data_file, tmp_path, program=program, **changes))
    message = str(error.value)
    assert message.startswith(f"--for {program}: it could not load what would be trained")
    assert reason in message
    assert nearest in message
    assert not (tmp_path / "run").exists()
    found = re.search(r"nearest that it loads: (.*)", message)[1]
    left = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", found.partition("with --")[0])}
    given = {
        name.replace("-", "_"): value
        for name, value in re.findall(r"--([a-z-]+) (\S+)", found)
        if "=" in value or value.isdigit()
    }
    better = {name: value for name, value in changes.items() if name not in left}
    better |= {name: [value] if "=" in value else int(value) for name, value in given.items()}
    if changes.get("init") == "pissa":  # this base has no 256 components
        return
    record = train(options(tiny, data_file, tmp_path, program=program, **better)).record
    assert record["steps"] == 1


@pytest.mark.parametrize("program", ["vllm", "llama.cpp", "transformers", "peft"])
def test_what_loads_is_said(tiny, data_file, tmp_path, program):
    import json

    train(options(tiny, data_file, tmp_path, program=program))
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert any(line.startswith(f"for {program}: it can be loaded") for line in notes)


def test_peft_takes_everything(tiny, data_file, tmp_path):
    train(
        options(
            tiny, data_file, tmp_path, program="peft", dora=True, modules_to_save=["norm"], rank_pattern=["q_proj=8"]
        )
    )


def test_a_model_that_is_not_written_for_llama_cpp_is_refused(data_file, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    from twinlora.adapters.loaders import GGUF_MODELS
    from twinlora.export.families import FAMILIES

    assert set(GGUF_MODELS) == set(FAMILIES)
    gpt2 = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2)).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    for method in ("lora", "full"):
        with pytest.raises(
            ConfigError, match=r"--for llama\.cpp: gpt2 models are not written as GGUF; expected one of"
        ):
            train(options(gpt2, data_file, tmp_path, program="llama.cpp", method=method))


def test_all_weights_are_no_adapter(tiny, data_file, tmp_path):
    import json

    train(options(tiny, data_file, tmp_path, program="vllm", method="full"))
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert "for vllm: all weights are trained, there is no adapter that it could refuse" in notes


@pytest.fixture(scope="module")
def earlier(tiny, tmp_path_factory):
    """A finished run."""
    directory = tmp_path_factory.mktemp("earlier")
    data = write_jsonl(directory / "data.jsonl", [chat(f"say {i}", "word") for i in range(8)])
    train(options(tiny, data, directory, seed=1))
    return directory


def _on(tiny, earlier, **changes):
    values = {"output": earlier / "run", "overwrite": True} | changes
    train(options(tiny, earlier / "data.jsonl", earlier, **values))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target": ["q_prj"]}, "q_prj"),
        ({"layers": "99"}, "99"),
        ({"modules_to_save": ["nothing"]}, "nothing"),
        ({"init_adapter": "typo"}, "typo: no such directory"),
        ({"method": "hybrid", "bits": 1.0}, "the smallest formats take"),
    ],
)
def test_an_earlier_run_stays_where_the_new_one_cannot_be(tiny, earlier, tmp_path, changes, message):
    before = (earlier / "run/adapter/adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match=message):
        _on(tiny, earlier, **changes)
    (tmp_path / "layers.json").write_text(json.dumps({"model.layers.0.nothing": "int8-64"}))
    with pytest.raises(InputError, match="no such layer"):
        _on(tiny, earlier, method="hybrid", layer_precision=tmp_path / "layers.json")
    assert (earlier / "run/adapter/adapter_model.safetensors").read_bytes() == before


def test_an_adapter_to_start_from_keeps_its_scale(tiny, earlier, tmp_path):
    start = {"init_adapter": earlier / "run" / "adapter", "output": tmp_path / "next"}
    with pytest.raises(InputError, match=r"14 layer.s. have another scale.* with 2 instead of 4; give .*--alpha 8"):
        _on(tiny, earlier, **start, alpha=16)
    with pytest.raises(InputError, match=r"with 2 instead of 4.*--rank 4 --alpha 4"):
        _on(tiny, earlier, **start, alpha=8, rslora=True)
    _on(tiny, earlier, **start, lr=1e-9)
    begun, ended = (files.read_adapter(path) for path in (start["init_adapter"], tmp_path / "next"))
    for name, (_, b) in begun.tensors.items():
        torch.testing.assert_close(ended.tensors[name][1], b, atol=1e-6, rtol=1e-4)


def test_an_adapter_to_start_from_is_of_this_base(tiny, tokenizer, earlier, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    blob = bytearray((other / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (other / "model.safetensors").write_bytes(blob)
    with pytest.raises(InputError, match="was trained on another base model"):
        _on(other, earlier, init_adapter=earlier / "run" / "adapter", output=tmp_path / "next")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="do not fit this model"):
        _on(tmp_path / "gpt2", earlier, init_adapter=earlier / "run" / "adapter", output=tmp_path / "next")


def test_an_adapter_over_conv1d_goes_on_to_everything(tokenizer, earlier, tmp_path):
    """Its layers have neither `in_features` nor `out_features`."""
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=2)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    _on(base, earlier, output=tmp_path / "run", lr=1e-2, max_steps=3)
    data = ["--data", str(earlier / "data.jsonl"), "--metric", "loss"]
    assert main(["eval", "--model", str(base), "--adapter", str(tmp_path / "run"), *data]) == 0
    _on(base, earlier, output=tmp_path / "next", init_adapter=tmp_path / "run")


def test_words_without_an_embedding_are_named(tiny, tokenizer, earlier, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    more = type(tokenizer).from_pretrained(tiny)
    more.add_tokens(["wordy"])
    more.save_pretrained(base)
    data = write_jsonl(tmp_path / "rows.jsonl", [chat("say", "word"), chat("say", "wordy")])
    with pytest.raises(DataError, match=r"rows.jsonl:2: token 259 \('wordy'\) of the tokenizer has no embedding"):
        train(options(base, data, tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_fill_token_needs_no_embedding(tiny, tokenizer, earlier, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    more = type(tokenizer).from_pretrained(tiny)
    more.add_special_tokens({"pad_token": "<more>"})
    assert more.pad_token_id == 259
    more.save_pretrained(base)
    for packing in ("auto", "off"):
        train(options(base, earlier / "data.jsonl", tmp_path, packing=packing, overwrite=True))


def test_weights_that_show_no_row_are_refused(tiny, earlier, tmp_path):
    data = f"{earlier / 'data.jsonl'}@0.01"
    with pytest.raises(DataError, match=r"of 8 rows with weight 0\.01 an epoch would show none; give at least @0.064"):
        train(options(tiny, data, tmp_path))
    train(options(tiny, f"{earlier / 'data.jsonl'}@0.064", tmp_path, seed=20250131120000))


def test_more_components_than_a_layer_has(tiny, earlier, tmp_path):
    """k_proj has 32 outputs."""
    for method, init in (("lora", "pissa"), ("qlora", "loftq")):
        _on(tiny, earlier, method=method, init=init, rank=48, output=tmp_path / init)

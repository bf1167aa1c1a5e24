"""`train --for`: refused before anything is loaded, with the nearest options, which are then accepted."""

import re

import pytest

from twinlora.config import TrainOptions
from twinlora.errors import ConfigError
from twinlora.train.loop import train


def options(tiny, data_file, tmp_path, **changes) -> TrainOptions:
    values = {"model": str(tiny), "data": data_file, "method": "lora", "rank": 4, "alpha": 8, "max_steps": 1}
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

"""Which model a plan is for: headers and configurations, never weights."""

import json

import pytest
import torch

from tests.conftest import tiny_config
from twinlora.errors import ModelError
from twinlora.model import bnb4
from twinlora.numerics.formats import NF4Format
from twinlora.plan import model
from twinlora.plan.model import describe
from twinlora.plan.shapes import SHAPES


def test_a_directory_is_read_by_its_headers(tiny):
    found = describe(str(tiny))
    assert found.config.hidden_size == 64
    assert set(found.types) == {"BF16"}
    assert found.types["BF16"] * 2 == pytest.approx(found.checkpoint_bytes, rel=0.1)
    assert found.train_as == str(tiny)
    assert found.tokenizer_source().path == tiny.resolve()


def test_a_gguf_file_is_known_by_what_it_begins_with(tmp_path, monkeypatch):
    blob = tmp_path / "0123abcd"  # as in the hub's cache
    blob.write_bytes(b"GGUF" + bytes(20))
    asked = []
    monkeypatch.setattr(model, "_config", lambda *args, **more: asked.append(more) or (tiny_config(), None))
    assert describe(str(blob)).origin.startswith("GGUF file")
    assert asked == [{"gguf_file": blob.name}]


def test_only_headers_are_read(tiny, tmp_path):
    """Of a checkpoint whose weights are missing behind the header."""
    import shutil

    shutil.copy(tiny / "config.json", tmp_path)
    raw = (tiny / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(raw[:size])
    assert describe(str(tmp_path)).types == describe(str(tiny)).types
    (tmp_path / "model.safetensors").write_bytes(raw[: size - 9])
    with pytest.raises(ModelError, match="not a safetensors file"):
        describe(str(tmp_path))


def test_a_configuration_alone_has_no_tokenizer(tiny):
    found = describe(str(tiny / "config.json"))
    assert found.config.num_hidden_layers == 2
    assert found.train_as is None
    with pytest.raises(ModelError, match="leave --data out"):
        found.tokenizer_source()


def test_a_well_known_name_needs_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = describe("Llama-65B")
    assert found.config.hidden_size == SHAPES["llama-65b"].values["hidden_size"]
    assert describe("qwen3-8b").train_as == "Qwen/Qwen3-8B"


def test_of_a_model_that_sees_pictures_the_text_model_counts(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert describe(str(tmp_path / "config.json")).config.model_type == "gemma3_text"


@pytest.mark.parametrize("name", ["lama-65b", "./nowhere", "/no/where", "no.json", "no.gguf"])
def test_what_is_not_there_is_one_message(name):
    with pytest.raises(ModelError, match=r"no such|near: llama-65b"):
        describe(name)


def test_a_broken_configuration_is_one_message(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ModelError, match="configuration could not be read"):
        describe(str(tmp_path))


def quantised(directory, **changes):
    """A configuration that says its weights are in bitsandbytes' NF4, or what `changes` make of it."""
    values = tiny_config().to_dict() | {"model_type": "llama"}
    stored = bnb4.quantization_config(NF4Format(), torch.bfloat16, []) | changes
    file = directory / "config.json"
    file.write_text(json.dumps(values | {"quantization_config": stored}))
    return str(file)


def test_weights_in_4_bits_are_seen_and_their_scales(tmp_path, tiny):
    assert describe(str(tiny)).nf4 is None
    assert describe(quantised(tmp_path)).nf4 is True
    assert describe(quantised(tmp_path, bnb_4bit_use_double_quant=False)).nf4 is False
    assert not hasattr(describe(quantised(tmp_path)).config, "quantization_config")


def test_what_train_could_not_read_is_not_planned(tmp_path):
    with pytest.raises(ModelError, match="its weights are bitsandbytes int8; expected NF4"):
        describe(quantised(tmp_path, load_in_4bit=False, load_in_8bit=True))
    with pytest.raises(ModelError, match="quantised by 'awq'"):
        describe(quantised(tmp_path, load_in_4bit=False, quant_method="awq"))

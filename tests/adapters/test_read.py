"""What PEFT itself writes, read: adapters on the head, modules that were trained whole, settings of initialisations."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from twinlora.adapters import files
from twinlora.adapters.bank import AdapterBank
from twinlora.adapters.merge import Merged
from twinlora.adapters.read import CONFIG, WEIGHTS, read_adapter
from twinlora.errors import AdapterError
from twinlora.export.merged import save_16bit
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.load import load_model, resolve

peft = pytest.importorskip("peft")
IDS = torch.arange(20)[None]
HEAD = "base_model.model.lm_head.base_layer.weight"


def theirs_of(base, **config):
    """The model in `base` with PEFT's adapter, moved as if it had been trained."""
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(stock, peft.LoraConfig(**(values | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def ours_of(base, directory, dtype=torch.float32):
    model = load_model(resolve(str(base)), dtype=dtype)
    files.load_adapter(model, read_adapter(directory))
    return model.eval()


@torch.no_grad()
def require_equal(one, other):
    torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def head(tiny, tmp_path):
    """A directory with PEFT's adapter on the head, which is tied, and the model that has it."""
    model = theirs_of(tiny, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "head")
    assert HEAD in load_file(tmp_path / "head" / WEIGHTS)
    return tmp_path / "head", model


def test_an_adapter_on_the_head(tiny, head):
    directory, theirs = head
    require_equal(ours_of(tiny, directory), theirs)
    ours_of(tiny, directory, torch.bfloat16)  # PEFT saved the base's weight as float32
    bank = AdapterBank(load_model(resolve(str(tiny)), dtype=torch.float32))
    bank.add("head", read_adapter(directory))
    bank.use("head")
    require_equal(bank._model, theirs)


def test_an_adapter_on_a_tied_head_is_folded_into_a_head_of_its_own(tiny, tokenizer, head, tmp_path):
    directory, theirs = head
    weights = Merged(Checkpoint(resolve(str(tiny))), read_adapter(directory))
    assert not weights.tied
    assert weights.shape("lm_head.weight") == (259, 64)
    save_16bit(weights, tmp_path, tokenizer, torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    require_equal(merged, theirs)
    assert torch.equal(merged.model.embed_tokens.weight, theirs.base_model.model.model.embed_tokens.weight)


def test_an_adapter_on_the_head_of_another_base_is_refused(tiny, head):
    directory, _ = head
    tensors = load_file(directory / WEIGHTS)
    tensors[HEAD][3, 5] += 0.1
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(
        AdapterError, match=r"lm_head.weight: the adapter was trained over another one than the model's"
    ):
        ours_of(tiny, directory)
    with pytest.raises(
        AdapterError, match=r"lm_head.weight: the adapter was trained over another one than the model's"
    ):
        Merged(Checkpoint(resolve(str(tiny))), read_adapter(directory))
    save_file({key: t for key, t in tensors.items() if "lm_head.lora" not in key}, directory / WEIGHTS)
    with pytest.raises(AdapterError, match="lm_head: has a base_layer, but no lora_A and lora_B"):
        read_adapter(directory)


@pytest.mark.parametrize(("entry", "count"), [("norm", 5), ("mlp", 6), ("lm_head", 1)])
def test_modules_to_save_are_those_that_peft_means(tiny, tmp_path, entry, count):
    """The end of a module's name, not only whole parts of it, and all that is in the module."""
    theirs = theirs_of(tiny, modules_to_save=[entry])
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert len(adapter.modules) == count
    require_equal(ours_of(tiny, tmp_path), theirs)
    weights = Merged(Checkpoint(resolve(str(tiny))), adapter)
    merged = theirs.merge_and_unload()
    for name, parameters in adapter.modules.items():
        for key in parameters:
            assert torch.equal(weights.read(f"{name}.{key}"), merged.get_parameter(f"{name}.{key}").detach()), name


def test_settings_of_an_initialisation_that_left_the_base_alone(tiny, tmp_path):
    from peft.tuners.lora import config as settings

    theirs_of(tiny, init_lora_weights="eva", eva_config=settings.EvaConfig()).save_pretrained(tmp_path / "eva")
    assert json.loads((tmp_path / "eva" / CONFIG).read_text())["eva_config"]
    read_adapter(tmp_path / "eva")
    for key, kind, name in (
        ("corda_config", settings.CordaConfig, "corda"),
        ("lora_ga_config", settings.LoraGAConfig, "lora_ga"),
    ):
        theirs_of(tiny, **{key: kind()}).save_pretrained(tmp_path / name)  # as save_pretrained leaves a converted one
        config = json.loads((tmp_path / name / CONFIG).read_text())
        assert config[key]
        assert config["init_lora_weights"] is True
        read_adapter(tmp_path / name)
        (tmp_path / name / CONFIG).write_text(json.dumps(config | {"init_lora_weights": name}))
        with pytest.raises(AdapterError, match=f"init_lora_weights '{name}': the base was changed"):
            read_adapter(tmp_path / name)


def test_a_pickled_adapter_is_not_read_and_how_to_convert_it_is_said(tiny, tmp_path, monkeypatch):
    theirs_of(tiny).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    expected = read_adapter(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"only adapter_model.bin, and pickles are never read") as caught:
        read_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'type there: python -c "(.*?)"', str(caught.value))[1], {})
    found = read_adapter(tmp_path)
    assert all(torch.equal(found.tensors[name][1], b) for name, (_, b) in expected.tensors.items())

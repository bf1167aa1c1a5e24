"""Folding, tensor by tensor, against the model that PEFT merges."""

import json

import pytest
import torch
import transformers as t
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from twinlora.adapters import files
from twinlora.adapters.lora import attach, lora_layers
from twinlora.adapters.merge import Merged
from twinlora.adapters.targets import LoraConfig
from twinlora.errors import AdapterError, ModelError
from twinlora.export.shards import ShardWriter
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import NF4Format

peft = pytest.importorskip("peft")


def adapted(base, directory, *, quantize=None, **options):
    """An adapter with random factors for the model in `base`, and the model that has it."""
    model = load_model(resolve(str(base)), dtype=torch.float32, quantize=quantize)
    attach(model, LoraConfig(**({"rank": 4, "alpha": 8} | options)))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.2)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))
    files.save_adapter(model, directory, str(base))
    return files.read_adapter(directory), model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Weights lie as [in, out], and the checkpoint leaves the prefix out, as the first ones do."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    directory = tmp_path_factory.mktemp("gpt2")
    config = t.GPT2Config(
        vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    path = directory / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("which", ["tiny", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_weights_are_those_that_peft_merges(which, dora, request, tmp_path):
    base = request.getfixturevalue(which)
    adapter, _ = adapted(base, tmp_path, dora=dora)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(stock, tmp_path).merge_and_unload()
    weights = Merged(Checkpoint(resolve(str(base))), adapter)
    for name, parameter in merged.named_parameters():
        assert torch.allclose(weights.read(name).float(), parameter, atol=1e-5), name
        assert weights.shape(name) == tuple(parameter.shape)


def test_the_dequantised_base_is_what_qlora_computes_with(tiny, tmp_path):
    adapter, model = adapted(tiny, tmp_path, quantize=NF4Format())
    weights = Merged(Checkpoint(resolve(str(tiny))), adapter, NF4Format())
    layers = lora_layers(model)
    for name, layer in layers.items():
        assert isinstance(layer.base, QuantLinear)
        expected = layer.base.dense_weight(torch.float32) + layer.update()
        assert torch.allclose(weights.read(f"{name}.weight"), expected, atol=1e-6), name
    assert len(layers) == 14
    plain = Merged(Checkpoint(resolve(str(tiny))), adapter)
    assert not torch.allclose(plain.read(f"{name}.weight"), expected, atol=1e-3)


def test_a_base_of_several_formats_is_what_hybrid_computes_with(tiny, tmp_path):
    kinds = ("nf3-64-dq256", "nf4-64-dq256", "int8-64", "16bit")
    names = [name for name in Checkpoint(resolve(str(tiny))).linears if name != "lm_head"]
    layers = {name: kinds[i % 4] for i, name in enumerate(names)}
    adapter, model = adapted(tiny, tmp_path, quantize=layers)
    weights = Merged(Checkpoint(resolve(str(tiny))), adapter, layers)
    for name, layer in lora_layers(model).items():
        assert layer.base.precision == layers[name].replace("16bit", "float32")
        expected = layer.base.dense_weight(torch.float32) + layer.update()
        assert torch.allclose(weights.read(f"{name}.weight"), expected, atol=1e-6), name
    left_out = {name: fmt for name, fmt in layers.items() if name != names[3]}
    with pytest.raises(ModelError, match=f"{names[3]}: has no precision"):
        Merged(Checkpoint(resolve(str(tiny))), adapter, left_out)


def test_a_gguf_base(smollm2_like_gguf, tmp_path):
    source = resolve(str(smollm2_like_gguf))
    adapter, model = adapted(smollm2_like_gguf, tmp_path)
    weights = Merged(Checkpoint(source), adapter)
    for name, layer in lora_layers(model).items():
        expected = layer.base.dense_weight(torch.float32) + layer.update()
        assert torch.allclose(weights.read(f"{name}.weight"), expected, rtol=1e-6, atol=1e-6), name
    assert weights.base.config_values()["model_type"] == "llama"


@pytest.fixture
def smollm2_like_gguf(tmp_path_factory):
    """A GGUF file that is a base."""
    from tests.export.models import bytes_tokenizer, write_family
    from twinlora.export.gguf import write_gguf

    directory = tmp_path_factory.mktemp("gguf")
    tokenizer = bytes_tokenizer()
    write_family("llama", directory, tokenizer)
    weights = Merged(Checkpoint(resolve(str(directory))), None)
    path = directory / "m.gguf"
    write_gguf(weights, path, tokenizer, quant="f16", name="m", stop={tokenizer.eos_token_id})
    return path


def test_every_part_that_does_not_fit_is_named(tiny, gpt2, tmp_path):
    adapter, _ = adapted(tiny, tmp_path)
    with pytest.raises(AdapterError, match=r"(?s)14 part\(s\) do not fit.*q_proj: the model has no such linear layer"):
        Merged(Checkpoint(resolve(str(gpt2))), adapter)
    wide = dict(adapter.tensors)
    name = "model.layers.0.mlp.up_proj"
    wide[name] = (torch.zeros(4, 32), wide[name][1])
    changed = files.AdapterFile(adapter.directory, wide, adapter.configs)
    with pytest.raises(AdapterError, match=r"up_proj: adapter is for \[128, 32\], the model has \[128, 64\]"):
        Merged(Checkpoint(resolve(str(tiny))), changed)


def test_a_checkpoint_with_other_names_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    save_file({f"wrapped.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ModelError, match=r"name tensors otherwise than the model \(model.embed_tokens.weight"):
        Checkpoint(resolve(str(tmp_path)))


def test_shards_are_what_safetensors_reads(tmp_path):
    tensors = {f"t{i}": torch.randn(40, 10).to(d) for i, d in enumerate((torch.float32, torch.bfloat16, torch.float16))}
    tensors |= {"u8": torch.arange(7, dtype=torch.uint8), "scalar": torch.tensor(3.0), "f32": torch.randn(5)}
    with ShardWriter(tmp_path, list(tensors), limit=1700) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert len(set(index["weight_map"].values())) == 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensors[name]), name
            assert shard.metadata() == {"format": "pt"}
    with ShardWriter(tmp_path / "..", ["a"]) as out:
        out.add("a", torch.ones(2))
    assert (tmp_path / ".." / "model.safetensors").is_file()

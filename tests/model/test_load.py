import gc
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import tiny_config
from twinlora.errors import ModelError
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.fingerprint import fingerprint
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, load_tokenizer, pick_device, precision_by_layer, resolve
from twinlora.numerics import ops
from twinlora.numerics.formats import NF4Format


def test_quantised_layers_are_those_of_the_dense_model(tiny):
    source = resolve(str(tiny))
    dense, quantized = load_model(source), load_model(source, quantize=NF4Format())
    assert precision_by_layer(quantized) == {"nf4-64-dq256": 14, "bfloat16": 1}
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
    for name, module in quantized.named_modules():
        if isinstance(module, QuantLinear):
            expected = ops.quantize(dense.get_submodule(name).weight).dequantize()
            assert torch.equal(module.dense_weight(torch.bfloat16), expected)
    assert not hasattr(quantized, "hf_quantizer")
    assert not quantized.is_quantized


def test_dense_logits_are_those_of_transformers(tiny):
    ids = torch.randint(0, 256, (2, 9))
    stock = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(load_model(resolve(str(tiny)))(ids).logits, stock(ids).logits)


def test_casting_the_model_leaves_scales_alone(tiny):
    model = load_model(resolve(str(tiny)), quantize=NF4Format())
    layer = model.model.layers[0].mlp.up_proj
    before = [p.clone() for p in (layer.packed, layer.scales, layer.nested_scales, layer.nested_offset)]
    model.to(torch.float16)
    after = (layer.packed, layer.scales, layer.nested_scales, layer.nested_offset)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))
    assert model.model.norm.weight.dtype == torch.float16


def test_biases_survive_quantisation(tmp_path, tokenizer):
    model = LlamaForCausalLM(tiny_config(attention_bias=True)).to(torch.bfloat16)
    for p in model.parameters():
        p.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = load_model(resolve(str(tmp_path)), quantize=NF4Format())
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.bias, model.model.layers[1].self_attn.q_proj.bias)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_quantised_checkpoint_is_not_left_mapped(tmp_path):
    """What stays is what the model still reads of it: here the embedding, and norms as copies."""
    LlamaForCausalLM(tiny_config(vocab_size=10_000)).to(torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = load_model(resolve(str(tmp_path)), quantize=NF4Format())
    assert model.get_input_embeddings().weight.nbytes > 1 << 20
    assert Path("/proc/self/maps").read_text().count(str(file)) == 1
    del model
    gc.collect()
    assert str(file) not in Path("/proc/self/maps").read_text()


def test_quantising_keeps_the_generation_config(tiny, tmp_path):
    directory = _copy(tiny, tmp_path / "m")
    (directory / "generation_config.json").write_text('{"eos_token_id": [257, 3]}')
    for quantize in (None, NF4Format()):
        assert load_model(resolve(str(directory)), quantize=quantize).generation_config.eos_token_id == [257, 3]


def test_a_missing_shard_is_named(tiny, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        resolve(str(tmp_path)).weight_files()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: str(d / "nothing"), "no such directory or file"),
        (lambda d: str(d), "no config.json"),
        (lambda d: (d / "x.bin").write_bytes(b"abcd") and str(d / "x.bin"), "not a GGUF file"),
    ],
)
def test_wrong_sources(tmp_path, make, message):
    with pytest.raises(ModelError, match=message):
        resolve(make(tmp_path))


def _copy(tiny, target):
    target.mkdir()
    for file in tiny.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("quantize", [None, NF4Format()])
def test_missing_and_misshapen_tensors_are_named(tiny, tmp_path, quantize):
    directory = _copy(tiny, tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 64, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(resolve(str(directory)), quantize=quantize)
    assert "up_proj" in str(caught.value)
    assert "q_proj" in str(caught.value)


@pytest.mark.parametrize("quantize", [None, NF4Format()])
@pytest.mark.parametrize("lost", ["self_attn.q_proj.bias", "mlp.up_proj.weight_scale", "mlp.up_proj.lora_A.weight"])
def test_a_part_of_a_layer_that_the_model_has_no_place_for_is_named(tiny, tmp_path, quantize, lost):
    """What transformers leaves out on purpose is not: tables of rotations, a stored copy of a tied head, other heads."""
    directory = _copy(tiny, tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "score.weight": torch.ones(2, 64),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    load_model(resolve(str(directory)), quantize=quantize)
    tensors[f"model.layers.1.{lost}"] = torch.ones(64)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(resolve(str(directory)), quantize=quantize)
    assert f"1 tensor(s) could not be loaded\n  left over: model.layers.1.{lost}," in str(caught.value)


def test_nan_weight_is_named(tiny, tmp_path):
    directory = _copy(tiny, tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight: 1 of"):
        load_model(resolve(str(directory)), quantize=NF4Format())


def test_truncated_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = _copy(tiny, tmp_path / "m")
    blob = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(blob[:-100])
    with pytest.raises(ModelError, match="ends behind the file"):
        fingerprint(resolve(str(directory)))
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(resolve(str(directory)))


def test_unknown_device():
    with pytest.raises(ModelError, match="expected auto, cpu"):
        pick_device("gpu0")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(ModelError, match=r"device cuda:7: this torch sees 2 GPU\(s\); expected cuda:0 to cuda:1"):
        pick_device("cuda:7")


@pytest.mark.parametrize("text", ["", "[]", "{"])
@pytest.mark.parametrize("load", [load_model, Checkpoint, load_tokenizer])
def test_a_damaged_configuration_is_named(tiny, tmp_path, text, load):
    directory = _copy(tiny, tmp_path / "m")
    source = resolve(str(directory))
    (directory / "config.json").write_text(text)
    if load is not load_tokenizer:
        with pytest.raises(ModelError, match=r"config\.json .*; fetch it again"):
            load(source)
    with pytest.raises(ModelError, match=r"config\.json .*; fetch it again"):
        load(resolve(str(directory)))


def test_what_the_hub_gives(tiny, tmp_path, monkeypatch):
    """Code comes along for --trust-remote-code; weights that are pickled are refused as they are in a directory."""
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or tmp_path
    )
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for name in ("owner/name", str(tmp_path)):
        with pytest.raises(ModelError, match="pickled checkpoints are never read"):
            resolve(name)
    assert resolve("owner/name", weights=False).path == tmp_path
    assert all("*.py" in patterns for patterns in asked)


def test_tokenizer_gets_a_pad_token(tiny, tmp_path):
    directory = _copy(tiny, tmp_path / "m")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(resolve(str(directory))).pad_token == "<|im_end|>"


# A process for each way to quantise, forked before any of them has loaded the model.
MEASURE = """
import json, os, re, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import NF4Format

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

source = resolve(sys.argv[1])
load_model(resolve(sys.argv[2]), quantize=NF4Format())  # imports, pools and tables are not the model's
for formats in json.loads(sys.argv[3]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    before, peak, done = anonymous(), 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch); thread.start()
    model = load_model(source, quantize=formats or NF4Format())
    done = True; thread.join()
    print(json.dumps([peak - before, sum(p.nbytes for p in model.parameters())]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streaming_keeps_the_peak_near_the_final_size(tmp_path, tiny):
    """Anonymous memory stays below the final size plus three times the largest tensor (here a smaller checkpoint)."""
    config = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, vocab_size=8000)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    tensors = {
        n: torch.randn(s).to(torch.bfloat16) if len(s) > 1 else torch.ones(s).bfloat16() for n, s in shapes.items()
    }
    names = list(tensors)
    index = {}
    for part in range(4):
        file = f"model-{part + 1:05d}-of-00004.safetensors"
        chosen = {n: tensors[n] for n in names[part::4]}
        save_file(chosen, tmp_path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    largest = max(t.nbytes for t in tensors.values())
    layers = [name.removesuffix(".weight") for name in names if "_proj." in name]
    by_layer = dict(zip(layers, itertools.cycle(["nf3-64-dq256", "int8-64", "16bit"]), strict=False))
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), str(tiny), json.dumps([None, by_layer])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(measured) == 2
    for peak, final in measured:
        assert final / 4 < peak < final + 3 * largest  # what the first left in the heap, the second takes again


def test_gpt2_in_nf4_is_its_quantised_weights(tmp_path):
    """Its blocks look for weights in order to initialise them, and keep them as [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    stock = GPT2LMHeadModel(config).eval()
    stock.save_pretrained(tmp_path)
    model = load_model(resolve(str(tmp_path)), quantize=NF4Format(), dtype=torch.float32)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                stock.get_submodule(name).weight.copy_(layer.dense_weight(torch.float32).T)
        ids = torch.arange(12)[None]
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)

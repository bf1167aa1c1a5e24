"""Training with the weights that are deployed: the forward pass, straight-through gradients, and the exported bits."""

import json

import pytest
import torch
from gguf import GGUFReader, quants
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tests.conftest import chat, write_jsonl
from tests.export.models import bytes_tokenizer, write_family
from twinlora.adapters.deploy import DeployedLora, Storage, deploy, digests
from twinlora.adapters.lora import LoraLinear, attach, lora_layers
from twinlora.adapters.merge import folded
from twinlora.adapters.targets import LoraConfig
from twinlora.config import ExportOptions, TrainOptions
from twinlora.errors import ConfigError, ParityError
from twinlora.export import ship
from twinlora.model.load import load_model, resolve
from twinlora.train.loop import train

STORAGES = [Storage("q4_0"), Storage("q8_0"), Storage("nf4-64-dq256")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In bfloat16, as checkpoints are, with a tied head."""
    directory = write_family("llama", tmp_path_factory.mktemp("base"), bytes_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def layer_pair(storage, bias=False):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.l = torch.nn.Linear(64, 32, bias=bias)
    plain = LoraLinear(_frozen(model.l), LoraConfig(rank=4).layer("l"))
    with torch.no_grad():
        plain.lora_B.normal_()
    deployed = LoraLinear(_frozen(model.l), LoraConfig(rank=4).layer("l"))
    deployed.load_state_dict(plain.state_dict())
    deployed.__class__ = DeployedLora
    deployed.storage, deployed.name = storage, "l"
    return plain, deployed


def _frozen(linear):
    from twinlora.model.linear import as_frozen

    return as_frozen(linear.requires_grad_(False))


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_stored_weight_and_the_gradient_goes_straight_through(storage, bias):
    plain, deployed = layer_pair(storage, bias)
    x = torch.randn(2, 5, 64, requires_grad=True)
    weight = folded(plain.base.dense_weight(torch.float32), plain.lora_A, plain.lora_B, plain.scale).detach()
    stored = storage.store(weight).dequantize(torch.float32)
    assert torch.allclose(deployed(x), torch.nn.functional.linear(x, stored, plain.base.bias))
    dy = torch.randn(2, 5, 32)
    found = torch.autograd.grad(deployed(x), (deployed.lora_A, deployed.lora_B, x), dy)
    expected = torch.autograd.grad(plain(x), (plain.lora_A, plain.lora_B), dy)
    assert all(torch.allclose(f, e, rtol=1e-4, atol=1e-4) for f, e in zip(found[:2], expected, strict=True))
    assert torch.allclose(found[2], dy @ stored, atol=1e-5)


def test_the_stored_weight_follows_the_adapter():
    _, deployed = layer_pair(Storage("q4_0"))
    before = deployed.stored().digest()
    assert deployed.stored() is deployed.stored()
    with torch.no_grad():
        deployed.lora_B.add_(0.5)
    assert deployed.stored().digest() != before


def test_everything_a_file_stores_in_few_bits_is_rounded(base):
    model = load_model(resolve(str(base)), dtype=torch.float32)
    attach(model, LoraConfig(rank=4, target=("q_proj",)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    deploy(model, Storage("q4_0"))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in changed}
    assert kinds == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
    assert set(digests(model)) == set(lora_layers(model))


@pytest.mark.parametrize(("option", "method"), [("q4_0", "lora"), ("q8_0", "lora"), ("q4_0", "qlora"), ("nf4", "lora")])
def test_what_is_exported_is_what_was_trained(option, method, base, tmp_path):
    pytest.importorskip("xllamacpp")
    data = write_jsonl(tmp_path / "d.jsonl", [chat(f"say {i}", f"word {i}") for i in range(16)])
    options = {
        "model": str(base),
        "data": data,
        "eval": data,
        "rank": 4,
        "lr": 1e-2,
        "warmup_steps": 0,
        "batch_size": 8,
    }
    done = train(TrainOptions(**options, method=method, deploy=option, output=tmp_path / "run", epochs=3))
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-2] < 0.8 * losses[0]
    layers = lora_layers(done.model)
    assert all(isinstance(layer, DeployedLora) for layer in layers.values())
    to = {"to": "bnb"} if option == "nf4" else {"to": "gguf", "quant": option}
    record = ship.export(ExportOptions(run=tmp_path / "run", output=tmp_path / "out", rows=8, **to))
    assert record["deploy"] == {"layers_as_trained_to_the_bit": 14}
    assert record["parity"]["kl_mean"] < (0.05 if option == "nf4" else 0.02)  # bnb runs in bfloat16, llama.cpp in int8
    if option != "nf4":
        _same_bits(next((tmp_path / "out").glob("*.gguf")), layers)


def _same_bits(path, layers):
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    names = {"down_proj": "ffn_down", "v_proj": "attn_v", "gate_proj": "ffn_gate"}
    seen = 0
    for name, layer in layers.items():
        number, kind = name.split(".")[2], name.rpartition(".")[2]
        if kind in names:
            tensor = tensors[f"blk.{number}.{names[kind]}.weight"]
            found = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(found, layer.stored().dequantize(torch.float32)), name
            seen += 1
    assert seen == 6


def test_other_artefacts_and_other_weights_are_refused(base, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [chat(f"say {i}", f"word {i}") for i in range(8)])
    options = {"model": str(base), "data": data, "method": "lora", "rank": 4, "lr": 1e-2}
    train(TrainOptions(**options, deploy="q8_0", output=tmp_path / "run"))
    for to in ({"to": "merged"}, {"to": "peft"}, {"to": "gguf", "quant": "q4_0"}):
        with pytest.raises(ConfigError, match=r"trained to be deployed as q8_0.*export .*run --to gguf --quant q8_0"):
            ship.export(ExportOptions(run=tmp_path / "run", output=tmp_path / "out", **to))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["deployed"]["model.layers.1.mlp.up_proj"] = "0" * 16
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        ParityError, match=r"1 of 14 layers are not, to the bit.*the first is model.layers.1.mlp.up_proj"
    ):
        ship.export(ExportOptions(run=tmp_path / "run", output=tmp_path / "out", to="gguf", quant="q8_0"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"dora": True},
        {"dropout": 0.1},
        {"modules_to_save": ["lm_head"]},
        {"method": "full"},
        {"method": "hybrid", "bits": 4.5},
    ],
    ids=str,
)
def test_what_cannot_be_folded_is_refused_before_training(change, tmp_path):
    with pytest.raises(ValidationError, match="deploy folds plain LoRA"):
        TrainOptions(**({"model": "m", "data": "d", "output": tmp_path, "method": "lora", "deploy": "q4_0"} | change))


def test_a_plan_and_a_prediction_would_be_of_another_run(tiny, tmp_path, monkeypatch):
    """What deploying keeps in memory is not simulated: nothing is planned by it, and no run predicted."""
    monkeypatch.setenv("TWINLORA_HISTORY", str(tmp_path / "history.jsonl"))
    data = write_jsonl(tmp_path / "data.jsonl", [chat("say", "word")])
    values = {"model": str(tiny), "data": data, "method": "lora", "deploy": "q8_0", "output": tmp_path / "run"}
    with pytest.raises(ValidationError, match="dense_copies keep none"):
        TrainOptions(**values | {"method": "qlora"}, dense_copies="auto")
    with pytest.raises(ValidationError, match="plan auto does not know what deploy keeps in memory"):
        TrainOptions(**values, plan="auto")
    assert train(TrainOptions(**values)).record["predicted"] is None
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert any("no prediction beside this run: what deploy keeps" in note for note in notes)
    assert not (tmp_path / "history.jsonl").exists()

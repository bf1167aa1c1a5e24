"""A base whose layers differ in precision: budgets, runs, their continuation, and what is read back."""

import json
import re

import pytest
import torch

from tests.train.test_loop import Notes, metrics, options, same, weights
from twinlora.adapters import passport
from twinlora.config import CompareOptions, EvalOptions
from twinlora.errors import CheckpointError, ConfigError, ModelError
from twinlora.evaluate.evaluate import evaluate
from twinlora.model.linear import QuantLinear, bits_per_weight
from twinlora.model.load import load_model, resolve, weight_bytes
from twinlora.numerics.formats import DENSE, NF3Format, NF4Format
from twinlora.train import choices, loop
from twinlora.train.hybrid import choose_precision
from twinlora.train.loop import train

BUDGETS = [3.2, 3.5, 4.0, 4.5, 5.5, 8.0, 12.0, 16.0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def hybrid(tiny, data, output, **changes):
    budget = {} if {"memory", "layer_precision"} & changes.keys() else {"bits": 5.5}
    return options(tiny, data, output, method="hybrid", **budget | changes)


def chosen(tiny, data, tmp_path, **changes):
    """The precision of each layer under a budget, without training."""
    from twinlora.train.inputs import read_inputs
    from twinlora.train.notes import Notes as Kept

    o = hybrid(tiny, data, tmp_path / "none", **changes)
    kept = Kept(Notes())
    found = choose_precision(o, read_inputs(o, kept), torch.bfloat16, torch.device("cpu"), kept)
    return found, kept.lines


def test_a_run_says_what_its_base_is(tiny, data_file, tmp_path):
    notes = Notes()
    result = train(hybrid(tiny, data_file, tmp_path / "r", epochs=4, lr=2e-2), notes)
    losses = [line["loss"] for line in metrics(tmp_path / "r")]
    assert losses[-1] < 0.7 * losses[0]
    record = result.record
    assert 5.0 < record["bits_per_linear_weight"] <= 5.5 < record["bits_per_weight"]
    assert (record["bits_per_linear_weight"], record["bits_per_weight"]) == bits_per_weight(
        load_model(resolve(str(tiny)), quantize=passport.read(tmp_path / "r" / "adapter").layer_precision)
    )
    seal = passport.read(tmp_path / "r" / "adapter")
    assert len(seal.layer_precision) == 14
    assert len(set(seal.layer_precision.values())) > 1
    assert sum(seal.base_precision.values()) == 15
    said = next(line for line in notes.lines if "expected divergence" in line)
    assert "bits per weight of the linear layers" in said
    assert said in json.loads((tmp_path / "r" / "run.json").read_text())["notes"]


def test_the_divergence_falls_with_the_budget(tiny, data_file, tmp_path):
    base = load_model(resolve(str(tiny)), dtype=torch.float32)
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(3))
    wanted = base(ids).logits.log_softmax(-1)
    measured = []
    for bits in BUDGETS:
        layers, _ = chosen(tiny, data_file, tmp_path, bits=bits)
        model = load_model(resolve(str(tiny)), quantize=layers, dtype=torch.float32)
        found = model(ids).logits.log_softmax(-1)
        measured.append((wanted.exp() * (wanted - found)).sum(-1).mean().item())
        dense = sum(layer in (DENSE,) for layer in layers.values())
        assert bits_per_weight(load_model(resolve(str(tiny)), quantize=layers))[0] <= bits
        assert (dense == 14) == (bits == 16)
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] == 0
    assert measured[0] > 20 * measured[-2] > 0


def test_memory_is_what_all_weights_take(tiny, data_file, tmp_path):
    layers, _ = chosen(tiny, data_file, tmp_path, memory="110KB")
    assert 105_000 < weight_bytes(load_model(resolve(str(tiny)), quantize=layers)) <= 110_000


@pytest.mark.parametrize(
    "budget, told",
    [({"bits": 3.0}, r"the smallest formats take 3\.\d+ bits a weight"),
     ({"memory": "20KB"}, r"the smallest formats take \d.*embeddings, head and norms \d")],
)  # fmt: skip
def test_too_small_a_budget_says_what_would_do(tiny, data_file, tmp_path, budget, told):
    with pytest.raises(ConfigError, match=told) as caught:
        train(hybrid(tiny, data_file, tmp_path / "r", **budget))
    option, value = re.search(r"give --(\w+) (\S+) or more", str(caught.value)).groups()
    layers, _ = chosen(tiny, data_file, tmp_path, **{option: value})
    assert list(layers.values()).count("nf3-64-dq256") > 10, "hardly more than the smallest"


def test_resume_is_bit_identical(tiny, data_file, tmp_path, monkeypatch):
    arguments = {"epochs": 3, "dropout": 0.1, "checkpoint_every": 4, "dtype": "float32"}  # not what a busy machine says
    train(hybrid(tiny, data_file, tmp_path / "whole", **arguments))
    original = loop._Trainer._save_checkpoint

    def stop(trainer):
        original(trainer)
        if trainer.at.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train(hybrid(tiny, data_file, tmp_path / "cut", **arguments))

    def refuse(*_):
        raise AssertionError("chosen again")

    monkeypatch.setattr(choices, "choose_precision", refuse)
    notes = Notes()
    train(hybrid(tiny, data_file, tmp_path / "cut", resume=True, **arguments), notes)
    assert any("continuing after step 8 of 18" in line for line in notes.lines)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    a, b = (passport.read(tmp_path / run / "adapter") for run in ("whole", "cut"))
    assert a == b


def test_a_file_of_precisions_is_taken_as_it_is_and_belongs_to_the_run(tiny, data_file, tmp_path):
    layers, _ = chosen(tiny, data_file, tmp_path)
    name = next(iter(layers))
    layers[name] = "nf3-32"
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(layers))
    train(hybrid(tiny, data_file, tmp_path / "r", layer_precision=file))
    assert passport.read(tmp_path / "r" / "adapter").layer_precision == layers
    file.write_text(json.dumps(layers | {name: "int8-64"}))
    with pytest.raises(CheckpointError, match=rf"precision of 1 layer.*{name}: was nf3-32, now int8-64"):
        train(hybrid(tiny, data_file, tmp_path / "r", layer_precision=file, resume=True))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[1]", r'expected \{"layer": "format"'),
        ('{"a": "nf4-64", "b": "fp8"}', r"1 of 2 formats are unknown\n  b: format 'fp8': expected a name such as"),
    ],
)
def test_unreadable_files_of_precisions(tiny, data_file, tmp_path, content, message):
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        train(hybrid(tiny, data_file, tmp_path / "r", layer_precision=tmp_path / "l.json"))


def test_a_map_of_other_layers_is_refused(tiny):
    with pytest.raises(ModelError, match=r"15 name\(s\) do not fit this model\n  model.layers.7.mlp: no such layer"):
        load_model(resolve(str(tiny)), quantize={"model.layers.7.mlp": "int8-64"})


def test_options_that_do_not_go_together(tiny, data_file, tmp_path):
    for changes, message in (
        ({"method": "hybrid"}, "needs one of memory, bits and layer_precision"),
        ({"method": "hybrid", "bits": 4, "memory": "1GB"}, "needs one of memory"),
        ({"method": "qlora", "bits": 4}, "bits: only method hybrid has a budget"),
        ({"method": "hybrid", "memory": "lots"}, "size 'lots'"),
    ):
        with pytest.raises(ValueError, match=message):
            options(tiny, data_file, tmp_path / "r", **changes)
    with pytest.raises(ValueError, match="needs one of memory"):
        CompareOptions(model="m", data="d", eval="e", output="o", methods=["lora", "hybrid"])


def test_eval_follows_the_passport_layer_by_layer(tiny, data_file, tmp_path):
    done = train(hybrid(tiny, data_file, tmp_path / "r", lr=2e-2, eval=data_file, dtype="float32"))
    arguments = {
        "model": str(tiny),
        "data": data_file,
        "adapter": tmp_path / "r",
        "metric": ["loss"],
        "dtype": "float32",
    }
    notes = Notes()
    found = evaluate(EvalOptions(**arguments), notes)
    assert found["loss"] == pytest.approx(done.record["eval_loss"], abs=1e-4)
    assert not [line for line in notes.lines if "precision" in line or "trained on" in line]
    evaluate(EvalOptions(**arguments, precision="nf4"), notes)
    assert "running on 14 layers nf4-64-dq256" in notes.lines[-1]


def test_another_choice_of_the_same_counts_is_noticed(tiny, data_file, tmp_path):
    layers = {
        name: "nf3-64-dq256" if i % 2 else "int8-64" for i, name in enumerate(chosen(tiny, data_file, tmp_path)[0])
    }
    (tmp_path / "l.json").write_text(json.dumps(layers))
    train(hybrid(tiny, data_file, tmp_path / "r", layer_precision=tmp_path / "l.json", max_steps=1))
    seal = passport.read(tmp_path / "r" / "adapter")
    swapped = {name: "int8-64" if fmt.startswith("nf3") else "nf3-64-dq256" for name, fmt in layers.items()}
    who = {"fingerprint": seal.base_fingerprint, "base": "b", "precision": seal.base_precision}
    assert passport.check(tmp_path / "r" / "adapter", **who, layers=layers) == []
    (line,) = passport.check(tmp_path / "r" / "adapter", **who, layers=swapped)
    assert "14 layers have another precision" in line


def test_peft_computes_what_we_compute(tiny, data_file, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    done = train(hybrid(tiny, data_file, tmp_path / "r", lr=2e-2, dtype="float32"))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    layers = passport.read(tmp_path / "r" / "adapter").layer_precision
    ours = load_model(resolve(str(tiny)), quantize=layers, dtype=torch.float32)
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            base.get_submodule(name).weight.data = layer.dense_weight(torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "r" / "adapter").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(done.model.eval()(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)


def test_bits_of_a_base_in_one_format(tiny):
    counts = {}
    for fmt in (None, NF3Format(64, 0), NF4Format(64, 0)):
        model = load_model(resolve(str(tiny)), quantize=fmt)
        counts[fmt and fmt.kind] = bits_per_weight(model)
    linear, other = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128), 259 * 64 + 5 * 64
    assert counts[None] == (16, 16)
    for kind, bits in (("nf3", 3.5), ("nf4", 4.5)):
        assert counts[kind] == (bits, pytest.approx((bits * linear + 16 * other) / (linear + other)))

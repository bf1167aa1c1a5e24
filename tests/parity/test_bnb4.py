"""4-bit checkpoints between us, transformers and bitsandbytes: the same codes, scales and dequantised weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import chat, write_jsonl
from twinlora.adapters.merge import Merged
from twinlora.config import EvalOptions, MergeOptions, TrainOptions
from twinlora.errors import ModelError
from twinlora.evaluate.evaluate import evaluate
from twinlora.export.bnb import save_bnb
from twinlora.export.ship import merge
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, precision_by_layer, resolve
from twinlora.numerics import ops
from twinlora.numerics.formats import DENSE, NF4Format
from twinlora.train.loop import train

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(scope="module", params=[True, False], ids=["double", "plain"])
def written(request, tiny, tokenizer, tmp_path_factory):
    """The tiny model in 4 bits, as we write it, and its format."""
    fmt = NF4Format(64, 256 if request.param else 0)
    directory = tmp_path_factory.mktemp("bnb")
    save_bnb(Merged(Checkpoint(resolve(str(tiny))), None), directory, tokenizer, torch.bfloat16, fmt)
    return directory, fmt


def test_transformers_loads_what_we_write(written, tiny):
    directory, fmt = written
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    ours = load_model(resolve(str(tiny)), quantize=fmt)
    seen = 0
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            weight = theirs.get_submodule(name).weight
            found = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(found, module.dense_weight(torch.bfloat16)), name
            seen += 1
    assert seen == 14
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).float().norm() < 0.02 * ours(ids).logits.float().norm()


def test_we_load_what_transformers_writes(tiny, tmp_path):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_model(resolve(str(tmp_path / "theirs")), quantize=NF4Format())
    checkpoint = Checkpoint(resolve(str(tmp_path / "theirs")))
    for name, module in read.named_modules():
        if isinstance(module, QuantLinear):
            weight = theirs.get_submodule(name).weight
            expected = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(module.dense_weight(torch.bfloat16), expected)
            assert torch.equal(checkpoint.read(f"{name}.weight").to(torch.bfloat16), expected)
    assert precision_by_layer(read)["nf4-64-dq256"] == 14


def test_codes_survive_reading_and_writing(written, tokenizer, tmp_path):
    """Dequantised and quantised anew, double-quantised scales would change."""
    directory, fmt = written
    model = load_model(resolve(str(directory)), quantize=fmt)
    stored = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.packed.flatten(), stored[f"{name}.weight"].flatten())
            assert torch.equal(module.scales.flatten(), stored[f"{name}.weight.absmax"])
    save_bnb(Merged(Checkpoint(resolve(str(directory))), None), tmp_path, tokenizer, torch.bfloat16, fmt)
    again = load_file(tmp_path / "model.safetensors")
    assert set(again) == set(stored)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_a_4bit_base_trains_and_evaluates(written, tmp_path, monkeypatch):
    """With qlora on its own codes; with lora on what they stand for."""
    monkeypatch.setenv("TWINLORA_HISTORY", str(tmp_path / "history.jsonl"))  # with it runs are predicted
    directory, fmt = written
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"say {i}", f"word {i}") for i in range(8)])
    options = {
        "model": str(directory),
        "data": data,
        "eval": data,
        "lr": 1e-2,
    }
    stored = {"double_quant": bool(fmt.nested_block_size)}
    losses = {}
    for method in ("qlora", "lora"):
        record = train(
            TrainOptions(**options, **(stored if method == "qlora" else {}), method=method, output=tmp_path / method)
        ).record
        losses[method] = record["eval_loss"]
        notes = json.loads((tmp_path / method / "run.json").read_text())["notes"]
        assert any("4-bit weights were dequantised" in line for line in notes) == (method == "lora")
        assert record["predicted"]["peak_bytes"] > 0
    assert losses["lora"] == pytest.approx(losses["qlora"], rel=0.02)
    found = evaluate(
        EvalOptions(
            model=str(directory), adapter=tmp_path / "qlora", data=data, metric=["loss"],
            double_quant=bool(fmt.nested_block_size),
        )
    )  # fmt: skip
    assert found["loss"] == pytest.approx(losses["qlora"], rel=0.01)


def test_an_adapter_on_a_4bit_base_is_merged(tokenizer, tmp_path):
    """Into the only weights there are; nothing is chosen."""
    from tests.export.models import bytes_tokenizer, write_family

    words = bytes_tokenizer()
    write_family("llama", tmp_path / "wide", words)
    base = tmp_path / "base"
    base.mkdir()
    save_bnb(Merged(Checkpoint(resolve(str(tmp_path / "wide"))), None), base, words, torch.bfloat16, NF4Format())
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"say {i}", f"word {i}") for i in range(8)])
    train(TrainOptions(model=str(base), data=data, lr=1e-2, method="qlora", output=tmp_path / "run"))
    record = merge(MergeOptions(run=tmp_path / "run", output=tmp_path / "merged", rows=4))
    assert (record["base"], record["choice"]) == ("dequantised", None)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_map_of_precisions_over_a_4bit_base(written):
    """Layers in its own format keep their codes, those in 16 bit are dequantised, other formats are refused."""
    directory, fmt = written
    whole = load_model(resolve(str(directory)), quantize=fmt)
    names = [name for name, module in whole.named_modules() if isinstance(module, QuantLinear)]
    layers = dict.fromkeys(names, fmt.name) | {names[0]: DENSE}
    model = load_model(resolve(str(directory)), quantize=layers)
    assert precision_by_layer(model) == {fmt.name: 13, "bfloat16": 2}
    for name in names:
        ours, expected = model.get_submodule(name), whole.get_submodule(name).dense_weight(torch.bfloat16)
        found = ours.weight if name == names[0] else ours.dense_weight(torch.bfloat16)
        assert torch.equal(found, expected), name
    with pytest.raises(ModelError, match=rf"{names[1]}.weight: stored as {fmt.name}, asked for int8-64"):
        load_model(resolve(str(directory)), quantize=layers | {names[1]: "int8-64"})


def test_hybrid_finds_no_weights_to_compare_in_a_4bit_base(written, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_jsonl(tmp_path / "data.jsonl", [chat("say", "word")])
    options = TrainOptions(model=str(written[0]), data=data, method="hybrid", bits=5, output=tmp_path / "run")
    with pytest.raises(ModelError, match="this checkpoint has 4-bit ones; give the model it was made of, or --method"):
        train(options)


def test_another_format_is_refused_by_name(written):
    directory, fmt = written
    other = NF4Format(64, 0 if fmt.nested_block_size else 256)
    with pytest.raises(ModelError, match=rf"stored as {fmt.name}, asked for {other.name}"):
        load_model(resolve(str(directory)), quantize=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes int8; expected NF4"),
        ({"bnb_4bit_quant_type": "fp4"}, "its 4-bit type is 'fp4'; expected 'nf4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "its codes are stored as bfloat16; expected uint8"),
        ({"quant_method": "gptq", "load_in_4bit": False}, "it is quantised by 'gptq'; expected 16-bit weights"),
    ],
)
def test_other_quantisations_are_refused(written, tmp_path, change, message):
    shutil.copytree(written[0], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for load in (load_model, Checkpoint):
        with pytest.raises(ModelError, match=message):
            load(resolve(str(tmp_path / "other")))


def test_re_quantising_dequantised_weights_is_not_exact():
    """Why codes are passed on: the round trip through 16 bits moves scales."""
    weight = ops.quantize(torch.randn(256, 1024)).dequantize(torch.bfloat16)
    assert not torch.equal(ops.quantize(weight).dequantize(torch.bfloat16), weight)

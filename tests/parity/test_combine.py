"""Combining adapters against PEFT's own `add_weighted_adapter`, and the functions it is made of."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from twinlora.adapters import combine as ours
from twinlora.adapters import files
from twinlora.adapters.lora import attach, lora_layers
from twinlora.adapters.targets import LoraConfig
from twinlora.cli.main import main
from twinlora.config import AdapterCombineOptions, validated
from twinlora.errors import AdapterError, ConfigError
from twinlora.model.load import load_model, resolve

peft = pytest.importorskip("peft")


def saved(tiny, directory, seed, **options):
    """An adapter with random A and B."""
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    attach(model, LoraConfig(**({"rank": 4, "alpha": 8} | options)), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    files.save_adapter(model, directory, str(tiny))
    return files.read_adapter(directory)


@pytest.fixture
def pair(tiny, tmp_path):
    return [saved(tiny, tmp_path / "a", 1), saved(tiny, tmp_path / "b", 2, alpha=16)]


def peft_updates(tiny, adapters, weights, **arguments):
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapters[0].directory, adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter.directory, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    model.add_weighted_adapter(names, weights, "new", **arguments)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("new")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "new" in module.lora_A
    }


@pytest.mark.parametrize("method", ["svd", "linear", "cat", "ties", "ties_svd"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
def test_the_updates_are_pefts(tiny, pair, method, weights):
    arguments = {} if method in ("svd", "linear", "cat") else {"density": 0.4}
    expected = peft_updates(tiny, pair, weights, combination_type=method, **arguments)
    found = ours.combine(pair, weights, method, **({"density": 0.4} if arguments else {}))
    assert set(found) == set(expected)
    for name, (a, b) in found.items():
        assert torch.allclose(b @ a, expected[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "ties", "linear"])
def test_what_is_kept_and_elected_is_pefts(method):
    from peft.utils import merge_utils

    tensors = [torch.randn(16, 32) for _ in range(3)]
    weights = torch.tensor([0.5, 1.0, 0.25])
    torch.manual_seed(9)
    if method == "linear":
        expected = merge_utils.task_arithmetic(tensors, weights)
    else:
        expected = getattr(merge_utils, method)(tensors, weights, 0.5)
    found = ours._mix(method, tensors, weights, 0.5, torch.Generator().manual_seed(9))
    assert torch.allclose(found, expected, atol=1e-6)


def test_ranks_that_differ(tiny, tmp_path):
    adapters = [saved(tiny, tmp_path / "a", 1), saved(tiny, tmp_path / "b", 2, rank=8)]
    with pytest.raises(AdapterError, match="linear needs adapters of one rank; choose svd, cat or linear_svd"):
        ours.combine(adapters, [1, 1], "linear")
    expected = peft_updates(tiny, adapters, [1.0, 1.0], combination_type="svd", svd_rank=3)
    for name, (a, b) in ours.combine(adapters, [1, 1], "svd", rank=3).items():
        assert len(a) == 3
        assert torch.allclose(b @ a, expected[name], atol=1e-5)


def test_compressing_loses_what_it_says(pair):
    whole = ours.compress(pair[0], 4)
    assert ours.energy_lost(pair[0], whole) < 1e-6
    cut = ours.compress(pair[0], 2)
    lost = total = 0.0
    for name, (a, b) in pair[0].tensors.items():
        update = pair[0].configs[name].scale * b @ a
        singular = torch.linalg.svdvals(update)
        lost, total = lost + singular[2:].square().sum(), total + update.square().sum()
        assert len(cut[name][0]) == 2
    assert ours.energy_lost(pair[0], cut) == pytest.approx(float(lost / total), rel=1e-3)


def test_dora_has_no_rank_to_cut(tiny, tmp_path):
    adapter = saved(tiny, tmp_path / "a", 1, dora=True)
    with pytest.raises(AdapterError, match="a DoRA, whose update is not B·A"):
        ours.compress(adapter, 2)


def test_the_verbs(tiny, tmp_path, data_file, capsys):
    from twinlora.config import TrainOptions
    from twinlora.train.loop import train

    for name in ("one", "two"):
        seed = len(name) + ord(name[0])
        train(
            TrainOptions(
                model=str(tiny), data=data_file, method="lora", rank=4, lr=1e-2, seed=seed, output=tmp_path / name
            )
        )
    one, two, mix = (str(tmp_path / name) for name in ("one", "two", "mix"))
    arguments = [
        "adapter",
        "combine",
        one,
        two,
        "--weights",
        "0.5,0.5",
        "--output",
        mix,
        "--data",
        str(data_file),
        "--json",
    ]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ranks"] == [4]
    assert list(document["losses"]) == [one, two, mix]
    read = files.read_adapter(tmp_path / "mix")
    assert read.configs["model.layers.0.mlp.up_proj"].scale == 1
    passport = json.loads((tmp_path / "mix" / "twinlora.json").read_text())
    assert passport["method"] == "combined (svd)"
    assert main([*arguments[:4], "--output", mix]) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    small = str(tmp_path / "small")
    assert main(["adapter", "compress", one, "--rank", "2", "--output", small, "--data", str(data_file)]) == 0
    shown = capsys.readouterr().out
    assert "14 layers of rank 2" in shown
    assert "of the updates' squared norm is lost" in shown
    assert "held-out loss" in shown
    assert main(["adapter", "compress", one, "--rank", "4", "--output", str(tmp_path / "same")]) == 2
    assert "has rank 4; give a lower one" in capsys.readouterr().err
    for data, said in (([str(tmp_path / "nothing.jsonl")], "no such file"), ([], "nothing is measured without rows")):
        command = ["adapter", "combine", one, two, "--output", str(tmp_path / "no"), "--rows", "2"]
        assert main([*command, *(["--data", *data] if data else [])]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists(), "nothing is written before it is known to be measured"
    passport = json.loads((tmp_path / "two" / "adapter" / "twinlora.json").read_text())
    passport["base_fingerprint"] = "0" * 64
    (tmp_path / "two" / "adapter" / "twinlora.json").write_text(json.dumps(passport))
    assert main(["adapter", "combine", one, two, "--output", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert "were trained with other base models" in error
    assert "or delete their twinlora.json if you know better" in error
    for options, said in (
        ({"weights": [1.0]}, "weights: 1 for 2 adapters"),
        ({"weights": [0.0, 0.0]}, "weights: all are 0"),
        ({"weights": [float("nan"), 1.0]}, "finite number"),
        ({"rank": 2, "method": "cat"}, "method cat cuts nothing"),
        ({"density": 0.2}, "method svd keeps all"),
        ({"seed": 1, "method": "ties"}, "method ties draws nothing"),
    ):
        with pytest.raises(ConfigError, match=said):
            validated(AdapterCombineOptions, {"adapters": [one, two], "output": "x"} | options)

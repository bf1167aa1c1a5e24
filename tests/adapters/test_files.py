import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinlora.adapters import files, passport
from twinlora.adapters.bank import AdapterBank
from twinlora.adapters.lora import attach, lora_layers, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.errors import AdapterError
from twinlora.model.load import load_model, load_tokenizer, resolve
from twinlora.numerics.formats import NF4Format


def model_with_adapter(tiny, config=None, seed=0, **arguments):
    model = load_model(resolve(str(tiny)), dtype=torch.float32, **arguments)
    attach(model, config or LoraConfig(rank=4, alpha=8), seed=seed)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


IDS = torch.arange(12)[None]


@pytest.mark.parametrize("quantize", [None, NF4Format()])
def test_round_trip(tiny, tmp_path, quantize):
    config = LoraConfig(rank=4, alpha=8)
    model = model_with_adapter(tiny, config, quantize=quantize)
    files.save_adapter(model, tmp_path / "a", str(tiny))
    again = load_model(resolve(str(tiny)), dtype=torch.float32, quantize=quantize)
    files.load_adapter(again, files.read_adapter(tmp_path / "a"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (tmp_path / "a" / files.WEIGHTS).stat().st_mode & 0o044, "readable by others, as the umask says"


def test_the_initial_adapter_is_the_same_on_every_base(tiny):
    dense = load_model(resolve(str(tiny)))
    quantized = load_model(resolve(str(tiny)), quantize=NF4Format())
    for model in (dense, quantized):
        attach(model, LoraConfig(rank=4), seed=3)
    for name, parameter in trainable_parameters(dense).items():
        assert torch.equal(parameter, trainable_parameters(quantized)[name])


def test_targets(tiny):
    model = load_model(resolve(str(tiny)))
    assert len(attach(model, LoraConfig(target=("q_proj", "v_proj")))) == 4
    assert all(name.endswith(("q_proj", "v_proj")) for name in lora_layers(model))
    with pytest.raises(AdapterError, match=r"'qproj' matches no layer; did you mean .*q_proj"):
        attach(load_model(resolve(str(tiny))), LoraConfig(target=("qproj",)))
    whole = load_model(resolve(str(tiny)))
    attach(whole, LoraConfig(rank=2))
    assert len(lora_layers(whole)) == 14
    assert "lm_head" not in lora_layers(whole)


def _saved(tiny, tmp_path):
    files.save_adapter(model_with_adapter(tiny), tmp_path / "a", "b")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "expected lora_A, lora_B, lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but there is no tensor of it"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices = \[3\]: not supported"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"something_new": 3}, "something_new = 3"),
    ],
)
def test_features_that_we_would_compute_wrongly_are_named(tiny, tmp_path, change, message):
    directory = _saved(tiny, tmp_path)
    config = json.loads((directory / files.CONFIG).read_text())
    (directory / files.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=message):
        files.read_adapter(directory)


def test_every_bad_tensor_is_named(tiny, tmp_path):
    directory = _saved(tiny, tmp_path)
    tensors = load_file(directory / files.WEIGHTS)
    names = list(tensors)
    tensors[names[0]][0, 0] = float("nan")
    del tensors[names[3]]
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2)
    save_file(tensors, directory / files.WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        files.read_adapter(directory)
    for part in ("NaN", "lm_head.weight: not a LoRA matrix", "expected lora_A, lora_B"):
        assert part in str(caught.value)


def test_an_adapter_for_another_shape(tiny, tmp_path):
    directory = _saved(tiny, tmp_path)
    tensors = load_file(directory / files.WEIGHTS)
    wrong = {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}
    save_file(wrong, directory / files.WEIGHTS)
    model = load_model(resolve(str(tiny)))
    with pytest.raises(
        AdapterError, match=r"7 part\(s\) do not fit[\s\S]*layers.7.mlp.down_proj: the model has no such"
    ):
        files.load_adapter(model, files.read_adapter(directory))
    assert not lora_layers(model)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (2**62).to_bytes(8, "little") + b"{}"])
def test_hostile_files_fail_cleanly(tiny, tmp_path, content):
    directory = _saved(tiny, tmp_path)
    (directory / files.WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match="damaged"):
        files.read_adapter(directory)


def test_bank_switches_between_adapters_and_the_base(tiny, tmp_path):
    logits, configs = {}, {"a": LoraConfig(rank=4), "b": LoraConfig(rank=2, alpha=9, target=("q_proj",))}
    for seed, (name, config) in enumerate(configs.items()):
        model = model_with_adapter(tiny, config, seed=seed)
        files.save_adapter(model, tmp_path / name, "b")
        logits[name] = model(IDS).logits
    base = load_model(resolve(str(tiny)), dtype=torch.float32)
    logits[None] = base(IDS).logits
    bank = AdapterBank(base)
    for name in configs:
        bank.add(name, files.read_adapter(tmp_path / name))
    for name in ("a", None, "b", "a", "b", None):
        bank.use(name)
        # Not to the bit: products of the same numbers elsewhere in memory may be summed up in another order.
        torch.testing.assert_close(base(IDS).logits, logits[name], rtol=0, atol=1e-5)
    assert min((logits[one] - logits[two]).abs().max() for one, two in itertools.combinations(logits, 2)) > 1e-2
    with pytest.raises(AdapterError, match="no adapter 'c'; loaded: a, b"):
        bank.use("c")
    with pytest.raises(AdapterError, match="taken"):
        bank.add("a", files.read_adapter(tmp_path / "a"))


def _passport(**changes):
    values = {
        "base_model": "x", "base_fingerprint": "f" * 64, "base_precision": {"bfloat16": 15}, "tokenizer_sha256": "t",
        "chat_template_sha256": None, "method": "lora", "seed": 0, "steps": 1, "versions": {},
    }  # fmt: skip
    return passport.Passport(**(values | changes))


def test_passport(tiny, tmp_path):
    model = model_with_adapter(tiny)
    files.save_adapter(model, tmp_path / "a", "x", _passport())
    check = {"base": "mine", "fingerprint": "f" * 64, "precision": {"bfloat16": 15}}
    assert passport.check(tmp_path / "a", **check) == []
    (line,) = passport.check(tmp_path / "a", **(check | {"precision": {"nf4-64-dq256": 14}}))
    assert "trained on 15 layers bfloat16, running on 14 layers nf4-64-dq256" in line
    with pytest.raises(AdapterError, match=r"trained on: x .*f{16}[\s\S]*loading on: mine .*0{16}"):
        passport.check(tmp_path / "a", **(check | {"fingerprint": "0" * 64}))
    (tmp_path / "a" / passport.FILE).unlink()
    (line,) = passport.check(tmp_path / "a", **check)
    assert "no passport" in line


def test_a_tokenizers_digest_does_not_depend_on_its_use(tiny, tmp_path):
    """tokenizer.json may switch on truncation and padding; the first plain call switches them off."""
    expected = passport.tokenizer_digests(load_tokenizer(resolve(str(tiny))))
    path = shutil.copytree(tiny, tmp_path / "base") / "tokenizer.json"
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 258, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(resolve(str(path.parent)))
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.padding is not None
    assert passport.tokenizer_digests(tokenizer) == expected
    tokenizer("x")
    assert passport.tokenizer_digests(tokenizer) == expected


def test_a_path_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name, what in (("file", "is a file"), ("nothing", "no such directory")):
        with pytest.raises(AdapterError, match=f"{what}; expected a PEFT adapter directory or a run's directory"):
            files.read_adapter(tmp_path / name)

"""Adapters from strangers: every problem in one message, and no claim of a file costs memory or time."""

import hashlib
import json
import os
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinlora.adapters import passport
from twinlora.adapters.read import CONFIG, WEIGHTS, read_adapter
from twinlora.adapters.strict import read_tensors
from twinlora.errors import AdapterError

A, B = "base_model.model.model.layers.0.q_proj.lora_A.weight", "base_model.model.model.layers.0.q_proj.lora_B.weight"


@pytest.fixture
def adapter(tmp_path):
    save_file({A: torch.ones(2, 8), B: torch.ones(6, 2)}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    assert read_adapter(tmp_path).configs["model.layers.0.q_proj"].scale == 2
    return tmp_path


def refusal(directory):
    start = time.monotonic()
    with pytest.raises(AdapterError) as caught:
        read_adapter(directory)
    assert time.monotonic() - start < 5
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def container(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\xff" * 40, "header claims 18,446,744,073,709,551,615 bytes, the file has 40"),
        (struct.pack("<Q", 2 << 30) + b"{}", "header claims 2,147,483,648 bytes, the file has 10"),
        (container(b"{" * 100_000), "the header is not JSON"),
        (container(b"[" * 100_000), "the header is not JSON"),
        (container([1]), "the header is a JSON list; expected an object"),
        (container({A: 3}), "expected dtype, shape and data_offsets"),
        (container({A: entry("I64", offsets=(0, 32))}, bytes(32)), "dtype I64; expected one of F64, F32, F16, BF16"),
        (container({A: entry([], offsets=(0, 4))}, bytes(4)), "dtype []; expected"),
        (container({A: entry("F8_E4M3", offsets=(0, 4))}, bytes(4)), "dtype F8_E4M3; expected"),
        (container({A: entry(shape=(), offsets=(0, 4))}, bytes(4)), r"shape []; expected positive sizes"),
        (container({A: entry(shape=(-2, -2))}, bytes(16)), r"shape [-2, -2]; expected positive sizes"),
        (container({A: entry(shape=(2.0, 2))}, bytes(16)), r"shape [2.0, 2]; expected positive sizes"),
        (container({A: entry(shape=(0, 2), offsets=(0, 0))}), r"shape [0, 2]; expected positive sizes"),
        (container({A: entry(shape=(2**40, 2**40))}, bytes(16)), "16 bytes; expected 4,835,703,278,458,516,698,824,704"),
        (container({A: entry(offsets=(0, 10**15))}, bytes(16)), "ends at byte 1,000,000,000,000,000 of 16"),
        (container({A: entry(offsets=(16, 0))}, bytes(16)), "offsets [16, 0]; expected [begin, end]"),
        (container({A: entry(), B: entry(offsets=(8, 24))}, bytes(24)), f"{B}: overlaps {A} in the file"),
        (container({A: entry(offsets=(8, 24))}, bytes(24)), f"damaged: 8 bytes before {A} belong to no tensor"),
        (container({A: entry(shape=[10**4000] * 8)}, bytes(16)), "expected positive sizes"),
        (container({"\ud800": entry()}, bytes(16)), "the header holds half of a character"),
        (container({"__metadata__": 3, A: entry()}, bytes(16)), "__metadata__: expected an object of texts"),
        (container({"__metadata__": {"a": {"b": 1}}, A: entry()}, bytes(16)), "__metadata__: expected an object of texts"),
        (container({A: entry(), B: entry(offsets=(20, 36))}, bytes(36)), f"4 bytes before {B} belong to no tensor"),
        (container(b'{"x": %s, "x": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(16)), "x: is there twice"),
    ],
)  # fmt: skip
def test_hostile_weights(adapter, content, message):
    (adapter / WEIGHTS).write_bytes(content)
    assert message in refusal(adapter)


def test_a_header_as_long_as_it_claims(adapter):
    with (adapter / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30))
        file.truncate((2 << 30) + 8)  # sparse: takes no room
    assert "header claims 2,147,483,648 bytes" in refusal(adapter)


def test_layers_come_in_the_order_of_the_file(tmp_path):
    names = [f"base_model.model.layers.{i}.q_proj.lora_{part}.weight" for i in range(40) for part in "AB"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    expected = sorted(f"layers.{i}.q_proj" for i in range(40))
    assert [list(read_adapter(tmp_path).tensors) for _ in range(3)] == [expected] * 3


def test_tensors_may_lie_where_their_type_would_not(tmp_path):
    path, values = tmp_path / "x.safetensors", torch.randn(2, 3)
    header = {"half": entry("BF16", [1], (0, 2)), "float": entry("F32", [2, 3], (2, 26))}
    half = torch.tensor([0.5], dtype=torch.bfloat16)
    path.write_bytes(container(header, half.view(torch.uint8).numpy().tobytes() + values.numpy().tobytes()))
    found = read_tensors(path)
    assert found.problems == []
    assert found.digest == hashlib.sha256(path.read_bytes()).digest()
    for name, tensor in load_file(path).items():
        assert torch.equal(found.value[name], tensor)


def test_bytes_that_no_tensor_claims_are_not_read(adapter):
    with (adapter / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)
    assert "bytes after the last tensor" in refusal(adapter)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 2, 2), "lora_A has 3 dimensions; expected 2"),
        ((8,), "lora_A has 1 dimensions"),
        ((3, 8), "do not multiply"),
    ],
)
def test_shapes(adapter, shape, message):
    save_file({A: torch.ones(shape), B: torch.ones(6, 2)}, adapter / WEIGHTS)
    assert message in refusal(adapter)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "the file is a JSON list; expected an object"),
        ("", "the file is not JSON"),
        ("{" * 90_000, "the file is not JSON"),
        ('{"a":' * 90_000, "the file is not JSON"),
        ('{"r": 2, "r": 4}', "r: is there twice"),
        ({"r": 0}, "r = 0: expected an integer above 0"),
        ({"r": True}, "r = True: expected an integer above 0"),
        ({"r": 4}, "q_proj: rank 2; adapter_config.json says 4"),
        ({"lora_alpha": -4}, "lora_alpha = -4: expected a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan: expected a number above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf: expected a number above 0"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
        ({"base_model_name_or_path": "\ud800"}, "holds half of a character"),
        ({"lora_alpha": "32"}, "lora_alpha = 32: expected a number above 0"),
        ({"lora_dropout": 2}, "lora_dropout = 2: expected a number from 0 to 1"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = lm_head: expected a list of names"),
        ({"rank_pattern": [1]}, "rank_pattern = [1]: expected an object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj': 0, expected an integer above 0"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern 'q_proj': nan, expected a number above 0"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern '(': not a regular expression"),
        ({"alpha_pattern": {"a" * 999: 3}}, "999 characters; expected at most 200"),
        ({"alpha_pattern": {"(((a{1000}){1000}){1000}){1000}": 3}}, "counts in braces are not supported"),
        ({"alpha_pattern": {"(.|..)+[xyz]": 3}}, "takes too long on model.layers.0"),
    ],
)  # fmt: skip
def test_hostile_options(adapter, text, message):
    if isinstance(text, dict):
        tensors = {A: torch.ones(2, 8), B: torch.ones(6, 2)}
        save_file({key.replace("q_proj", "q" * 60 + "q_proj"): t for key, t in tensors.items()}, adapter / WEIGHTS)
        text = json.dumps(json.loads((adapter / CONFIG).read_text()) | text)
    (adapter / CONFIG).write_text(text)
    assert message in refusal(adapter)


def test_everything_in_one_message(adapter):
    tensors = load_file(adapter / WEIGHTS)
    tensors[B][0, 0] = float("nan")
    save_file(
        tensors | {"stranger": torch.ones(1), "base_model.model.k_proj.lora_A.weight": torch.ones(2, 2)},
        adapter / WEIGHTS,
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "all", "use_lisp": True, "use_dora": False}
    (adapter / CONFIG).write_text(json.dumps(config))
    message = refusal(adapter)
    assert "5 problem(s)" in message
    for part in (
        "config.json: bias 'all'",
        "config.json: use_lisp = True",
        f"{B}: holds NaN",
        "stranger: not a LoRA",
        "k_proj: has lora_A",
    ):
        assert part in message
    (adapter / CONFIG).write_text(json.dumps(config | {"r": -1}))
    assert "r = -1" in refusal(adapter)
    assert "holds NaN" in refusal(adapter)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file(adapter, name):
    (adapter / name).unlink()
    assert f"no {name}" in refusal(adapter)
    (adapter / name).symlink_to(adapter / name)
    assert f"{name} is no regular file" in refusal(adapter)
    (adapter / name).unlink()
    (adapter / name).mkdir()
    assert f"{name} is a directory, not a file" in refusal(adapter)
    (adapter / name).rmdir()
    os.mkfifo(adapter / name)
    assert f"{name} is no regular file" in refusal(adapter)


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "none"):
        assert "adapter" in refusal(path)


def test_a_name_that_never_ends(adapter):
    long = "base_model.model." + "q" * 5000 + ".lora_A.weight"
    save_file({long: torch.ones(2, 8)}, adapter / WEIGHTS)
    message = refusal(adapter)
    assert "a name of 5031 characters" in message
    assert len(message) < 1000


@pytest.mark.parametrize("text", ["[]", "{", '{"a":' * 90_000, '{"method": 3}'])
def test_a_damaged_passport(adapter, text):
    (adapter / passport.FILE).write_text(text)
    with pytest.raises(AdapterError, match="damaged passport"):
        passport.read(adapter)

"""Which precision a base is to have, from files and passports."""

import json

import pytest

from twinlora.adapters import passport
from twinlora.adapters.precision import agreed, read_layers, trained_on
from twinlora.errors import AdapterError, ConfigError
from twinlora.numerics.formats import NF3Format, NF4Format

LAYERS = {"a": "nf3-64-dq256", "b": "int8-64", "c": "16bit"}


def paper(precision, layers=None):
    return passport.Passport(
        base_model="m", base_fingerprint="f", base_precision=precision, layer_precision=layers, tokenizer_sha256="t",
        chat_template_sha256=None, method="hybrid", versions={},
    )  # fmt: skip


MIXED = paper({"nf3-64-dq256": 1, "int8-64": 1, "bfloat16": 2}, LAYERS)


def write(directory, found):
    directory.mkdir(parents=True)
    (directory / passport.FILE).write_text(found.model_dump_json())


def test_layers_come_from_a_file_an_adapter_or_a_run(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps(LAYERS))
    write(tmp_path / "run" / "adapter", MIXED)
    for path in (tmp_path / "l.json", tmp_path / "run", tmp_path / "run" / "adapter"):
        assert read_layers(path) == LAYERS


@pytest.mark.parametrize("found", [None, paper({"nf4-64": 3, "bfloat16": 1})])
def test_a_directory_that_does_not_say(tmp_path, found):
    if found is not None:
        write(tmp_path / "run", found)
    else:
        (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="no passport here that says the precision of each layer"):
        read_layers(tmp_path / "run")


def test_what_an_adapter_was_trained_on():
    assert trained_on(None, "x") is None
    assert trained_on(paper({"bfloat16": 4}), "x") is None
    assert trained_on(paper({"nf4-32": 3, "bfloat16": 1}), "x") == NF4Format(32, 0), "not what the options default to"
    assert trained_on(paper({"nf3-64-dq256": 3, "float32": 1}), "x") == NF3Format()
    assert trained_on(MIXED, "x") == LAYERS
    assert trained_on(paper({"bfloat16": 4}, dict.fromkeys(LAYERS, "16bit")), "x") is None
    with pytest.raises(AdapterError, match="x: trained on nf4-64 and int8-64, and its passport does not say"):
        trained_on(paper({"nf4-64": 2, "int8-64": 1}), "x")


def test_adapters_that_agree():
    assert agreed({"a": MIXED, "b": MIXED, "foreign": None}) == LAYERS


def test_adapters_that_do_not_agree_are_named():
    other = paper(MIXED.base_precision, LAYERS | {"a": "int8-64", "b": "nf3-64-dq256"})
    with pytest.raises(AdapterError) as caught:
        agreed({"legal": paper({"nf4-64": 3, "bfloat16": 1}), "mine": MIXED, "yours": other})
    message = str(caught.value)
    assert "adapters mine and legal, yours were trained on bases of different precision" in message
    assert "legal: 3 layers nf4-64, 1 layers bfloat16" in message
    assert "yours differs from mine in 2 layer(s), such as a: int8-64, not nf3-64-dq256" in message
    assert "--layer-precision DIR" in message
    for found in ({}, {"a": None}, {"a": paper({"nf4-64": 3})}):
        with pytest.raises(AdapterError, match=rf"{len(found)} adapter\(s\) given, none trained with --method hybrid"):
            agreed(found)


def test_a_base_in_one_format_is_what_a_map_says_alike(tmp_path):
    """Counts say all of a base in one format, whoever chose it."""
    seal = paper({"nf4-64": 3, "bfloat16": 1})
    write(tmp_path / "a", seal)
    who = {"fingerprint": "f", "base": "b", "precision": seal.base_precision}
    assert passport.check(tmp_path / "a", **who, layers=dict.fromkeys(LAYERS, "nf4-64")) == []

"""Adapters trained for a moment on a tiny random llama, whose turns end with a token that llama.cpp cannot guess."""

import json
from pathlib import Path

import pytest

from tests.conftest import chat, write_jsonl
from tests.export.models import bytes_tokenizer, write_family
from twinlora.config import TrainOptions
from twinlora.model.load import load_model, resolve
from twinlora.model.quantizer import quantizable
from twinlora.train.loop import train


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("base"), bytes_tokenizer("<|done|>"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return write_jsonl(
        tmp_path_factory.mktemp("rows") / "rows.jsonl", [chat(f"say {i}", f"word {i}") for i in range(24)]
    )


def run(base: Path, rows: Path, out: Path, **options) -> Path:
    values = {"lr": 2e-2, "batch_size": 8, "warmup_steps": 0, "dtype": "float32"}
    values |= ({"rank": 4, "alpha": 8} if options["method"] != "full" else {}) | options
    train(TrainOptions(model=str(base), data=rows, eval=rows, output=out, **values))
    return out


@pytest.fixture(scope="session")
def lora(base, rows, tmp_path_factory) -> Path:
    """Layers of different ranks and scales, and DoRA nowhere."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return run(base, rows, out, method="lora", rank_pattern=["q_proj=8"], alpha_pattern=["down_proj=16"])


@pytest.fixture(scope="session")
def other(base, rows, tmp_path_factory) -> Path:
    """Another adapter for the same base."""
    return run(base, rows, tmp_path_factory.mktemp("other") / "run", method="lora", seed=5, lr=4e-2)


@pytest.fixture(scope="session")
def qlora(base, rows, tmp_path_factory) -> Path:
    return run(base, rows, tmp_path_factory.mktemp("qlora") / "run", method="qlora")


@pytest.fixture(scope="session")
def hybrid(base, rows, tmp_path_factory) -> Path:
    """On a base whose layers are in NF3, NF4, int8 and 16 bit by turns."""
    directory = tmp_path_factory.mktemp("hybrid")
    kinds = ("nf3-64-dq256", "nf4-64-dq256", "int8-64", "16bit")
    names = quantizable(load_model(resolve(str(base))))
    (directory / "layers.json").write_text(json.dumps({name: kinds[i % 4] for i, name in enumerate(names)}))
    return run(base, rows, directory / "run", method="hybrid", layer_precision=directory / "layers.json")

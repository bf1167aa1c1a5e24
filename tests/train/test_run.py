"""The directory of a run: what it replaces, and what it never touches."""

import json
import os

import pytest

from tests.conftest import chat, write_jsonl
from tests.train.test_loop import options
from twinlora.errors import ConfigError
from twinlora.output import require_apart
from twinlora.train.loop import train
from twinlora.train.run import OWN, RunDirectory


def run_in(path):
    with RunDirectory(path, resume=False, overwrite=True):
        pass


@pytest.fixture(scope="module")
def earlier(tiny, tmp_path_factory):
    """A finished run, with a model beside its adapter."""
    directory = tmp_path_factory.mktemp("earlier")
    data = write_jsonl(directory / "data.jsonl", [chat(f"say {i}", "word") for i in range(8)])
    train(options(tiny, data, directory / "run", max_steps=1))
    (directory / "run" / "model").mkdir()
    for file in tiny.iterdir():
        os.link(file, directory / "run" / "model" / file.name)
    write_jsonl(directory / "run" / "checkpoints" / "data.jsonl", [chat("a", "b")])
    return directory


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["model", "links", "init_adapter", "layer_precision", "data", "eval"])
def test_what_is_read_is_not_removed(tiny, tmp_path, earlier, kind, resume):
    run, linked = earlier / "run", tmp_path / "linked"
    linked.mkdir()
    for file in (run / "model").iterdir():
        (linked / file.name).symlink_to(file)
    layers = run / "adapter" / "layers.json"
    names = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    names += ("mlp.down_proj",)
    layers.write_text(json.dumps({f"model.layers.{i}.{name}": "nf4-64" for i in range(2) for name in names}))
    change = {
        "model": {"model": str(run / "model")},
        "links": {"model": str(linked)},
        "init_adapter": {"init_adapter": run},
        "layer_precision": {"layer_precision": layers, "method": "hybrid"},
        "data": {},
        "eval": {"eval": run / "checkpoints" / "data.jsonl"},
    }[kind]
    given = {"resume": resume, "overwrite": not resume} | change
    data = f"{run}/checkpoints/data.jsonl@2" if kind == "data" else earlier / "data.jsonl"
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=r"is read here, and lies where this output is written; give another"):
        train(options(tiny, data, run, **given))
    assert sorted(run.rglob("*")) == before


def test_what_lies_elsewhere_in_the_output_is_read(tmp_path):
    for name in ("data.jsonl", "models", "adapter-2"):
        require_apart(tmp_path, [tmp_path / name], OWN)
    with pytest.raises(ConfigError, match="give another --output"):
        require_apart(tmp_path, [tmp_path / "checkpoints" / "step-1" / "x"], OWN)


def test_a_directory_without_a_mark_of_a_run_is_no_run(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"holds model, but is not a run of ours; give another --output"):
        run_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nor does it look like one afterwards"
    (tmp_path / "metrics.jsonl").write_text("")
    run_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]

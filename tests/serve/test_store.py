"""What the registry is given: weights under the hash of the very bytes that they came from."""

import hashlib
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.serve.conftest import write_adapter
from twinlora.adapters.bank import AdapterBank
from twinlora.adapters.files import CONFIG, WEIGHTS, read_adapter
from twinlora.errors import AdapterError
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import load_model, load_tokenizer, precision_by_layer, resolve
from twinlora.serve import store as module
from twinlora.serve.store import ModelStore


@pytest.fixture
def store(tiny):
    source = resolve(str(tiny))
    model = load_model(source, dtype=torch.float32)
    engine = SimpleNamespace(bank=AdapterBank(model), tokenizer=load_tokenizer(source))
    origin = {"base": str(tiny), "fingerprint": fingerprint(source), "precision": precision_by_layer(model)}
    return ModelStore(engine, limit=2**20, **origin, layers=None)


@pytest.fixture
def adapter(adapters, tmp_path):
    return shutil.copytree(adapters["a0"], tmp_path / "a0")


def test_the_hash_is_that_of_both_files(store, adapter):
    loaded = store.load(adapter)
    parts = [hashlib.sha256((adapter / name).read_bytes()).digest() for name in (CONFIG, WEIGHTS)]
    assert loaded.digest == hashlib.sha256(b"".join(parts)).hexdigest()
    assert loaded.system == "Be brief."
    config = adapter / CONFIG
    config.write_text(config.read_text() + "\n")
    assert store.load(adapter).digest != loaded.digest


def test_weights_in_memory_do_not_follow_their_file(store, adapter):
    tensors = store.load(adapter).tensors
    before = {name: (layer.a.clone(), layer.b.clone()) for name, layer in tensors.layers.items()}
    file = adapter / WEIGHTS
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\x3f" * (file.stat().st_size // 2))
    assert all(torch.equal(layer.a, before[name][0]) for name, layer in tensors.layers.items())
    assert all(torch.equal(layer.b, before[name][1]) for name, layer in tensors.layers.items())


@pytest.mark.parametrize("changed", [CONFIG, WEIGHTS])
def test_files_replaced_while_they_are_read_are_refused(store, adapter, adapters, monkeypatch, changed):
    """The configuration of one adapter and the weights of another may fit each other."""

    def read(directory):
        found = read_adapter(directory)
        shutil.copy(adapters["a4"] / changed, directory / "new")
        (directory / "new").replace(directory / changed)
        return found

    monkeypatch.setattr(module, "read_adapter", read)
    with pytest.raises(AdapterError, match="changed while they were read; try again"):
        store.load(adapter)


def test_what_can_never_fit_is_not_read(store, adapter, monkeypatch):
    with (adapter / WEIGHTS).open("r+b") as stream:
        stream.truncate(2**30)
    monkeypatch.setattr(module, "read_adapter", None)
    with pytest.raises(AdapterError, match="adapters have 1,048,576: raise --adapter-memory"):
        store.load(adapter)


def test_another_base_is_refused_with_both_sides_named(store, tiny, tmp_path):
    directory = write_adapter(tiny, tmp_path / "b", 1, base_model="other", base_fingerprint="f" * 64)
    with pytest.raises(AdapterError, match=r"trained on: other \(weights ffffffffffffffff\)\n +loading on: .*tiny"):
        store.load(directory)

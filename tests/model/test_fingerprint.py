"""One hash over a base's tensors, and the cache that spares reading them again."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from twinlora.errors import StorageError
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import resolve


def test_fingerprint_does_not_depend_on_sharding_and_sees_a_bit(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = fingerprint(resolve(str(tiny)))
    assert fingerprint(resolve(str(tiny))) == whole  # from the cache
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(resolve(str(tmp_path / "shards"))) == whole
    changed = shutil.copytree(tiny, tmp_path / "changed")
    blob = bytearray((changed / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (changed / "model.safetensors").write_bytes(blob)
    assert fingerprint(resolve(str(changed))) != whole


def test_hashes_of_files_that_are_gone_are_forgotten(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a|b", "c"):
        fingerprint(resolve(str(shutil.copytree(tiny, tmp_path / name))))
    cache = tmp_path / "cache/twinlora/fingerprints.json"
    assert {key.rsplit("|", 4)[0] for key in json.loads(cache.read_text())} == {
        str(tmp_path / name / "model.safetensors") for name in ("a|b", "c")
    }
    shutil.rmtree(tmp_path / "c")
    shutil.copy(tmp_path / "a|b/model.safetensors", tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "a|b/model.safetensors")
    fingerprint(resolve(str(tmp_path / "a|b")))
    (key,) = json.loads(cache.read_text())
    assert str((tmp_path / "a|b/model.safetensors").stat().st_ino) in key.split("|")


def test_a_path_that_is_not_utf8_is_a_note(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = resolve(str(shutil.copytree(tiny, tmp_path / os.fsdecode(b"caf\xe9"))))
    notes = []
    assert fingerprint(source, notes.append) == fingerprint(resolve(str(tiny)), notes.append)
    (note,) = notes
    assert "fingerprint not kept" in note
    with pytest.raises(StorageError, match="fingerprint not kept"):
        fingerprint(source)

"""Tensors of a base, one at a time, and files that are not what they seem."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinlora.errors import ModelError
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.load import resolve

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("kept", [POINTER, 1000, -100, b""])
def test_a_file_that_is_not_whole_is_named(tiny, tmp_path, kept):
    directory = shutil.copytree(tiny, tmp_path / "m")
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(kept if isinstance(kept, bytes) else whole[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file \(.*\); fetch it again"):
        Checkpoint(resolve(str(directory)))
    file.write_bytes(whole)
    checkpoint = Checkpoint(resolve(str(directory)))
    file.write_bytes(POINTER)
    for look in (checkpoint.read, checkpoint.shape):
        with pytest.raises(ModelError, match="fetch it again"):
            look("model.norm.weight")


def test_a_tensor_of_a_layer_that_has_no_place_for_it_is_not_passed_on(tiny, tmp_path):
    directory = shutil.copytree(tiny, tmp_path / "m")
    file, lost = directory / "model.safetensors", "model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    Checkpoint(resolve(str(directory)))
    for name in (lost, lost.removeprefix("model.")):
        save_file(tensors | {name: torch.ones(64)}, file)
        with pytest.raises(
            ModelError, match=f"1 tensor\\(s\\) of unknown use\n  left over: {lost}, for which the model"
        ):
            Checkpoint(resolve(str(directory)))

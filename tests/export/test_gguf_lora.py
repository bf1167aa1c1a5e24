"""What llama.cpp cannot add is refused before a file is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from twinlora.adapters.read import AdapterFile
from twinlora.adapters.targets import LayerConfig
from twinlora.errors import AdapterError
from twinlora.export.gguf_lora import write_gguf_lora


def test_a_tied_head_has_no_tensor_of_its_own_there(tmp_path):
    factors = {"lm_head": (torch.randn(4, 64), torch.randn(100, 4))}
    adapter = AdapterFile(Path("a"), factors, {"lm_head": LayerConfig(4, 2.0)}, {})
    with pytest.raises(AdapterError, match="loads no adapter on a head that is tied to the embedding in"):
        write_gguf_lora(adapter, SimpleNamespace(tie_word_embeddings=True), tmp_path / "a.gguf", "a")
    assert not list(tmp_path.iterdir())

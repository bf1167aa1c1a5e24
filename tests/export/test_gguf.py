"""GGUF files in llama.cpp: logits of every family, tokens of both kinds of tokenizers, and what is refused."""

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from tests.export.models import FAMILIES, bytes_tokenizer, pieces_tokenizer, write_family
from twinlora.adapters.merge import Merged
from twinlora.data.formats import Row
from twinlora.data.template import encode_prompt
from twinlora.errors import BackendError, ModelError
from twinlora.export import families, gguf
from twinlora.export.llama_cpp import LlamaCpp
from twinlora.export.probes import Probe, model_answers
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.load import resolve

pytest.importorskip("xllamacpp")
IDS = [(7 * i * i + 11 * i) % 250 + 3 for i in range(40)]
PROBE = Probe(IDS, [1, 2, 5, 12, 25, 39], "r")


def write(directory, path, tokenizer, quant="f16") -> Merged:
    weights = Merged(Checkpoint(resolve(str(directory))), None)
    gguf.write_gguf(weights, path, tokenizer, quant=quant, name="tiny", stop={tokenizer.eos_token_id})
    return weights


def worst(path, expected, tokenizer) -> float:
    """The largest difference of log p over the whole vocabulary."""
    with LlamaCpp(path, context=256) as running:
        answers = running.answers([PROBE], tokenizer)
    return max((e[a.ids].double() - a.log_probs).abs().max().item() for e, a in zip(expected, answers, strict=True))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_are_those_of_transformers(name, tmp_path):
    tokenizer = bytes_tokenizer()
    write_family(name, tmp_path, tokenizer)
    weights = write(tmp_path, tmp_path / "m.gguf", tokenizer)
    expected = model_answers(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), [PROBE])
    assert worst(tmp_path / "m.gguf", expected, tokenizer) < 0.02
    assert gguf.differing_tensor(tmp_path / "m.gguf", weights) is None

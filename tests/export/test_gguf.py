"""GGUF files in llama.cpp: logits of every family, tokens of both kinds of tokenizers, and what is refused."""

import struct

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from tests.conftest import tiny_tokenizer
from tests.export.models import FAMILIES, bytes_tokenizer, pieces_tokenizer, write_family
from twinlora.adapters.merge import Merged
from twinlora.data.formats import Row
from twinlora.data.template import encode_prompt
from twinlora.errors import BackendError, ModelError
from twinlora.export import families, gguf, vocabulary
from twinlora.export.llama_cpp import LlamaCpp
from twinlora.export.probes import Probe, model_answers
from twinlora.export.readback import gguf_difference
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.load import resolve
from twinlora.numerics import ggml

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


@pytest.mark.parametrize("quant", ["bf16", "q8_0", "q4_0", "iq4_nl"])
def test_every_format_is_loaded_and_read_back(quant, tmp_path):
    """Low-bit weights are compared with a model that has exactly these weights: what is left is llama.cpp's own 8-bit
    activations."""
    tokenizer = bytes_tokenizer()
    write_family("llama", tmp_path, tokenizer)
    weights = write(tmp_path, tmp_path / "m.gguf", tokenizer, quant)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kinds = {}
    with torch.no_grad():
        for name in weights.names:
            parameter = model.get_parameter(name)
            kind = gguf.tensor_type(weights, name, quant).name.lower()
            kinds[kind] = kinds.get(kind, 0) + 1
            if kind in ggml.BLOCK_BYTES:
                parameter.copy_(ggml.dequantize(ggml.quantize(parameter, kind), kind))
            elif kind == "bf16":
                parameter.copy_(parameter.to(torch.bfloat16))
    assert worst(tmp_path / "m.gguf", model_answers(model, [PROBE]), tokenizer) < (0.1 if quant == "bf16" else 0.3)
    assert gguf_difference(tmp_path / "m.gguf", weights) is None
    expected = {"bf16": {"bf16": 16, "f32": 5}, "q8_0": {"q8_0": 16, "f32": 5}}
    assert kinds == expected.get(quant, {quant: 14, "q8_0": 2, "f32": 5})
    found = {tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert found == set(kinds)


@pytest.mark.parametrize("make", [bytes_tokenizer, pieces_tokenizer])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(make, tmp_path):
    tokenizer = make()
    write_family("llama", tmp_path, tokenizer)
    write(tmp_path, tmp_path / "m.gguf", tokenizer)
    texts = ["say word ab", "a  word\n\nabab", "Größe 12345 天气 🙂", " leading", "<|im_start|>user\nword<|im_end|>\n"]
    row = Row("r", messages=({"role": "user", "content": "say 1"}, {"role": "assistant", "content": "word"}))
    with LlamaCpp(tmp_path / "m.gguf", context=256) as running:
        for text in texts:
            assert running.tokens(text) == tokenizer(text)["input_ids"], text
        assert running.prompt(row)[1] == encode_prompt(tokenizer, row)
        assert running.stops(tokenizer.eos_token_id, IDS[:4])
        assert not running.stops(70, IDS[:4])


@pytest.mark.parametrize("cuts", vocabulary._NAMES, ids=list(vocabulary._NAMES.values()))
def test_texts_are_cut_by_the_rules_of_the_name(cuts, tmp_path):
    tokenizer = bytes_tokenizer(cuts="digits" if cuts[0] == "digits" else cuts[0])
    write_family("llama", tmp_path, tokenizer)
    write(tmp_path, tmp_path / "m.gguf", tokenizer)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == vocabulary._NAMES[cuts]
    texts = ["say 1234 word 12345", "it'S word's 天气12 Größe", "a\n\n  b\t c ", "🙂 x/y wordWORD"]
    with LlamaCpp(tmp_path / "m.gguf", context=256) as running:
        for text in texts:
            assert running.tokens(text) == tokenizer(text)["input_ids"], text


def test_other_rules_and_other_tokenizers_are_refused():
    writer = GGUFWriter(None, "llama")
    with pytest.raises(
        ModelError, match=r"cuts texts by rules that have no name here: \['abc'\]; known: gpt-2, smollm"
    ):
        vocabulary.add_vocabulary(writer, bytes_tokenizer(cuts="abc"), 320, set())
    with pytest.raises(ModelError, match="the embedding 10 rows"):
        vocabulary.add_vocabulary(writer, bytes_tokenizer(), 10, set())
    with pytest.raises(ModelError, match="the tokenizer has no merges"):
        vocabulary.add_vocabulary(writer, tiny_tokenizer(), 320, set())


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    config = FAMILIES["gemma3"].to_dict() | {"layer_types": ["full_attention"] * 7, "query_pre_attn_scalar": 16}
    with pytest.raises(
        ModelError, match=r"scalar 16 is not head_dim 32; its layers are not five local ones and a global"
    ):
        families.add_hyperparameters(None, type(FAMILIES["gemma3"])(**config))
    config = type(FAMILIES["llama"])(
        **(
            FAMILIES["llama"].to_dict()
            | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
        )
    )
    with pytest.raises(ModelError, match="rope_type 'dynamic' is not supported"):
        families._add_scaling(None, config, families.rotation(config))
    with pytest.raises(ModelError, match="gpt2 models are not supported; expected one of llama, mistral"):
        families.family_of(GPT2Config())


def test_caveats_name_the_window():
    assert families.caveats(MistralConfig(sliding_window=4096)) == [
        "llama.cpp has no sliding window for mistral: beyond 4,096 tokens it sees more"
    ]
    assert families.caveats(FAMILIES["llama"]) == []
    assert "long rotary factors" in families.caveats(FAMILIES["phi3-longrope"])[0]


def small_gguf(path, kind):
    """A file with one tensor of 32 × 32 weights."""
    writer = GGUFWriter(path, "llama")
    data = ggml.quantize(torch.randn(32, 32), kind).numpy()
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("place", [".", "package_for_tests/bin"])
def test_k_quants_need_llama_quantize(place, tmp_path, monkeypatch):
    """On PATH, or in a package that brings it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gguf, "_PACKAGE", "package_for_tests")
    (tmp_path / "package_for_tests" / "bin").mkdir(parents=True)
    with pytest.raises(BackendError, match=r"llama-quantize, which is not on PATH: `pip install"):
        gguf.llama_quantize(tmp_path / "a", tmp_path / "b", "q4_k_m")
    program = tmp_path / place / "llama-quantize"
    small_gguf(tmp_path / "a", "q4_0")
    program.write_text('#!/bin/sh\n/bin/cp "$1" "$2" && /bin/echo "$3" > said\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    gguf.llama_quantize(tmp_path / "a", tmp_path / "b", "q4_k_m")
    assert (tmp_path / "said").read_text() == "Q4_K_M\n"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    kind = struct.pack("<I", 2)  # of its one tensor, Q4_0: the last thing but its offset before the data
    data = (tmp_path / "a").read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    assert data[at : at + 4] == kind
    (tmp_path / "a").write_bytes(data[:at] + struct.pack("<I", 133) + data[at + 4 :])  # one of a fork
    with pytest.raises(
        BackendError, match=r"wrote tensors that llama.cpp does not know \(.*133.*choose another --quant"
    ):
        gguf.llama_quantize(tmp_path / "a", tmp_path / "b", "q5_k_s")
    program.write_text("#!/bin/sh\n/bin/echo bad tensor >&2\nexit 3\n")
    with pytest.raises(BackendError, match=r"llama-quantize failed \(3\): bad tensor"):
        gguf.llama_quantize(tmp_path / "a", tmp_path / "b", "q4_k_m")


def test_a_file_that_does_not_load_says_why(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(BackendError, match=r"(?s)did not load m.gguf.*(failed|error)"):
        LlamaCpp(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_are_those_of_transformers(name, tmp_path):
    tokenizer = bytes_tokenizer()
    write_family(name, tmp_path, tokenizer)
    weights = write(tmp_path, tmp_path / "m.gguf", tokenizer)
    expected = model_answers(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), [PROBE])
    assert worst(tmp_path / "m.gguf", expected, tokenizer) < 0.02
    assert gguf_difference(tmp_path / "m.gguf", weights) is None

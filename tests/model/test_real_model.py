"""The embedded real model, against transformers' own code."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twinlora.model import swap
from twinlora.model.generate import generate
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, load_tokenizer, resolve, weight_bytes
from twinlora.numerics.formats import NF4Format

pytestmark = pytest.mark.model
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "Once upon a time there was a"]


def test_greedy_answers_are_those_of_transformers(smollm2):
    """In float32, where a near tie cannot tip."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ours = load_model(resolve(str(smollm2)), dtype=torch.float32)
    swap.replace_blocks(ours)
    found = generate(ours, prompts, max_new_tokens=16, stop=set())
    stock = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, answer in zip(prompts, found, strict=True):
        theirs = stock.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=-1)
        assert theirs[0, len(prompt) :].tolist() == answer


def test_every_block_kind_is_replaced(smollm2):
    model = load_model(resolve(str(smollm2)))
    replaced = swap.replace_blocks(model)
    kinds = {"LlamaAttention → Attention": 30, "LlamaMLP → SwiGLU": 30, "LlamaRMSNorm → RMSNorm": 61}
    assert replaced == kinds | {"Linear → DenseLinear": 211}


def test_nf4_weights_are_bitsandbytes_weights(smollm2):
    functional = pytest.importorskip("bitsandbytes.functional")
    quantised = load_model(resolve(str(smollm2)), quantize=NF4Format(64, 0))
    dense = load_model(resolve(str(smollm2)))
    layers = {name: m for name, m in quantised.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 30 * 7
    for name in list(layers)[::17]:
        weight = dense.get_submodule(name).weight
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(layers[name].quantized.dequantize(weight.dtype), theirs.view_as(weight)), name


def test_bits_per_weight_and_what_stays_16_bit(smollm2):
    quantised, dense = load_model(resolve(str(smollm2)), quantize=NF4Format()), load_model(resolve(str(smollm2)))
    layers = {name: m for name, m in quantised.named_modules() if isinstance(m, QuantLinear)}
    linear = sum(m.quantized.nbytes for m in layers.values())
    numbers = sum(m.in_features * m.out_features for m in layers.values())
    assert 8 * linear / numbers == pytest.approx(4.127, abs=0.001)
    assert weight_bytes(quantised) < 0.45 * weight_bytes(dense), "a third of this model is its embedding"
    assert quantised.get_output_embeddings().weight is quantised.get_input_embeddings().weight


def test_tokenizer_has_the_template(smollm2):
    tokenizer = load_tokenizer(resolve(str(smollm2)))
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)

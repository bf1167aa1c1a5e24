"""A model as training has it, on fake tensors: no weights are read or made.

What training finds out by numbers (which blocks are replaced, whether rows may be packed, whether the head is plain)
is found out on a small real instance of the same configuration, once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from twinlora.adapters import init
from twinlora.adapters.lora import attach
from twinlora.adapters.targets import LoraConfig
from twinlora.errors import ModelError
from twinlora.model import attention, forward, swap
from twinlora.model.linear import QuantLinear
from twinlora.model.quantizer import quantizable
from twinlora.model.recompute import recompute_activations
from twinlora.numerics.formats import Format

__all__ = ["FAMILIES", "Proof", "build", "prove", "require_family", "signatures", "with_layers"]

# The families whose training is tested (tests/parity/test_architectures.py), by transformers' `model_type`.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
_EXPERTS = ("num_local_experts", "num_experts")


def require_family(config: PretrainedConfig) -> None:
    """Raise ModelError if memory of this family was never compared with training, or if there are no layers."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model family {config.model_type!r} cannot be planned yet; these can: {', '.join(FAMILIES)}\n"
            "  `twinlora train` may train it all the same, and reports the memory that it takes"
        )
    if config.num_hidden_layers < 1:
        raise ModelError(
            f"{config.model_type} with num_hidden_layers {config.num_hidden_layers} cannot be planned\n"
            "  expected at least one layer; look at the model's config.json"
        )


def signatures(config: PretrainedConfig, longest: int) -> list[tuple[Any, ...]]:
    """For each layer what sets it apart: a window shorter than the `longest` row, and experts or none."""
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [None] * count
    if window is None or window >= longest:
        kinds = [None] * count
    dense = getattr(config, "mlp_only_layers", None) or ()
    every = getattr(config, "decoder_sparse_step", 1)
    return [(kinds[i], i not in dense and (i + 1) % every == 0) for i in range(count)]


def with_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """The configuration with its first `count` layers alone."""
    short = copy.deepcopy(config)
    kinds = getattr(short, "layer_types", None)
    if kinds is not None:
        short.layer_types = kinds[:count]
    short.num_hidden_layers = count
    return short


def _small(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with narrow layers, as few as show every kind."""
    kinds = signatures(config, 1 << 40)
    layers = next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
    small = with_layers(config, min(max(layers, 2), len(kinds)))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = 2 * min(4, config.num_attention_heads // shared) if shared > 1 else 2
    changes = {"num_attention_heads": heads, "hidden_size": heads * size, "intermediate_size": 128, "n_inner": None}
    changes |= {"num_key_value_heads": min(2, shared), "vocab_size": 256, "moe_intermediate_size": 64}
    changes |= {"shared_expert_intermediate_size": 64, "num_experts_per_tok": 2, "pad_token_id": None}
    changes |= dict.fromkeys(_EXPERTS, 4) | {"bos_token_id": 1, "eos_token_id": 2}
    for key, value in changes.items():
        if getattr(small, key, None) is not None:
            setattr(small, key, value)
    return small


@dataclass(frozen=True)
class Proof:
    """What numbers said about a small real instance."""

    admitted: Mapping[tuple[type[nn.Module], int], bool]  # stock class and number of its candidate
    plain_head: bool
    packed: bool


def prove(config: PretrainedConfig, dtype: torch.dtype, lora: LoraConfig | None, *, fused: bool) -> Proof:
    """Build a small instance for real and look. Call it outside of fake tensors; a result is kept."""
    small = _small(config)
    kind: Any = type(config)
    return _prove(kind, small.to_json_string(use_diff=False), dtype, lora is not None, fused)


@lru_cache(maxsize=64)
def _prove(kind: type[PretrainedConfig], text: str, dtype: torch.dtype, adapted: bool, fused: bool) -> Proof:
    small = kind.from_dict(json.loads(text))
    admitted: dict[tuple[type[nn.Module], int], bool] = {}

    def admit(stock: nn.Module, number: int, candidate: swap.Candidate) -> bool:
        found = swap.probed(stock, number, candidate)
        admitted[type(stock), number] = admitted.get((type(stock), number), True) and found
        return found

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _stock(small, dtype)
        _train(model, LoraConfig(rank=2) if adapted else None)
        if fused:
            swap.replace_blocks(model, admit=admit)
        packed = forward.packing_refusal(model, small.vocab_size) is None
        return Proof(admitted, forward.has_plain_head(model), packed)


def _stock(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    attention.register()
    # The stock loop over experts asks which tokens each one got; the grouped product, training's default, does not.
    experts = {"experts_implementation": "grouped_mm"} if any(hasattr(config, key) for key in _EXPERTS) else {}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **experts)
    model.tie_weights()
    attention.choose(model)
    return model.requires_grad_(False).eval()


def _train(model: PreTrainedModel, lora: LoraConfig | None) -> None:
    if lora is None:
        model.requires_grad_(True)
    else:
        attach(model, lora)
        if lora.init == "pissa":
            init.pissa(model)
    model.train()


def build(
    config: PretrainedConfig,
    proof: Proof,
    *,
    dtype: torch.dtype,
    lora: LoraConfig | None,
    formats: Mapping[str, Format | None],
    checkpointing: bool,
    fused: bool,
) -> tuple[PreTrainedModel, int]:
    """The model that training would have, and the base's parameters; call it under fake tensors.

    `formats` says how linear layers are stored ("": those not named; None: 16 bit); `lora` None trains everything.
    """
    with no_init_weights():
        model = _stock(config, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    for name in quantizable(model):
        fmt = formats.get(name, formats.get(""))
        if fmt is not None:
            parent, _, child = name.rpartition(".")
            module: Any = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, QuantLinear.from_dense(module, module.weight, fmt, name))
    _train(model, lora)
    if checkpointing:
        recompute_activations(model, True)
    if fused:
        swap.replace_blocks(model, admit=lambda stock, number, _: proof.admitted.get((type(stock), number), False))
    return model, parameters

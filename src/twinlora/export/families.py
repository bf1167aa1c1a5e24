"""What llama.cpp wants to know about each family of models, and how it wants their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map
from torch import Tensor

from twinlora.errors import ModelError

__all__ = [
    "FAMILIES",
    "Family",
    "add_hyperparameters",
    "arranged",
    "caveats",
    "family_of",
    "gguf_name",
    "heads_of",
    "name_map",
    "pair_rows",
    "rotation_tensors",
]


@dataclass(frozen=True)
class Family:
    """`paired`: q and k rotate neighbouring rows, not halves. `norm_offset`: what is added to the norms' weights."""

    arch: MODEL_ARCH
    paired: bool = False
    norm_offset: float = 0.0

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(MODEL_ARCH_NAMES[self.arch])


# By transformers' `model_type`.
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, paired=True),
    "mistral": Family(MODEL_ARCH.LLAMA, paired=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, norm_offset=1.0),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, norm_offset=1.0),
    "phi3": Family(MODEL_ARCH.PHI3),
}


def family_of(config: Any) -> Family:
    """Raises ModelError for a family that cannot be written."""
    if config.model_type not in FAMILIES:
        raise ModelError(f"GGUF: {config.model_type} models are not supported; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def pair_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head [.., half + i] -> neighbours: row i and row i + half come to stand together."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def heads_of(name: str, config: Any) -> int | None:
    """How many heads the rows of a parameter belong to, if they are rotated."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)


def name_map(family: Family, config: Any) -> TensorNameMap:
    """From transformers' names to GGUF's."""
    return get_tensor_name_map(family.arch, config.num_hidden_layers)


def gguf_name(names: TensorNameMap, name: str) -> str:
    """Raises ModelError for a tensor that the family does not have."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"GGUF: no name is known for the tensor {name}")
    return str(found)


def arranged(weight: Tensor, name: str, family: Family, config: Any) -> Tensor:
    """A parameter as llama.cpp wants it: float32, heads paired, norms without their offset."""
    weight = weight.float()
    if family.paired and (heads := heads_of(name, config)) is not None:
        weight = pair_rows(weight, heads)
    if family.norm_offset and name.endswith("norm.weight"):
        weight = weight + family.norm_offset
    return weight


def add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Sizes, rotation, windows and caps. Raises ModelError for what llama.cpp computes otherwise."""
    _refuse(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rotation(config)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(window or 0)
    for key, add in (("attn_logit_softcapping", writer.add_attn_logit_softcapping),
                     ("final_logit_softcapping", writer.add_final_logit_softcapping)):  # fmt: skip
        if getattr(config, key, None):
            add(getattr(config, key))
    _add_scaling(writer, config, rope)


def rotation(config: Any) -> dict[str, Any]:
    """The parameters of the (full-attention) rotary embedding."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def caveats(config: Any) -> list[str]:
    """What llama.cpp leaves out of a model, beyond what a comparison of short rows can show."""
    lines = []
    rope = rotation(config)
    if rope.get("rope_type") == "longrope":
        trained = rope["original_max_position_embeddings"]
        lines.append(
            "llama.cpp takes this model's long rotary factors for every prompt once its context (-c) is above "
            f"{trained:,} tokens"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if (
        window
        and config.model_type in ("mistral", "qwen2", "qwen3", "phi3")
        and window < config.max_position_embeddings
    ):
        lines.append(f"llama.cpp has no sliding window for {config.model_type}: beyond {window:,} tokens it sees more")
    return lines


def _refuse(config: Any) -> None:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    problems = []
    if scalar is not None and scalar != config.head_dim:
        problems.append(f"query_pre_attn_scalar {scalar} is not head_dim {config.head_dim}")
    local = config.rope_parameters.get("sliding_attention", {})
    if config.model_type == "gemma3_text":
        if local.get("rope_theta", 10_000) != 10_000:
            problems.append(f"rope_theta {local['rope_theta']:g} of its local layers is not 10000")
        pattern = ["sliding_attention"] * 5 + ["full_attention"]
        expected = (pattern * config.num_hidden_layers)[: config.num_hidden_layers]
        if list(config.layer_types) != expected:
            problems.append("its layers are not five local ones and a global one in turn")
    if getattr(config, "mlp_bias", False):
        problems.append("mlp_bias")
    if problems:
        raise ModelError(f"GGUF: llama.cpp computes {config.model_type} otherwise: {'; '.join(problems)}")


def _add_scaling(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "longrope":
        trained = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / trained
        writer.add_rope_scaling_orig_ctx_len(trained)
        writer.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
        )
    elif kind not in ("default", "llama3"):
        raise ModelError(f"GGUF: rope_type {kind!r} is not supported; expected default, linear, llama3, longrope, yarn")


def rotation_tensors(config: Any) -> dict[str, Tensor]:
    """Factors of frequencies that llama.cpp reads as tensors, float32 [head_dim / 2]."""
    rope = rotation(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {f"rope_factors_{k}.weight": torch.tensor(rope[f"{k}_factor"]).float() for k in ("long", "short")}
    if kind != "llama3":
        return {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)  # tokens of a turn
    trained, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    mixed = ((trained / lengths - low) / (high - low)).clamp(0, 1)  # 1: short turns, which stay as they are
    return {"rope_freqs.weight": (1 / ((1 - mixed) / rope["factor"] + mixed)).float()}

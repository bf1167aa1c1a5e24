"""Models of random weights in well-known shapes, made on the device layer by layer: ours, and the peers'.

The 16-bit weights of a model that is quantised never exist together. With a real checkpoint the arithmetic is the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_measure import Setting
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from twinlora.adapters.lora import attach, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import OptimizerOptions
from twinlora.data.packing import Batch, make_batch
from twinlora.data.template import Example
from twinlora.model import attention, forward, swap
from twinlora.model.blocks import Attention, RMSNorm, SwiGLU
from twinlora.model.linear import DenseLinear, QuantLinear, is_linear
from twinlora.model.recompute import recompute_activations
from twinlora.numerics.formats import NF4Format
from twinlora.numerics.ops import QuantTensor
from twinlora.train.optim import MasterAdamW
from twinlora.train.step import train_step

# hidden, layers, heads, key/value heads, intermediate, vocabulary
SHAPES = {
    "7B": (4096, 32, 32, 32, 11008, 32000),  # llama 1 (arXiv 2302.13971)
    "33B": (6656, 60, 52, 52, 17920, 32000),
    "65B": (8192, 80, 64, 64, 22016, 32000),
    "8B": (4096, 32, 32, 8, 14336, 128256),  # llama 3 (arXiv 2407.21783)
    "tiny": (64, 2, 4, 2, 128, 300),
}
RANK, ALPHA, CLIP = 16, 32, 1.0


def shape(name: str) -> LlamaConfig:
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, max_position_embeddings=1 << 15, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip


def skeleton(config: LlamaConfig) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def build(config: LlamaConfig, device: torch.device, linear: Callable[[nn.Linear, Tensor], nn.Module]) -> Any:
    """The model in bfloat16; `linear` turns each linear layer but the head, and its weight, into what stands for it."""
    return fill(skeleton(config), device, linear)


def fill(model: Any, device: torch.device, linear: Callable[[nn.Linear, Tensor], nn.Module]) -> Any:
    """Give a skeleton random weights, see `build`."""
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if is_linear(module) and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear(module, _random(module.weight, device)))
        elif name.endswith("rotary_emb"):
            model.get_submodule(name.rpartition(".")[0]).rotary_emb = type(module)(model.config).to(device)
        else:
            for key, value in list(module.named_parameters(recurse=False)):
                made = (
                    _random(value, device)
                    if value.dim() > 1
                    else torch.ones(value.shape, dtype=torch.bfloat16, device=device)
                )
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
    return model.requires_grad_(False)


def _random(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)


def nf4(weight: Tensor) -> QuantTensor:
    """Quantised like `ops.quantize`, without its look at the values, which fake tensors have not."""
    fmt = NF4Format()
    packed, scales = torch.ops.twinlora.nf4_quantize(weight, fmt.block_size)
    nested = torch.ops.twinlora.scales_quantize(scales, fmt.nested_block_size)
    return QuantTensor(packed, *nested, tuple(weight.shape), fmt)


def with_weight(module: nn.Linear, weight: Tensor) -> nn.Module:
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@dataclass
class Ours:
    """A model as a run trains it, and its optimiser."""

    model: Any
    optimizer: MasterAdamW
    plain_head: bool

    def step(self, batch: Batch) -> Tensor:
        """One training step; its loss, on the device."""
        how = {"lr": 1e-4, "max_grad_norm": CLIP, "plain_head": self.plain_head}
        return train_step(self.model, batch, self.optimizer, **how).loss

    def recompute(self, enabled: bool) -> None:
        recompute_activations(self.model, enabled)


def base(config: LlamaConfig, method: str, device: torch.device, mode: Any = None) -> Any:
    """Without adapters: NF4 for `qlora`, else bfloat16. `mode`: a FakeTensorMode under which nothing is computed."""
    attention.register()
    quantized, model = method == "qlora", skeleton(config)
    with mode or contextlib.nullcontext():
        fill(model, device, lambda m, w: QuantLinear(nf4(w), None) if quantized else with_weight(m, w))
    model.set_attn_implementation(attention.NAME)
    return model


def ours(config: LlamaConfig, method: str, device: torch.device, mode: Any = None) -> Ours:
    """Ready to train."""
    model = base(config, method, device, mode)
    with mode or contextlib.nullcontext():
        attach(model, LoraConfig(RANK, ALPHA))
        model.train()
        (replace_unproved if mode else swap.replace_blocks)(model)
        plain = bool(mode) or forward.has_plain_head(model)
        return Ours(model, MasterAdamW(trainable_parameters(model), OptimizerOptions(lr=1e-4)), plain)


def replace_unproved(model: Any) -> None:
    """What `swap.replace_blocks` makes of a llama, without its probe, which needs values; a test holds the two together."""
    for name, module in list(model.named_modules()):
        kind, block = type(module).__name__, None
        if kind == "LlamaAttention":
            block = Attention(module, module.scaling, None)
        elif kind == "LlamaRMSNorm":
            block = RMSNorm(module.weight, module.variance_epsilon)
        elif kind == "LlamaMLP":
            block = SwiGLU(module.gate_proj, module.up_proj, module.down_proj)
        elif name == "lm_head":
            block = DenseLinear(module)
        if block is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, block.train(module.training))


def batch(config: LlamaConfig, rows: int, length: int, device: torch.device) -> Batch:
    """`rows` rows of `length` random tokens that all carry loss."""
    draw = random.Random(0)
    examples = [
        Example([draw.randrange(config.vocab_size) for _ in range(length)], [True] * length, "") for _ in range(rows)
    ]
    return make_batch(examples, rows * length, packed=True, device=device)


def step_flops(config: LlamaConfig, tokens: int, length: int, *, recompute: bool) -> float:
    """Of one step with a frozen base: products with the weights forward and for the input gradient, the head, attention.

    The head's gradient counts like its logits; causal attention half of a square, two and a half times for the gradient.
    """
    d, f = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * (2 * d * d + 2 * d * kv + 3 * d * f)
    scores = 2 * 2 * d * length / 2
    passes = 3 if recompute else 2
    once = config.num_hidden_layers * (passes * layer + (passes + 1.5) * scores)
    return tokens * (once + 2 * 2 * d * config.vocab_size)


def peers() -> list[str]:
    """Names of the ways whose packages are installed."""
    has = {name: importlib.util.find_spec(name) is not None for name in ("peft", "bitsandbytes", "unsloth")}
    out = ["peft-lora"] if has["peft"] else []
    out += ["peft-qlora"] if has["peft"] and has["bitsandbytes"] else []
    return out + (["unsloth-lora", "unsloth-qlora"] if has["unsloth"] else [])


def bitsandbytes_linear(module: nn.Linear, weight: Tensor) -> nn.Module:
    """Its NF4 layer with double quantisation."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
    return layer


def peft_step(
    config: LlamaConfig, way: str, rows: int, length: int, setting: Setting, *, recompute: bool
) -> Callable[[], Tensor]:
    """A step of transformers + PEFT with SDPA, in bfloat16, over bitsandbytes' NF4 for `peft-qlora`."""
    from peft import LoraConfig as Peft
    from peft import get_peft_model

    quantized = way == "peft-qlora"
    model = build(config, setting.device, bitsandbytes_linear if quantized else with_weight)
    model.is_loaded_in_4bit = quantized  # how PEFT learns which layer it wraps
    model.set_attn_implementation("sdpa")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, Peft(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    if recompute:
        recompute_activations(model.base_model.model, True)
    ids = torch.randint(0, config.vocab_size, (rows, length), device=setting.device)
    return plain_step(model, ids)


def plain_step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step

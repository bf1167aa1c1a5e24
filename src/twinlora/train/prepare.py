"""The model that a run trains: loaded, with its adapter, our blocks, and what was proved about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from twinlora.adapters import files, init
from twinlora.adapters.deploy import Storage, deploy, storage_named
from twinlora.adapters.lora import attach
from twinlora.adapters.targets import LoraConfig
from twinlora.config import TrainOptions
from twinlora.model import bnb4, forward, swap
from twinlora.model.linear import QuantLinear, bits_per_weight
from twinlora.model.load import load_model, precision_by_layer, weight_bytes
from twinlora.model.quantizer import nf4_of
from twinlora.numerics import ops
from twinlora.numerics.formats import Format
from twinlora.train.inputs import Inputs
from twinlora.train.notes import Notes

__all__ = ["Prepared", "prepare", "storage_of"]


@dataclass
class Prepared:
    """A model ready to train, and what was found out while it was made."""

    model: PreTrainedModel
    precision: dict[str, int]
    layers: dict[str, str] | None  # the precision of each, where they differ by choice
    bits: tuple[float, float]  # see `bits_per_weight`
    weight_bytes: int
    replaced: dict[str, int]
    plain_head: bool
    packed: bool

    def frozen(self) -> dict[str, Parameter]:
        """Frozen factors that belong to the adapter: a decomposition need not come out the same twice."""
        return {name: p for name, p in self.model.named_parameters() if ".start_" in name}


def prepare(
    options: TrainOptions,
    inputs: Inputs,
    dtype: torch.dtype,
    device: torch.device,
    notes: Notes,
    precision: Mapping[str, str] | None = None,
) -> Prepared:
    """Load and change the model as `options` say, for method hybrid each layer in its `precision`.

    Raises ModelError or AdapterError.
    """
    lora = LoraConfig.from_options(options)
    initial: dict[str, tuple[Tensor, Tensor]] = {}

    def make_up(name: str, weight: Tensor, quantized: QuantLinear) -> None:
        initial[name] = init.loftq(weight, quantized, lora.layer(name))

    model = load_model(
        inputs.source,
        quantize=_quantize(options, precision),
        dtype=dtype,
        device=device,
        trust_remote_code=options.trust_remote_code,
        on_quantized=make_up if options.init == "loftq" else None,
    )
    size, bits = weight_bytes(model), bits_per_weight(model)
    notes.show(
        f"base {options.model}: {size / 1e6:.0f} MB, {bits[0]:.3f} bits per weight of the linear layers, {bits[1]:.3f} "
        f"of the whole model, backend {ops.backend(device)}"
    )
    stored, layers = precision_by_layer(model), dict(precision) if precision is not None else None
    source = inputs.source
    if options.method in ("lora", "full") and not source.is_gguf and bnb4.is_stored(source.path, source.given):
        notes.add("the base's 4-bit weights were dequantised; --method qlora trains on them as they are")
    _make_trainable(model, options, lora, initial)
    replaced = swap.replace_blocks(model, notes.add) if options.fused else {}
    packed = options.packing == "auto"
    words = min(len(inputs.tokenizer), model.get_input_embeddings().weight.shape[0])
    refusal = forward.packing_refusal(model, words) if packed else None
    if refusal:
        notes.add(f"padded batches: packing was refused for this model, because {refusal}")
    plain_head = forward.has_plain_head(model)
    return Prepared(model, stored, layers, bits, size, replaced, plain_head, packed and refusal is None)


def _quantize(options: TrainOptions, precision: Mapping[str, str] | None) -> Format | Mapping[str, str] | None:
    if options.method == "qlora":
        return nf4_of(options)
    return precision


def storage_of(options: TrainOptions) -> Storage:
    """The format of `deploy`."""
    assert options.deploy is not None
    return storage_named(options.deploy, nf4_of(options))


def _make_trainable(model: Any, options: TrainOptions, lora: LoraConfig, initial: dict[str, Any]) -> None:
    if options.method == "full":
        model.requires_grad_(True)
    else:
        attach(model, lora, seed=options.seed, initial=initial or None)
        initial.clear()
        if options.init == "pissa":
            init.pissa(model)
        if options.init_adapter:
            files.set_weights(model, files.read_adapter(options.init_adapter))
        if options.deploy:
            deploy(model, storage_of(options))
    model.train()

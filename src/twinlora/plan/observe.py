"""Tells a ledger where in the step it is: phase and layer, and what new tensors are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinlora.errors import ModelError
from twinlora.plan.ledger import Ledger
from twinlora.train.optim import MasterAdamW

__all__ = ["Observed", "layers_of", "observe"]


class Observed(MasterAdamW):
    """The trainer's optimiser, which says when backward and update begin."""

    def __init__(self, ledger: Ledger, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ledger = ledger

    def backward(self, loss: Tensor) -> None:
        """See MasterAdamW."""
        with self.ledger.within(("loss backward", None), "loss head"):
            super().backward(loss)

    def step(self, lr: float, max_grad_norm: float) -> Tensor:
        """See MasterAdamW. What it makes is gradients: float32 copies of 16-bit ones, and their norms."""
        self.ledger.part = None
        with self.ledger.within(("optimiser", None), "gradients"):
            return super().step(lr, max_grad_norm)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The repeated blocks. Raises ModelError where they are not one list."""
    count = model.config.num_hidden_layers
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ModelError(f"{type(model).__name__}: no list of {count} layers was found in it; it cannot be planned")


def observe(model: PreTrainedModel, ledger: Ledger) -> None:
    """Hooks that set the ledger's segment and cause as the step goes on."""
    layers = layers_of(model)
    place: dict[nn.Module, int] = {m: i for i, layer in enumerate(layers) for m in layer.modules()}

    def enter(*_: Any) -> None:
        ledger.part = 0 if ledger.part is None else ledger.part + 1
        ledger.segment, ledger.cause = ("forward", None), "activations"

    def leave(*_: Any) -> None:
        ledger.segment, ledger.cause = ("loss", None), "loss head"

    model.base_model.register_forward_pre_hook(enter)
    model.base_model.register_forward_hook(leave)
    for number, layer in enumerate(layers):
        _observe_layer(layer, number, ledger)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                _observe_gradient(parameter, place.get(module, f"{name}.{key}"), ledger)


def _observe_layer(layer: nn.Module, number: int, ledger: Ledger) -> None:
    def begin(*_: Any) -> None:
        if ledger.segment[0] == "forward":  # not when it is computed again in the backward pass
            ledger.segment = ("forward", number)

    def backward(_: Tensor) -> None:
        ledger.segment, ledger.cause = ("backward", number), "activations"

    def end(_module: Any, _input: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if ledger.segment[0] == "forward" and hidden.requires_grad:
            hidden.register_hook(backward)

    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(end)


def _observe_gradient(parameter: nn.Parameter, place: int | str, ledger: Ledger) -> None:
    def accumulated(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.assign(parameter.grad, "gradients", place)

    parameter.register_post_accumulate_grad_hook(accumulated)

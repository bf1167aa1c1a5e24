"""Many adapters on one resident base, one of them active: switching moves pointers, no weight is copied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twinlora.adapters.files import AdapterFile, require_fit
from twinlora.adapters.lora import LoraLinear, lora_layers, wrap
from twinlora.errors import AdapterError

__all__ = ["AdapterBank"]


class AdapterBank:
    """Named adapters of different ranks and targets over `model`. None is the bare base."""

    def __init__(self, model: nn.Module) -> None:
        if lora_layers(model):
            raise AdapterError("the model already has adapters: load it afresh")
        self._model = model
        self._weights: dict[str, dict[str, tuple[nn.Parameter, nn.Parameter, nn.Parameter | None, float]]] = {}
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """Adapters in the order in which they were added."""
        return list(self._weights)

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Take in an adapter; the active one stays. Raises AdapterError if it does not fit or the name is taken."""
        if name in self._weights:
            raise AdapterError(f"adapter name {name!r} is taken by another one: choose a different name")
        require_fit(self._model, adapter)
        if adapter.modules:
            raise AdapterError(
                f"adapter {name!r} trained whole modules ({', '.join(adapter.modules)}), which are not switched; "
                "serve it from a model of its own"
            )
        device = next(self._model.parameters()).device
        self._weights[name] = {}
        for layer, (a, b) in adapter.tensors.items():
            if not isinstance(self._model.get_submodule(layer), LoraLinear):
                wrap(self._model, layer, adapter.configs[layer])
            a, b = (_frozen(t, device) for t in (a, b))
            magnitude = adapter.magnitudes.get(layer)
            length = None if magnitude is None else _frozen(magnitude, device)
            self._weights[name][layer] = (a, b, length, adapter.configs[layer].scale)
        self.use(self.active)

    def use(self, name: str | None) -> None:
        """Answer with adapter `name`, or with the bare base. Raises AdapterError for an unknown name."""
        if name is not None and name not in self._weights:
            known = ", ".join(self._weights) or "none"
            raise AdapterError(f"no adapter {name!r}; loaded: {known}")
        chosen = self._weights[name] if name is not None else {}
        for layer, module in lora_layers(self._model).items():
            module.enabled = layer in chosen
            if module.enabled:
                module.lora_A, module.lora_B, module.magnitude, module.scale = chosen[layer]
        self.active = name


def _frozen(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.float().to(device), requires_grad=False)

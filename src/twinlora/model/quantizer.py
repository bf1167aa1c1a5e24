"""Quantising while transformers loads: it runs its quantisers tensor by tensor, so that a weight is read, quantised and
dropped before the next one is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from twinlora.config import ExportOptions, ModelOptions
from twinlora.errors import ModelError
from twinlora.model.linear import QuantLinear, is_linear
from twinlora.numerics.formats import Format, NF4Format, Precision, by_layer
from twinlora.numerics.ops import QuantTensor

__all__ = ["QuantizerConfig", "nf4_of", "quantizable", "quantize_layer"]

_METHOD = "twinlora"


@register_quantization_config(_METHOD)
class QuantizerConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to quantise while a model loads, and what went wrong; `quantize` and `on_quantized` as in `load_model`."""

    def __init__(self, quantize: Precision | None = None, on_quantized: Any = None, **_: Any) -> None:
        self.quant_method = _METHOD
        self.quantize, self.on_quantized = quantize, on_quantized
        self.formats: dict[str, Format] = {}  # of the layers that are quantised
        self.stored: dict[str, Callable[[], QuantTensor]] | None = None  # what the checkpoint has in NF4, by name
        self.problems: list[str] = []  # transformers keeps only a summary of what its loop raises

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizerConfig:
        return self  # one list of problems, however often transformers copies the configuration

    def to_dict(self) -> dict[str, Any]:
        """As transformers prints it."""
        return {"quant_method": _METHOD, "formats": {name: fmt.name for name, fmt in self.formats.items()}}

    def look_at(self, model: nn.Module) -> None:
        """Find out which layers of `model` are quantised, and how. Raises ModelError if a map is not of its layers."""
        self.formats = by_layer(self.quantize, quantizable(model))
        if self.stored is None:
            return
        if isinstance(self.quantize, Format):  # what the checkpoint has in 16 bit stays so
            self.formats = {name: fmt for name, fmt in self.formats.items() if f"{name}.weight" in self.stored}
        elif self.quantize is not None:  # what is to have 16 bit is dequantised by transformers' own loop
            dense = {f"{name}.weight" for name in self.quantize if name not in self.formats}
            self.stored = {name: read for name, read in self.stored.items() if name not in dense}


class _Quantize(ConversionOps):  # type: ignore[misc]
    """One checkpoint tensor in, one nn.Linear of the model replaced by a QuantLinear."""

    def __init__(self, config: QuantizerConfig) -> None:
        self.config = config

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            missing_keys.discard(name)
            try:
                quantize_layer(model, name.removesuffix(".weight"), weight, self.config)
            except ModelError as error:
                self.config.problems.append(str(error))
        return {}


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Tells transformers which tensors to hand over; leaves nothing behind on the loaded model."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self.quantization_config.look_at(model)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name.removesuffix(".weight") in self.quantization_config.formats

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def nf4_of(options: ModelOptions | ExportOptions) -> NF4Format:
    """The NF4 that `block_size` and `double_quant` of the options mean."""
    return NF4Format(options.block_size, 256 if options.double_quant else 0)


def quantizable(model: nn.Module) -> list[str]:
    """Names of the linear layers that may be quantised: all but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, m in model.named_modules() if is_linear(m) and m is not head]


def quantize_layer(model: nn.Module, name: str, weight: Tensor, config: QuantizerConfig) -> None:
    """Put a QuantLinear in place of the layer `name`, from its `weight`, or from the stored codes of `config`.

    Raises ModelError if shape or format are others than expected.
    """
    parent, _, child = name.rpartition(".")
    module: Any = model.get_submodule(name)
    if tuple(weight.shape) != tuple(module.weight.shape):
        raise ModelError(
            f"{name}.weight: checkpoint has {tuple(weight.shape)}, the model expects {tuple(module.weight.shape)}"
        )
    stored = config.stored.pop(f"{name}.weight", None) if config.stored else None
    if stored is None:
        replacement = QuantLinear.from_dense(module, weight, config.formats[name], f"{name}.weight")
    else:
        replacement = QuantLinear(stored(), module.bias)
        if replacement.format != config.formats[name]:
            raise ModelError(
                f"{name}.weight: stored as {replacement.format.name}, asked for {config.formats[name].name}; choose "
                "block size and double quantisation as the checkpoint has them"
            )
    owner = model.get_submodule(parent)
    owns = [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]
    # transformers must not initialise it anew, nor look for its weight in order to do so, as GPT-2's blocks do.
    for part in (replacement, *replacement.parameters(), *([] if owns else [owner])):
        setattr(part, "_is_hf_initialized", True)  # noqa: B010
    setattr(owner, child, replacement)
    if config.on_quantized is not None:
        config.on_quantized(name, weight, replacement)

"""The tensors of a base model one at a time, by the names that its modules have: what is folded and exported."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from twinlora.errors import ModelError
from twinlora.model import bnb4
from twinlora.model.linear import is_linear
from twinlora.model.load import Source, left_over, load_model, skeleton
from twinlora.model.quantizer import quantizable
from twinlora.numerics.ops import QuantTensor

__all__ = ["Checkpoint"]


class Checkpoint:
    """A base's tensors, each read when it is asked for. 4-bit weights of bitsandbytes are dequantised on the way.

    A GGUF file is opened whole, by transformers, in float32. `names` are parameters of the model in the checkpoint's
    order; a head that is tied to the embedding is not among them. Raises ModelError.
    """

    def __init__(self, source: Source, *, trust_remote_code: bool = False) -> None:
        self.source = source
        self._loaded: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Any, str]] = {}  # name of a parameter: its file and its key there
        if source.is_gguf:
            model: Any = load_model(source, dtype=torch.float32)  # an adapter is folded in before anything is rounded
            self.config: PretrainedConfig = model.config
            self._loaded = {n: p.detach() for n, p in model.named_parameters()}
            self.names = list(self._loaded)
            self._inspect(model)
            return
        bnb4.is_stored(source.path, source.given)
        model = skeleton(source, trust_remote_code=trust_remote_code)
        self.config = model.config
        self._inspect(model)
        self._find(model)

    def _inspect(self, model: Any) -> None:
        self.linears = [name for name, module in model.named_modules() if is_linear(module)]
        self.quantizable = set(quantizable(model))
        self.transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        modules = {id(module): name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.head = modules.get(id(head), "lm_head")
        self.embedding = modules[id(embedding)]
        self.tied = isinstance(head, nn.Module) and head.weight is embedding.weight
        self.tied |= bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    def _find(self, model: Any) -> None:
        """Where each parameter lies; checkpoints of older programs leave the base's prefix out."""
        known = {name for name, _ in model.named_parameters()}
        prefix = f"{model.base_model_prefix}."
        for path in self.source.weight_files():
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118  # not a dict
                    self._places[key if key in known or prefix + key not in known else prefix + key] = (path, key)
        if self.tied and self._has_own_head():
            self.tied = False
        self.names = [name for name in self._places if not bnb4.is_part(name)]
        if self.tied:
            self.names = [name for name in self.names if name != f"{self.head}.weight"]
        missing = sorted(known - set(self.names) - ({f"{self.head}.weight"} if self.tied else set()))
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ModelError(
                f"model {self.source.given}: its files name tensors otherwise than the model ({shown} not found); "
                "load and save it with transformers once, and give that directory"
            )
        if lost := left_over(model, {*self.names, *(prefix + name for name in self.names)}):
            raise ModelError(
                f"model {self.source.given}: {len(lost)} tensor(s) of unknown use\n  " + "\n  ".join(lost[:20])
            )

    def _has_own_head(self) -> bool:
        """Whether the files hold a head that is not the embedding, whatever the configuration says: it is then used."""
        names = f"{self.head}.weight", f"{self.embedding}.weight"
        if not all(name in self._places for name in names):
            return False
        head, embedding = map(self._tensor, names)
        return not torch.equal(head, embedding)

    def stored(self, name: str) -> QuantTensor | None:
        """The weight as bitsandbytes' NF4, if it is stored so."""
        if name + bnb4.MARK not in self._places:
            return None
        return bnb4.unpack(name, self._tensor)

    @property
    def has_4bit(self) -> bool:
        """Whether linear layers are stored in bitsandbytes' NF4."""
        return any(name.endswith(bnb4.MARK) for name in self._places)

    def read(self, name: str) -> Tensor:
        """The parameter, on the CPU: as it is stored, float32 where it was stored in 4 bits."""
        stored = self.stored(name)
        return self._tensor(name) if stored is None else stored.dequantize(torch.float32)

    def _tensor(self, name: str) -> Tensor:
        if name in self._loaded:
            return self._loaded[name]
        path, key = self._places[name]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it where the file says it."""
        if name in self._loaded or name + bnb4.MARK in self._places:
            return tuple(self._loaded[name].shape if name in self._loaded else self.read(name).shape)
        path, key = self._places[name]
        with _opened(path) as file:
            return tuple(file.get_slice(key).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        """The type in which most of it computes: that of the embedding."""
        return self._tensor(f"{self.embedding}.weight").dtype

    def config_values(self) -> dict[str, Any]:
        """config.json, without what it says about quantisation."""
        if self.source.is_gguf:
            values: dict[str, Any] = json.loads(self.config.to_json_string(use_diff=False))
        else:
            values = bnb4.read_config(self.source.path, self.source.given)
        values.pop("quantization_config", None)
        return values


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises ModelError for one that is cut short, or a pointer of Git LFS to it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None

"""What storing a linear layer in a format costs: the rise of the KL divergence to the 16-bit model, to second order.

For a small error D of a weight W the divergence of the next-token distributions is ½ E[(sum_ij G_ij D_ij)²], with G the
gradient, by W, of a row's log-probability under labels drawn from the model itself: the Fisher information (Martens,
arXiv 1412.1193). Its diagonal E[G_ij²] is kept as its row and column sums, the best factors of rank one (Adafactor,
arXiv 1804.04235), so that a layer needs out + in numbers:

    rise = ½ sum_ij r_i c_j D_ij² / sum(r) / tokens        nats per token

Works where the 16-bit model does not fit: gradients come from the NF4 base, row by row, and the 16-bit weights then
stream by one at a time. Cost: two loads of the checkpoint as for QLoRA, and one forward and backward pass over the
calibration rows with one more product a layer; as memory the NF4 base and the activations of a row of 256 tokens. Kept
in the cache directory under the base's fingerprint, the rows and the formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinlora import atomic
from twinlora.data.template import Example
from twinlora.errors import ModelError, StorageError
from twinlora.model import bnb4
from twinlora.model.fingerprint import cache_directory
from twinlora.model.linear import QuantLinear
from twinlora.model.load import Source, load_model, weight_bytes
from twinlora.numerics import ops
from twinlora.numerics.formats import DENSE, Format, NF4Format, parse

__all__ = ["Sensitivity", "calibration_rows", "measure"]

_ROWS, _LENGTH = 32, 256  # calibration rows, and tokens of each at most
_VERSION = 1  # of what is kept

Note = Callable[[str], None]


class Sensitivity(BaseModel):
    """What each precision of each linear layer costs, and what all of them weigh."""

    model_config = ConfigDict(extra="forbid")

    rises: dict[str, dict[str, float]]  # [layer][format], nats per token
    weights: dict[str, int]  # of each layer
    other_bytes: int  # of all that is never quantised: embeddings, head, norms, biases
    tokens: int  # calibrated on

    def sizes(self, dtype: torch.dtype) -> dict[str, dict[str, int]]:
        """Bytes of each layer in each format, `16bit` meaning `dtype`."""
        return {
            name: {
                fmt: count * dtype.itemsize if fmt == DENSE else parse(fmt).stored_bytes(count)
                for fmt in self.rises[name]
            }
            for name, count in self.weights.items()
        }


def calibration_rows(examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of 32 rows, evenly spaced, cut to 256 tokens. Rows of one token say nothing."""
    long = [example.ids[:_LENGTH] for example in examples if len(example.ids) > 1]
    return [long[i * len(long) // _ROWS] for i in range(_ROWS)] if len(long) > _ROWS else long


def measure(
    source: Source,
    rows: Sequence[Sequence[int]],
    formats: Sequence[Format],
    *,
    fingerprint: str,
    dtype: torch.dtype,
    device: torch.device,
    note: Note,
    trust_remote_code: bool = False,
) -> Sensitivity:
    """The sensitivity of every linear layer of `source`, from the cache if it was measured before.

    Raises ModelError for a checkpoint in 4 bits: there are no weights to compare formats with.
    """
    if not source.is_gguf and bnb4.is_stored(source.path, source.given):
        raise ModelError(
            f"model {source.given}: hybrid chooses formats by the 16-bit weights, and this checkpoint has 4-bit ones; "
            "give the model it was made of, or --method qlora, which trains on its codes as they are"
        )
    facts = [_VERSION, fingerprint, [list(row) for row in rows], [fmt.name for fmt in formats], str(dtype), device.type]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = cache_directory() / "sensitivity" / f"{key[:32]}.json"
    try:
        return Sensitivity.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        pass
    arguments: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    found = _measure(source, rows, formats, arguments, note)
    try:
        atomic.write_json(file, found.model_dump(mode="json"))
    except StorageError as error:
        note(f"sensitivity not kept, the next run measures it again: {error}")
    return found


def _measure(
    source: Source, rows: Sequence[Sequence[int]], formats: Sequence[Format], arguments: dict[str, Any], note: Note
) -> Sensitivity:
    proxy = NF4Format()
    model = load_model(source, quantize=proxy, **arguments)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    weights = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    other_bytes = weight_bytes(model) - sum(layer.stored_bytes for layer in layers.values())
    fisher = _fisher(model, layers, rows)
    tokens = sum(map(len, rows))
    del model, layers
    unseen = _fill_unseen(fisher, weights)
    if unseen:
        note(f"sensitivity: no calibration row reached {unseen} layer(s); they count as the others do on average")
    rises: dict[str, dict[str, float]] = {}

    def compare(name: str, weight: Tensor, quantized: QuantLinear) -> None:
        dense = (weight.T if quantized.fan_in_fan_out else weight).float()
        by_row, by_column = fisher[name]
        rises[name] = {DENSE: 0.0}
        for fmt in formats:
            same = fmt == quantized.format
            stored = quantized.quantized if same else ops.quantize(dense.to(arguments["dtype"]), fmt, name=name)
            error = stored.dequantize(torch.float32).sub_(dense).square_()
            weighted = by_row.to(error.device) @ error @ by_column.to(error.device) / by_row.sum()
            rises[name][fmt.name] = weighted.item() / (2 * tokens)

    load_model(source, quantize=proxy, on_quantized=compare, **arguments)
    return Sensitivity(rises=rises, weights=weights, other_bytes=other_bytes, tokens=tokens)


class _Watch:
    """Row and column sums of the squared gradient of one layer's weight, a row of tokens at a time."""

    def __init__(self, layer: QuantLinear) -> None:
        self.rows, self.columns = torch.zeros(layer.out_features), torch.zeros(layer.in_features)
        layer.register_forward_hook(self._forward)

    def _forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: self._backward(x, gradient.flatten(0, -2)))

    def _backward(self, x: Tensor, gradient: Tensor) -> None:
        squared = (gradient.float().T @ x.float()).square_()
        self.rows += squared.sum(1).cpu()
        self.columns += squared.sum(0).cpu()


def _fisher(
    model: PreTrainedModel, layers: Mapping[str, QuantLinear], rows: Sequence[Sequence[int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Row sums [out] and column sums [in] of the diagonal of each layer's Fisher information, summed over `rows`."""
    watches = {name: _Watch(layer) for name, layer in layers.items()}
    model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        ids = torch.tensor([list(row)], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        # Noise with the covariance of one-hot labels drawn from the model, diag(p) - p pᵀ, and lighter tails.
        p = logits.detach().softmax(-1)
        noise = torch.randn(p.shape, generator=generator).to(p.device) * p.sqrt()
        logits.backward(noise - p * noise.sum(-1, keepdim=True))
    return {name: (watch.rows, watch.columns) for name, watch in watches.items()}


def _fill_unseen(fisher: dict[str, tuple[Tensor, Tensor]], weights: Mapping[str, int]) -> int:
    """Give layers without any gradient (experts that no row was sent to) the mean of all; returns how many."""
    seen = {name for name, (by_row, _) in fisher.items() if by_row.sum() > 0}
    mean = sum(float(fisher[name][0].sum()) for name in seen) / sum(weights[name] for name in seen)
    for name in fisher.keys() - seen:
        by_row, by_column = (torch.ones_like(sums) for sums in fisher[name])
        fisher[name] = by_row * mean * len(by_column), by_column * mean * len(by_row)
    return len(fisher) - len(seen)

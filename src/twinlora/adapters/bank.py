"""Many adapters on one resident base, mixed in one batch: every row is answered with an adapter of its own.

A `Routing` says which rows use which adapter. It lies on the bank, which its `BankLinear`s share, since the linears of
a transformers model see nothing but their input. One thread at a time runs the model; adapters come and go between
passes, and no weight of the base is ever copied.

Shape legend: R rows of a pass, K and N a layer's inputs and outputs, r an adapter's rank in a layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from twinlora import machine
from twinlora.adapters.files import AdapterFile, require_fit
from twinlora.adapters.lora import LoraLinear, lora_layers
from twinlora.errors import AdapterError
from twinlora.model.linear import FrozenLinear, as_frozen, dense_weights, multiply_each
from twinlora.numerics import lora, ops

__all__ = ["AdapterBank", "BankLinear", "LayerWeights", "Resident", "Routing", "blend", "require_switchable"]


@dataclass(frozen=True)
class LayerWeights:
    """An adapter in one layer: A [r, K] and B [N, r] in the base's type, the scale, and what DoRA multiplies by [N]."""

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.a.nbytes + self.b.nbytes + (0 if self.gain is None else self.gain.nbytes)


@dataclass(frozen=True)
class Resident:
    """An adapter in memory, by layer name; it shares nothing with the files it came from."""

    layers: Mapping[str, LayerWeights]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers.values())


_ALIGNMENT = 64  # bytes, of a tensor in memory


def _packed(layers: Mapping[str, LayerWeights], like: Tensor) -> Resident:
    """Copies in one block of memory, of the type of `like` and on its device.

    B lies transposed there: neighbouring outputs are read together. On a CPU the block is a mapping of its own, since a
    server's adapters come and go.
    """
    unit = _ALIGNMENT // like.dtype.itemsize
    sources = [t for layer in layers.values() for t in (layer.a, layer.b, layer.gain) if t is not None]
    counts = [-(-t.numel() // unit) * unit for t in sources]
    total, on_cpu = sum(counts) * like.dtype.itemsize, like.device.type == "cpu"
    block = machine.mapped(total) if on_cpu else torch.empty(total, dtype=torch.uint8, device=like.device)
    rooms: Iterator[Tensor] = iter(block.view(like.dtype).split(counts))  # in the order of the sources

    def copy(source: Tensor) -> Tensor:
        return next(rooms)[: source.numel()].view(source.shape).copy_(source)

    packed = {}
    for name, layer in layers.items():
        a, b = copy(layer.a), copy(layer.b.T).T
        packed[name] = LayerWeights(a, b, layer.scale, None if layer.gain is None else copy(layer.gain))
    return Resident(packed)


Rows = tuple[str, int, int]  # of an adapter: its key, first row, and the row after its last
Run = tuple[list[Tensor], list[Tensor], list[float], list[int]]  # neighbouring rows, as ops.grouped_lora_ takes them


@dataclass(frozen=True)
class _Parts:
    """What a routing means for layers that see so many rows."""

    few: Tensor | None  # what the table's kernel adds: adapters' numbers, start and stop of their rows; int64 [n, 3]
    rest: list[Rows]  # of all other adapters
    gains: list[Rows]  # of those that are DoRA


@dataclass(frozen=True)
class Routing:
    """Rows keys[i] -> starts[i] .. starts[i + 1]; None is the bare base. The head may see other rows than the rest."""

    keys: tuple[str | None, ...]
    starts: tuple[int, ...]
    head_starts: tuple[int, ...]
    _made: dict[tuple[int, bool], _Parts] = field(default_factory=dict, compare=False, repr=False)

    def parts(self, bank: AdapterBank, rows: int, head: bool) -> _Parts:
        """For layers of `rows` rows."""
        parts = self._made.get((rows, head))
        if parts is None:
            parts = self._made[rows, head] = self._make(bank, rows, self.head_starts if head else self.starts)
        return parts

    def _make(self, bank: AdapterBank, rows: int, starts: tuple[int, ...]) -> _Parts:
        few, rest, gains = [], [], []
        for key, (start, stop) in zip(self.keys, itertools.pairwise(min(start, rows) for start in starts), strict=True):
            if key is None or start == stop:
                continue
            if bank.has_tables and stop - start <= lora.FEW_ROWS:
                few.append([bank.numbers[key], start, stop])
            else:
                rest.append((key, start, stop))
            if key in bank.gained:
                gains.append((key, start, stop))
        return _Parts(torch.tensor(few) if few else None, rest, gains)


class BankLinear(nn.Module):
    """A frozen layer and what each adapter adds to it."""

    def __init__(self, base: FrozenLinear, bank: AdapterBank, *, head: bool) -> None:
        super().__init__()
        self.base, self.head, self.bank = base, head, bank
        self.adapters: dict[str, LayerWeights] = {}
        self.table = lora.LoraTable()
        self._planned: tuple[_Parts, list[Run]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. No gradient while an adapter is in use."""
        return self.together(x, (self,))[0]

    @staticmethod
    def together(x: Tensor, layers: tuple[BankLinear, ...]) -> tuple[Tensor, ...]:
        """What each layer makes of the same x [..., K]; see `model.linear.project`."""
        if layers[0].bank.routing is None:
            return FrozenLinear.together(x, _bases(layers))
        return _multiply(x, layers)

    def runs(self, parts: _Parts) -> list[Run]:
        """What the table's kernel leaves of this layer; a row whose adapter has nothing here ends a run."""
        if self._planned is None or self._planned[0] is not parts:
            runs: list[Run] = []
            for key, start, stop in parts.rest:
                if (weights := self.adapters.get(key)) is not None:
                    if not runs or runs[-1][-1][-1] != start:
                        runs.append(([], [], [], [start]))
                    a, b, scales, starts = runs[-1]
                    a.append(weights.a)
                    b.append(weights.b)
                    scales.append(weights.scale)
                    starts.append(stop)
            self._planned = parts, runs
        return self._planned[1]


def _bases(layers: tuple[BankLinear, ...]) -> list[Any]:
    return [layer._modules["base"] for layer in layers]  # layer.base takes ten times as long


def _multiply(x: Tensor, layers: tuple[BankLinear, ...]) -> tuple[Tensor, ...]:
    """base(x) of each layer and what every row's adapter adds to it."""
    bank, rows = layers[0].bank, x.numel() // x.shape[-1]
    assert bank.routing is not None
    parts = bank.routing.parts(bank, rows, layers[0].head)
    bases, tables = _bases(layers), [layer.table for layer in layers]
    ys: tuple[Tensor, ...] | None = None
    if parts.few is not None and (weights := dense_weights(bases, x.dtype)) is not None:
        ys = lora.multiply(x, weights, tables, parts.few)
    if ys is None:
        ys = multiply_each(x, bases)
        if parts.few is not None:
            lora.add(ys, x, tables, parts.few)
    if not (parts.rest or parts.gains):
        return ys
    for layer, y in zip(layers, ys, strict=True):
        for run in layer.runs(parts) if parts.rest else ():
            ops.grouped_lora_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), *run)
        for key, start, stop in parts.gains:
            if key in layer.adapters and (gain := layer.adapters[key].gain) is not None:
                part, bias = y.view(-1, y.shape[-1])[start:stop], layer.base.bias
                part.copy_(part * gain if bias is None else (part - bias) * gain + bias)
    return ys


def require_switchable(adapter: AdapterFile) -> None:
    """Raise AdapterError, with what to type instead, if `adapter` trained whole modules."""
    if adapter.modules:
        raise AdapterError(
            f"adapter {adapter.directory} trained whole modules ({', '.join(adapter.modules)}), which are not "
            f"switched: fold it into its base with `twinlora merge {adapter.directory} --output DIR`, then give "
            "--model DIR and no adapter"
        )


class AdapterBank:
    """Adapters of different ranks and targets over `model`, by key. `use` gives one of them every row."""

    def __init__(self, model: nn.Module) -> None:
        if lora_layers(model):
            raise AdapterError("the model already has adapters: load it afresh")
        self._model = model
        self._resident: dict[str, Resident] = {}
        weight = next(model.parameters())
        self.has_tables = lora.has_tables(weight.device, weight.dtype)
        self.numbers: dict[str, int] = {}  # of adapters in the layers' tables
        self.gained: set[str] = set()  # adapters that are DoRA
        self.routing: Routing | None = None  # of the pass that runs
        self._last: Routing | None = None
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """Adapters in the order in which they were added."""
        return list(self._resident)

    def prepare(self, adapter: AdapterFile) -> Resident:
        """`adapter` ready to be installed: checked, and copied to the model's device and type. Any thread may call it.

        Raises AdapterError if it does not fit or trained whole modules.
        """
        require_fit(self._model, adapter)
        require_switchable(adapter)
        weight: Any = next(self._model.parameters())
        with torch.no_grad():
            return _packed(
                {name: LayerWeights(*adapter.tensors[name], config.scale, self._gain(adapter, name, weight))
                 for name, config in adapter.configs.items()}, weight
            )  # fmt: skip

    def _gain(self, adapter: AdapterFile, name: str, weight: Tensor) -> Tensor | None:
        """What DoRA multiplies by, in the type of the base's `weight`."""
        if (magnitude := adapter.magnitudes.get(name)) is None:
            return None
        # One home for DoRA's arithmetic: the layer that trains it.
        layer = LoraLinear(self._base(name), adapter.configs[name])
        layer.lora_A, layer.lora_B, layer.magnitude = (
            nn.Parameter(t.float().to(weight.device), requires_grad=False) for t in (*adapter.tensors[name], magnitude)
        )
        return layer.gain(weight.dtype)

    def _base(self, name: str) -> FrozenLinear:
        layer: Any = self._model.get_submodule(name)
        return layer.base if isinstance(layer, BankLinear) else as_frozen(layer)

    def install(self, key: str, resident: Resident) -> None:
        """Take in a prepared adapter, between two passes. Raises AdapterError if the key is taken."""
        if key in self._resident:
            raise AdapterError(f"adapter name {key!r} is taken by another one: choose a different name")
        number = min(set(range(len(self.numbers) + 1)) - set(self.numbers.values()))
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        for name, weights in resident.layers.items():
            module = self._model.get_submodule(name)
            if not isinstance(module, BankLinear):
                parent, _, child = name.rpartition(".")
                module = BankLinear(as_frozen(module), self, head=module is head)
                setattr(self._model.get_submodule(parent), child, module)
            module.adapters[key] = weights
            if self.has_tables:
                module.table.put(number, weights.a, weights.b, weights.scale)
            if weights.gain is not None:
                self.gained.add(key)
        self._resident[key], self.numbers[key] = resident, number

    def remove(self, key: str) -> None:
        """Forget an adapter that no pass uses."""
        number, self._last = self.numbers.pop(key), None
        self.gained.discard(key)
        for name in self._resident.pop(key).layers:
            layer: Any = self._model.get_submodule(name)
            del layer.adapters[key]
            layer._planned = None
            if self.has_tables:
                layer.table.drop(number)

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Prepare and install an adapter from disk; the active one stays. Raises AdapterError."""
        if name in self._resident:
            raise AdapterError(f"adapter name {name!r} is taken by another one: choose a different name")
        self.install(name, self.prepare(adapter))

    def use(self, name: str | None) -> None:
        """Answer every row with adapter `name`, or with the bare base. Raises AdapterError for an unknown name."""
        if name is not None and name not in self._resident:
            known = ", ".join(self._resident) or "none"
            raise AdapterError(f"no adapter {name!r}; loaded: {known}")
        everything = (0, torch.iinfo(torch.int64).max)
        self.routing = None if name is None else Routing((name,), everything, everything)
        self.active = name

    @contextlib.contextmanager
    def rows(self, keys: Sequence[str | None], starts: Sequence[int], head_starts: Sequence[int]) -> Iterator[None]:
        """In this context rows starts[i] .. starts[i + 1] of a pass use adapter keys[i]; in the head, head_starts."""
        before, routing = self.routing, Routing(tuple(keys), tuple(starts), tuple(head_starts))
        missing = set(routing.keys) - set(self._resident) - {None}
        assert not missing, f"adapters that are not resident: {missing}"
        # The layers keep their plans as long as the same rows come again.
        self._last = self._last if self._last == routing else routing
        self.routing = None if set(keys) <= {None} else self._last
        try:
            yield
        finally:
            self.routing = before


def blend(parts: Sequence[tuple[Resident, float]]) -> Resident:
    """The weighted sum of adapters, as one of the sum of their ranks. Raises AdapterError if one is a DoRA."""
    if any(layer.gain is not None for part, _ in parts for layer in part.layers.values()):
        raise AdapterError("a DoRA adapter cannot be blended: its update is not a sum")
    layers = {}
    for name in dict.fromkeys(name for part, _ in parts for name in part.layers):
        found = [(part.layers[name], weight) for part, weight in parts if name in part.layers]
        transposed = torch.cat([layer.b.T.float() * (layer.scale * weight) for layer, weight in found])
        layers[name] = LayerWeights(
            torch.cat([layer.a for layer, _ in found]), transposed.to(found[0][0].b.dtype).T, 1.0
        )
    return _packed(layers, next(iter(parts[0][0].layers.values())).a)

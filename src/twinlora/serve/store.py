"""What the registry needs of the model: adapters read, checked against this base, and put into the engine's bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinlora import machine
from twinlora.adapters import passport
from twinlora.adapters.bank import Resident, blend
from twinlora.adapters.files import CONFIG, WEIGHTS, read_adapter
from twinlora.errors import AdapterError
from twinlora.serve.engine import Engine
from twinlora.serve.registry import Loaded, too_large

__all__ = ["ModelStore"]


_LARGEST = 4  # times as much as in memory: that in float64 over a base in 16 bit


class ModelStore:
    """See registry.Store. `limit`: bytes of all adapters in memory. The other keywords say what this base is, for
    passports: see `passport.check`."""

    def __init__(
        self,
        engine: Engine,
        *,
        limit: int,
        base: str,
        fingerprint: str,
        precision: dict[str, int],
        layers: Mapping[str, str] | None,
    ) -> None:
        self._engine, self._limit = engine, limit
        self._origin: dict[str, Any] = {
            "base": base,
            "fingerprint": fingerprint,
            "precision": precision,
            "layers": layers,
        }
        self._tokenizer = passport.tokenizer_digests(engine.tokenizer)

    def load(self, directory: Path) -> Loaded:
        """See Store. The hash is that of the bytes that were used; of files that change meanwhile: AdapterError."""
        return machine.apart(lambda: self._load(directory))

    def _load(self, directory: Path) -> Loaded:
        directory = directory if (directory / CONFIG).is_file() else directory / "adapter"
        before = _stamps(directory)
        notes = passport.check(directory, **self._origin, tokenizer=self._tokenizer)
        if (size := sum(stamp[1] for stamp in before)) > _LARGEST * self._limit:  # read, it might take all there is
            raise too_large(directory, size, self._limit)
        adapter = read_adapter(directory)
        found = passport.read(directory)
        resident = self._engine.bank.prepare(adapter)
        if _stamps(directory) != before:
            raise AdapterError(f"adapter {directory}: its files changed while they were read; try again")
        return Loaded(adapter.digest, resident.nbytes, found.system if found else None, tuple(notes), resident)

    def blend(self, parts: Sequence[tuple[Any, float]]) -> tuple[Any, int]:
        """See Store."""
        mixed = machine.apart(lambda: blend(parts))
        return mixed, mixed.nbytes

    def install(self, digest: str, tensors: Resident) -> None:
        """See Store."""
        self._engine.call(lambda: self._engine.bank.install(digest, tensors)).result()

    def remove(self, digest: str) -> None:
        """See Store."""
        self._engine.call(lambda: self._engine.bank.remove(digest)).result()


def _stamps(directory: Path) -> list[tuple[int, int, int]]:
    """Which files these are, and of when: the two belong together if neither is replaced between their reading."""
    stamps = []
    for name in (CONFIG, WEIGHTS):
        try:
            stat = (directory / name).stat()
        except OSError as error:
            raise AdapterError(f"adapter {directory}: {name} cannot be read: {error.strerror}") from None
        stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return stamps

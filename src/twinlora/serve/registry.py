"""Which adapters are served, by what name, and which of them are in memory.

An adapter is its content: `name@sha256`. A request leases one version when it is admitted and keeps it, whatever
happens to the name; memory is held by content, never by name. The resident set is bounded in bytes: the least recently
used content without a lease goes first, and comes back from disk when it is asked for.

Names change under a lock and never wait. Everything that reads a disk or moves memory runs on one loader thread, so
that no two of them meet. Free of torch: a `Store` does what touches tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from twinlora.errors import AdapterError, TwinloraError

__all__ = ["NAME", "Busy", "Content", "Lease", "Loaded", "Registry", "Store", "Unblendable", "UnknownModel", "Version",
           "contained", "require_name", "too_large"]  # fmt: skip

NAME = r"[a-z0-9][a-z0-9._-]{0,63}"  # of an adapter
_MOST_PARTS = 8  # of a blend


class UnknownModel(TwinloraError):
    """A request names a model that is not served."""


class Unblendable(TwinloraError):
    """A request asks for a blend of adapters that have none."""


class Busy(TwinloraError):
    """Memory for adapters is full of adapters in use: try again."""


@dataclass(frozen=True)
class Loaded:
    """An adapter read from disk: hash of its files, bytes in memory, what it was trained with, and its tensors."""

    digest: str
    nbytes: int
    system: str | None
    notes: tuple[str, ...]
    tensors: Any


class Store(Protocol):
    """What the registry needs of the model's side. Called on the loader thread alone."""

    def load(self, directory: Path) -> Loaded:
        """Read and check an adapter. Raises AdapterError."""

    def blend(self, parts: Sequence[tuple[Any, float]]) -> tuple[Any, int]:
        """The weighted sum of tensors, and its bytes. Raises AdapterError."""

    def install(self, digest: str, tensors: Any) -> None:
        """Let requests use it."""

    def remove(self, digest: str) -> None:
        """Give its memory back; no request uses it."""


@dataclass(eq=False)
class Content:
    """One adapter's weights, in memory or not; directories that hold them, the last registered first.

    `parts` are the versions and weights of a blend.
    """

    digest: str
    directories: list[Path]
    nbytes: int
    parts: tuple[tuple[Version, float], ...] = ()
    resident: bool = False
    leases: int = 0
    names: int = 0  # current versions with this content
    pins: int = 0
    used: float = 0.0


@dataclass(frozen=True, eq=False)
class Version:
    """A name and the content it stands for."""

    name: str
    content: Content
    system: str | None
    since: int  # seconds of the epoch

    @property
    def identity(self) -> str:
        """`name@sha256`."""
        return f"{self.name}@{self.content.digest}"


@dataclass
class Lease:
    """A request's hold on one version; None is the bare base."""

    version: Version | None
    released: bool = field(default=False)

    @property
    def key(self) -> str | None:
        """What the engine calls it."""
        return self.version.content.digest if self.version else None


def contained(root: Path, relative: str) -> Path:
    """The directory `relative` inside `root`, by real paths, its files too. Raises AdapterError for one outside."""
    real_root = root.resolve()
    outside = []
    try:
        real = (real_root / relative).resolve()
        inside = real.is_relative_to(real_root) and real != real_root and real.is_dir()
        if inside:
            outside = [p.name for p in real.iterdir() if not p.resolve().is_relative_to(real_root)]
    except (OSError, ValueError, RuntimeError):  # too long, closed to us, a NUL; a loop of links before Python 3.13
        inside = False
    if not inside:
        raise AdapterError(f"path {relative!r}: expected a readable directory inside of the server's --adapters-dir")
    if outside:
        raise AdapterError(f"path {relative!r}: {', '.join(sorted(outside))} leads out of the server's --adapters-dir")
    return real


def require_name(name: str, base: str) -> None:
    """Raise AdapterError unless an adapter beside the base of that name can be called so."""
    if not re.fullmatch(NAME, name) or name == base:
        raise AdapterError(
            f"adapter name {name[:80]!r}: expected lower-case letters, digits, '.', '_' and '-', at most 64, "
            f"beginning with a letter or digit, and not the base's name {base!r}"
        )


def too_large(name: object, nbytes: int, limit: int) -> AdapterError:
    """What is said of an adapter that `limit` bytes for all of them can never hold."""
    return AdapterError(f"adapter {name}: {nbytes:,} bytes; adapters have {limit:,}: raise --adapter-memory")


class Registry:
    """Adapters by name over a `store`; at most `limit` bytes of them in memory. `base` is the bare model's name."""

    def __init__(self, store: Store, base: str, limit: int, *, blends: bool = False,
                 note: Callable[[str], None] | None = None) -> None:  # fmt: skip
        self.base, self.limit, self.blends = base, limit, blends
        self._store, self._note = store, note or (lambda _: None)
        self._lock = threading.Lock()
        self._names: dict[str, Version] = {}
        self._pinned: set[str] = set()
        self._contents: dict[str, Content] = {}
        self._loader = ThreadPoolExecutor(1, "loader")
        self._closed = False

    # Names. These never wait.

    def versions(self) -> list[Version]:
        """What the names stand for now."""
        with self._lock:
            return list(self._names.values())

    def pinned(self, name: str) -> bool:
        """Whether its weights stay in memory."""
        return name in self._pinned

    @property
    def resident_bytes(self) -> int:
        """Bytes of the adapters in memory."""
        with self._lock:
            return self._resident_bytes()

    def _resident_bytes(self) -> int:
        return sum(content.nbytes for content in self._contents.values() if content.resident)

    def lease(self, model: str) -> Lease:
        """Bind a request to what `model` stands for now. Raises UnknownModel."""
        with self._lock:
            version = None if model == self.base else self._find(model)
            if version is not None:
                version.content.leases += 1
                version.content.used = time.monotonic()
            return Lease(version)

    def _find(self, model: str) -> Version:
        name, at, digest = model.partition("@")
        version = self._names.get(name)
        if version is not None and (not at or (len(digest) >= 12 and version.content.digest.startswith(digest))):
            return version
        if version is not None:
            raise UnknownModel(f"model {model!r}: {name} is now {version.identity}")
        if self.blends and ":" in model:
            return self._find_blend(model)
        hint = "; blends need the server's --blends" if ":" in model else ""
        raise UnknownModel(f"model {model!r} is not served; GET /v1/models lists what is{hint}")

    def _find_blend(self, model: str) -> Version:
        parts = []
        for part in model.split("+"):
            name, _, text = part.partition(":")
            weight = float(text) if re.fullmatch(r"-?\d{1,3}(\.\d{1,6})?", text) else math.nan
            if name not in self._names or not abs(weight) <= 2:
                raise UnknownModel(f"blend {model!r}: {part!r} is not NAME:WEIGHT of a served adapter, weight -2 to 2")
            parts.append((self._names[name], weight))
        if not 2 <= len(parts) <= _MOST_PARTS or len({version.name for version, _ in parts}) < len(parts):
            raise UnknownModel(f"blend {model!r}: expected 2 to {_MOST_PARTS} different adapters")
        text = "+".join(f"{version.content.digest}:{weight!r}" for version, weight in parts)
        digest = hashlib.sha256(text.encode()).hexdigest()
        content = self._contents.get(digest)
        if content is None:
            nbytes = sum(version.content.nbytes for version, _ in parts)
            content = self._contents[digest] = Content(digest, [], nbytes, tuple(parts))
        return Version(model, content, parts[0][0].system, int(time.time()))

    def release(self, lease: Lease) -> None:
        """A request has ended; what nobody can ask for any more leaves memory."""
        if lease.version is None or lease.released:
            return
        lease.released = True
        content = lease.version.content
        with self._lock:
            content.leases -= 1
            content.used = time.monotonic()
            drained = content.leases == 0 and content.names == 0
        if drained and not self._closed:
            self._loader.submit(self._sweep)

    # Work of the loader thread.

    def load(self, lease: Lease) -> Future[None] | None:
        """Bring the lease's weights into memory: None if they are there, else what to wait for.

        The wait may end with AdapterError, Busy or Unblendable.
        """
        if lease.version is None or lease.version.content.resident:
            return None
        return self._loader.submit(self._load, lease.version.content)

    def register(self, name: str, directory: Path, *, replace: bool | None = False) -> Future[Version]:
        """Serve `directory` under `name`; `replace` an existing name, a new one (False), or either (None).

        The result waits for the check; AdapterError says what is wrong.
        """
        return self._loader.submit(self._register, name, directory, replace)

    def unload(self, name: str) -> Version:
        """Stop serving `name`; requests that have it finish. Raises UnknownModel."""
        with self._lock:
            version = self._names.pop(name, None)
            if version is None:
                raise UnknownModel(f"adapter {name!r} is not served")
            self._drop(version)
        self._loader.submit(self._sweep)
        return version

    def pin(self, name: str, pinned: bool) -> Version:
        """Keep its weights in memory from their next use on, or no longer. Raises UnknownModel."""
        with self._lock:
            version = self._names.get(name)
            if version is None:
                raise UnknownModel(f"adapter {name!r} is not served")
            if pinned != (name in self._pinned):
                version.content.pins += 1 if pinned else -1
                (self._pinned.add if pinned else self._pinned.discard)(name)
        return version

    def close(self) -> None:
        """End the loader; what it has begun is finished."""
        self._closed = True
        self._loader.shutdown()

    def _drop(self, version: Version) -> None:
        version.content.names -= 1
        if version.name in self._pinned:
            self._pinned.discard(version.name)
            version.content.pins -= 1

    def _register(self, name: str, directory: Path, replace: bool | None) -> Version:
        require_name(name, self.base)
        if replace is not None and (name in self._names) != replace:
            done = "is not served; register it" if replace else "is served already; replace it, or choose another name"
            raise AdapterError(f"adapter {name!r} {done}")
        loaded = self._store.load(directory)
        self._require_size(loaded.nbytes, name)
        for line in loaded.notes:
            self._note(line)
        with self._lock:
            before = self._names.get(name)
            if replace and before is None:  # it was unloaded since
                raise AdapterError(f"adapter {name!r} is not served; register it")
            content = self._contents.setdefault(loaded.digest, Content(loaded.digest, [], loaded.nbytes))
            content.directories = [directory, *(known for known in content.directories if known != directory)]
            content.names += 1
            version = Version(name, content, loaded.system, int(time.time()))
            pinned = name in self._pinned
            self._names[name] = version
            if before is not None:
                self._drop(before)
            if pinned:
                self._pinned.add(name)
                content.pins += 1
        self._sweep()
        try:
            self._make_resident(content, loaded.tensors)
        except Busy:
            self._note(f"adapter {name}: no room in memory now; it is read again when it is asked for")
        return version

    def _require_size(self, nbytes: int, name: str) -> None:
        if nbytes > self.limit:
            raise too_large(name, nbytes, self.limit)

    def _load(self, content: Content) -> None:
        if content.resident:
            return
        if content.parts:
            loaded = [(self._read(version.content), weight) for version, weight in content.parts]
            try:
                tensors, content.nbytes = self._store.blend(loaded)
                self._require_size(content.nbytes, "this blend")
            except AdapterError as error:
                raise Unblendable(str(error)) from None
        else:
            tensors = self._read(content)
        self._make_resident(content, tensors)

    def _read(self, content: Content) -> Any:
        wrong = []
        for directory in content.directories:
            try:
                loaded = self._store.load(directory)
            except (AdapterError, OSError) as error:
                wrong.append(str(error))
                continue
            if loaded.digest == content.digest:
                return loaded.tensors
            wrong.append(
                f"adapter {directory}: its files have changed on disk (registered {content.digest[:16]}, found "
                f"{loaded.digest[:16]}); replace it to serve what is there now"
            )
        raise AdapterError("\n".join(wrong))

    def _make_resident(self, content: Content, tensors: Any) -> None:
        """Raises Busy if there is no room and nothing to push out."""
        if content.resident:
            return
        while (victim := self._victim(content)) is not None:
            self._store.remove(victim.digest)
        self._store.install(content.digest, tensors)
        with self._lock:
            content.resident, content.used = True, time.monotonic()

    def _victim(self, coming: Content) -> Content | None:
        """What must go to make room; it is not resident any more. None if there is room. Raises Busy."""
        with self._lock:
            if self._resident_bytes() + coming.nbytes <= self.limit:
                return None
            idle = [c for c in self._contents.values() if c.resident and not c.leases and not c.pins]
            # Nothing goes for what will not find room all the same.
            if self._resident_bytes() - sum(c.nbytes for c in idle) + coming.nbytes > self.limit:
                raise Busy(
                    f"adapters in use fill the {self.limit:,} bytes for adapters; {coming.nbytes:,} more are needed"
                )
            victim = min(idle, key=lambda c: c.used)
            victim.resident = False
            self._forget(victim)
            return victim

    def _forget(self, content: Content) -> None:
        if not content.names and not content.leases:
            self._contents.pop(content.digest, None)

    def _current(self, content: Content) -> bool:
        """Whether it is a blend of what the names stand for now."""
        return bool(content.parts) and all(self._names.get(part.name) is part for part, _ in content.parts)

    def _sweep(self) -> None:
        """Give back what no name stands for and no request uses; blends stay until their room is needed."""
        with self._lock:
            gone = [
                content
                for content in self._contents.values()
                if not content.names and not content.leases and not (content.resident and self._current(content))
            ]
            resident = [content for content in gone if content.resident]
            for content in gone:
                content.resident = False
                self._forget(content)
        for content in resident:
            self._store.remove(content.digest)

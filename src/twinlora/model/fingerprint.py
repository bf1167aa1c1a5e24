"""Who a base model is: one hash over its tensors' names, types, shapes and bytes.

It does not depend on how the checkpoint is cut into files. Hashes of files that have not changed are kept in the user's
cache directory, so that a second look costs nothing. Unchanged: same inode, size, and times of content and of status
(which no program can set, so that a restored or future time hides no change).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

from twinlora import atomic
from twinlora.errors import ModelError, StorageError
from twinlora.model.load import Source

__all__ = ["cache_directory", "fingerprint"]


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/twinlora` or `~/.cache/twinlora`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinlora"


def fingerprint(source: Source, note: Callable[[str], None] | None = None) -> str:
    """SHA-256, in hex, over every tensor of `source`. Raises ModelError for a damaged file.

    `note` gets a line if the hashes cannot be kept; without it that is a StorageError.
    """
    cache_file = cache_directory() / "fingerprints.json"
    try:
        cache = json.loads(cache_file.read_text())
    except (OSError, ValueError):
        cache = {}
    if not isinstance(cache, dict):
        cache = {}
    lines: list[str] = []
    changed = False
    for path in source.weight_files():
        key = _key(path)
        if key not in cache:
            cache[key] = list(_gguf(path) if source.is_gguf else _safetensors(path))
            changed = True
        lines += cache[key]
    if changed:
        try:
            atomic.write_json(cache_file, {key: kept for key, kept in cache.items() if _stands(key)})
        except (StorageError, UnicodeError) as error:  # a path need not be UTF-8, and the file is
            if note is None:
                raise StorageError(f"fingerprint not kept: {error}") from None
            note(f"fingerprint not kept, the next run hashes the base again: {error}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _key(path: Path) -> str:
    stat = path.resolve().stat()
    return f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def _stands(key: str) -> bool:
    """Whether its file is still there, and unchanged."""
    try:
        return _key(Path(key.rsplit("|", 4)[0])) == key
    except (OSError, ValueError):
        return False


def _safetensors(path: Path) -> Iterator[str]:
    """`name dtype shape sha256` of each tensor."""
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        except (struct.error, ValueError, MemoryError, OverflowError) as error:
            raise ModelError(f"{path}: not a safetensors file ({error}); fetch it again") from None
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                if end > len(data):
                    raise ModelError(f"{path}: tensor {name} ends behind the file; the download is incomplete")
                with memoryview(data) as view:
                    digest = hashlib.sha256(view[begin:end]).hexdigest()
                yield f"{name} {entry['dtype']} {entry['shape']} {digest}"


def _gguf(path: Path) -> Iterator[str]:
    from gguf import GGUFReader

    for tensor in GGUFReader(path).tensors:
        digest = hashlib.sha256(tensor.data).hexdigest()
        yield f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()} {digest}"

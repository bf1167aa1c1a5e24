"""Files and directories that appear whole or not at all, whatever happens in between.

Everything is written under a temporary name in the same directory, synced to disk, and renamed into place. A process
that dies leaves temporary names behind; `sweep` puts them right. What the system refuses is a StorageError.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from twinlora.errors import StorageError

__all__ = [
    "PARTIAL",
    "make_directory",
    "remove",
    "sweep",
    "sync",
    "write_directory",
    "write_json",
    "write_text",
    "writing",
]

PARTIAL, _OLD, _REMOVED = ".partial", ".old", ".removed"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written (no space, no right, …) into one StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written: {_reason(error, path)}") from None


def _reason(error: Exception, path: Path) -> str:
    """What the system says, and about which file if that is another one."""
    reason = getattr(error, "strerror", None) or str(error)
    if re.fullmatch(r"\d+ requested and \d+ written", reason):  # numpy keeps the cause to itself
        reason = f"the disk is full, or files may not be so large ({reason})"
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy the second is written
    other = isinstance(name, str) and not Path(name).absolute().parent.is_relative_to(path.parent.absolute())
    return f"{reason} ({name})" if other else reason


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def make_directory(path: Path) -> None:
    """Create `path` and its parents; their names are on disk when this returns."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in reversed(missing):
        sync(directory.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`, in UTF-8. Raises StorageError; `path` is then as it was."""
    with writing(path):
        make_directory(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON. NaN and Inf are errors."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; when the block ends well it replaces `path`, otherwise nothing remains.

    Modes follow the umask (safetensors writes files that only their owner can read). Raises StorageError.
    """
    with writing(path):
        make_directory(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        try:
            yield temporary
            mask = _umask()
            for file in temporary.rglob("*"):
                file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
                sync(file)
            temporary.chmod(0o777 & ~mask)
            sync(temporary)
            _replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace(temporary: Path, path: Path) -> None:
    old = temporary.with_suffix(_OLD)
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or directory; under its own name it is whole, then gone. Nothing if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_REMOVED, dir=path.parent))
        path.rename(hidden)  # onto an empty directory, which it replaces
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Put right what a process that died while it wrote or removed `path` left. Only where no other can write it."""
    for kind in (_OLD, PARTIAL, _REMOVED):
        for left in path.parent.glob(f".{glob.escape(path.name)}.????????{kind}"):
            if kind == _OLD and not path.exists():
                left.rename(path)  # it died between the two renames of a replacement
            else:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

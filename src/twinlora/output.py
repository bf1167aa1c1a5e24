"""Where results go: over nothing but an earlier result, nor over what is read, and from one process at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from twinlora import atomic
from twinlora.errors import ConfigError, Interrupted

__all__ = ["ADAPTER", "ARTEFACT", "claimed", "ended_in_order", "require_apart", "require_free",
           "require_ours", "scratch"]  # fmt: skip

# A directory with one of these is an earlier result, which --overwrite may replace.
ARTEFACT, ADAPTER = ("parity.json", "export.json"), ("adapter_config.json",)


def require_free(output: Path, overwrite: bool, marks: Iterable[str]) -> None:
    """Raises ConfigError if `output` exists, unless it is empty or an earlier result and may be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not _replaceable(output, marks):
        raise ConfigError(
            f"output {output}: exists and is no earlier result (a directory with {' or '.join(marks)}), "
            "so that it is never replaced; give another --output"
        )
    if not overwrite:
        raise ConfigError(f"output {output}: exists; give --overwrite to replace it, or another --output")


def _replaceable(output: Path, marks: Iterable[str]) -> bool:
    if output.is_symlink() or not output.is_dir():
        return False
    if output.name == "adapter" and (output.parent / "run.json").exists():
        return False  # what a run trained
    return any((output / mark).is_file() for mark in marks) or not any(output.iterdir())


def require_ours(output: Path, own: Iterable[str], marks: Iterable[str], what: str) -> list[str]:
    """Those of `own` that are in `output`. Raises ConfigError if some are, but no mark that says that it is `what`."""
    present = [name for name in own if (output / name).exists()]
    if present and not any((output / mark).is_file() for mark in marks):
        raise ConfigError(
            f"output {output}: holds {', '.join(present)}, but is not a {what} of ours; give another --output"
        )
    return present


def require_apart(output: Path, read: Iterable[Path], own: Iterable[str] = (".",)) -> None:
    """Raises ConfigError if something that is read lies in `output`, or, given `own`, in those of its parts."""
    places = [(output / name).resolve() for name in own]
    for path in read:
        if any(path.resolve().is_relative_to(place) for place in places):
            raise ConfigError(
                f"output {output}: {path} is read here, and lies where this output is written; give another --output"
            )


@contextmanager
def claimed(output: Path, overwrite: bool, marks: Iterable[str]) -> Iterator[None]:
    """Hold `output` against other processes, remove what a killed one left beside it, end in order on a signal.

    Raises ConfigError if another process writes it or has written it meanwhile, StorageError if it cannot be written,
    Interrupted after SIGINT or SIGTERM.
    """
    with atomic.writing(output):
        atomic.make_directory(output.parent)
        lock = _lock(output)
    path = _lock_of(output)
    try:
        require_free(output, overwrite, marks)
        with atomic.writing(output):
            atomic.sweep(output)
        with ended_in_order(f"nothing was written to {output}"):
            yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A directory beside `output`, on the same disk, that is gone afterwards; what a killed process leaves is swept."""
    with (
        atomic.writing(output),
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=atomic.PARTIAL, dir=output.parent) as directory,
    ):
        yield Path(directory)


def _lock_of(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


def _lock(output: Path) -> int:
    path = _lock_of(output)
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"output {output}: another process is writing it; wait for it, or give another --output"
            ) from None
        except OSError:
            os.close(handle)
            raise
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # its last holder has removed it meanwhile


@contextmanager
def ended_in_order(after: str) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the block by an exception. Raises Interrupted that says which it was, and `after`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted("", number)  # worded below, as what a process of a run's own heard first is

    main = threading.current_thread() is threading.main_thread()  # elsewhere whoever runs us handles signals
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        number = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(f"stopped by {signal.Signals(number).name}; {after}", number) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)

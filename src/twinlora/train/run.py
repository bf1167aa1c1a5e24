"""A run is a directory: adapter/, checkpoints/, metrics.jsonl, run.json. One process at a time writes to it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from twinlora import atomic
from twinlora.errors import ConfigError
from twinlora.output import require_ours
from twinlora.train import checkpoint

__all__ = ["OWN", "RunDirectory"]

# The checkpoints go last: a removal that is cut short leaves a run that --resume continues.
OWN = ("run.json", "report.html", "adapter", "model", "tensorboard", "trackers.json", "metrics.jsonl", "checkpoints")
# Only a directory with one of these is a run: others have a model/ or an adapter/, too.
_MARKS = (".lock", "run.json", "metrics.jsonl")


class RunDirectory:
    """`with RunDirectory(path, resume=…, overwrite=…) as run:` holds the lock of the run at `path`.

    Raises ConfigError if another process holds it, if it has an earlier run and neither flag is given, or if it has
    what a run has and is none.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path, self._resume, self._overwrite = path, resume, overwrite
        self.records = 0  # whole lines of metrics.jsonl that belong to this run
        self._lock: int | None = None

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output {self.path}: is a file; expected a directory to write the run to")
        require_ours(self.path, OWN, _MARKS, "run")
        try:
            atomic.make_directory(self.path)
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise ConfigError(f"output {self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(
                f"output {self.path}: another process is writing this run; wait for it, or give another --output"
            ) from None
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"output {self.path}: this file system has no locks ({error.strerror}); give another --output"
            ) from None
        try:
            with atomic.writing(self.path):
                self._claim()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        checkpoint.sweep(self.path)
        for name in OWN:
            atomic.sweep(self.path / name)
        present = [name for name in OWN if (self.path / name).exists()]
        if present and self._overwrite:
            for name in present:
                atomic.remove(self.path / name)
        elif present and not self._resume:
            raise ConfigError(
                f"output {self.path}: holds an earlier run ({', '.join(present)}); "
                "give --resume to continue it, --overwrite to replace it, or another --output"
            )

    @property
    def adapter(self) -> Path:
        """Where the trained adapter goes."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: steps and evaluations."""
        return self.path / "metrics.jsonl"

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. Raises StorageError."""
        with atomic.writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.records += 1

    def sync_metrics(self) -> None:
        """Bring what was logged to disk: a checkpoint counts on it."""
        with atomic.writing(self.metrics):
            atomic.sync(self.metrics)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a killed process may have left a torn last one."""
        records = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return records

    def rewind_metrics(self, records: int) -> int:
        """Drop all but the first `records` lines; returns how many of these are missing."""
        kept = [json.dumps(record) + "\n" for record in self.read_metrics()[:records]]
        if self.metrics.exists():
            atomic.write_text(self.metrics, "".join(kept))
        self.records = len(kept)
        return records - len(kept)

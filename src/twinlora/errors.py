"""Everything twinlora raises on purpose.

    TwinloraError
    ├── InputError (also a ValueError)   what the user gave is wrong            exit status 2
    │   ├── ConfigError                  an option or a recipe file
    │   ├── DataError                    a data file or a row of it
    │   ├── ModelError                   a base model, a tensor of it, a tokenizer
    │   └── AdapterError                 an adapter directory, a target, a passport
    ├── CheckpointError                  a checkpoint that does not verify      exit status 1
    ├── TrainingDiverged                 a loss or gradient that is not finite  exit status 1
    ├── BackendError                     a kernel or a device that is missing   exit status 1
    ├── OutOfMemory                      a batch that does not fit              exit status 1
    ├── StorageError                     a file that cannot be written          exit status 1
    ├── ParityError                      an artefact that answers otherwise     exit status 1
    └── Interrupted                      SIGINT or SIGTERM, after saving        exit status 130 / 143

A message says what is wrong, where, what was expected, and what to type next.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputError",
    "Interrupted",
    "ModelError",
    "OutOfMemory",
    "ParityError",
    "StorageError",
    "TrainingDiverged",
    "TwinloraError",
]


class TwinloraError(Exception):
    """Root of every error that twinlora raises on purpose."""

    exit_status = 1


class InputError(TwinloraError, ValueError):
    """The user's input is wrong; nothing was written."""

    exit_status = 2


class ConfigError(InputError):
    """An option or a recipe file is wrong."""


class DataError(InputError):
    """A data file, or a row of it, is wrong."""


class ModelError(InputError):
    """A base model, one of its tensors, or its tokenizer is wrong."""


class AdapterError(InputError):
    """An adapter directory, a target pattern, or a passport is wrong."""


class CheckpointError(TwinloraError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingDiverged(TwinloraError):
    """A loss or a gradient norm is not finite."""


class BackendError(TwinloraError):
    """A kernel, an optional package or a device is missing."""


class OutOfMemory(TwinloraError):
    """A batch needs more memory than there is."""


class StorageError(TwinloraError):
    """A file or directory cannot be written; what was there before is whole."""


class ParityError(TwinloraError):
    """An exported artefact does not answer as the trained model does; it was deleted."""


class Interrupted(TwinloraError):
    """A signal has ended it; the message says what is kept, and what is lost."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_status = 128 + signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:  # workers send it to their parent
        return Interrupted, (str(self), self.signum)

"""The records of metrics.jsonl, also sent to experiment trackers, each through its own library.

Project names follow each tracker's own environment variables, else `twinlora`. A resumed run goes on in the tracker's
run, whose id is in trackers.json.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from twinlora import atomic
from twinlora.errors import BackendError

__all__ = ["Trackers", "require_installed"]


class _Tracker(Protocol):
    id: str | None  # by which a resumed run finds it

    def start(self, step: int) -> None: ...
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class _TensorBoard:
    """Event files in the run's directory `tensorboard`."""

    def __init__(self, run: Path, config: dict[str, Any], id_: str | None) -> None:
        self.id: str | None = None
        self._directory, self._config = run / "tensorboard", config

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1 if step else None)
        self._writer.add_text("options", f"```\n{json.dumps(self._config, indent=2)}\n```", 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, config: dict[str, Any], id_: str | None) -> None:
        self.id: str | None = id_ or uuid.uuid4().hex
        project = os.environ.get("WANDB_PROJECT", "twinlora")
        self._run = importlib.import_module("wandb").init(
            project=project, name=run.name, id=self.id, config=config, resume="allow"
        )

    def start(self, step: int) -> None:
        """Nothing to do: steps that it has already are ignored."""

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, run: Path, config: dict[str, Any], id_: str | None) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            self._mlflow.set_experiment("twinlora")
        self.id = self._mlflow.start_run(run_id=id_, run_name=run.name).info.run_id
        if id_ is None:
            self._mlflow.log_params(config)

    def start(self, step: int) -> None:
        """Nothing to do: it keeps several values of a step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, run: Path, config: dict[str, Any], id_: str | None) -> None:
        self.id: str | None = id_ or f"{run.name}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", "twinlora")
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(project=project, name=self.id, config=config, resume="allow", embed=False)

    def start(self, step: int) -> None:
        """Nothing to do: it keeps several values of a step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Path, dict[str, Any], str | None], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}  # the names are also those of the packages


def require_installed(names: Sequence[str]) -> None:
    """Raise BackendError that says how to install those trackers that are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"report_to {', '.join(missing)}: not installed; pip install {' '.join(missing)}, or leave it out"
        )


class Trackers:
    """`with Trackers(names, run, config, note) as trackers:` opens them all. Raises BackendError if one does not start.

    One that fails later is left out from then on, with a line: metrics.jsonl has every record.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any], note: Callable[[str], None]) -> None:
        self._run, self._note = run, note
        self._open: dict[str, _Tracker] = {}
        file = run / "trackers.json"
        ids = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for name in names:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    self._open[name] = _KINDS[name](run, config, ids.get(name))
            except Exception as error:  # each library has its own
                self._close(failed=True)
                raise BackendError(f"report_to {name}: cannot start: {type(error).__name__}: {error}") from error
        found = ids | {name: tracker.id for name, tracker in self._open.items() if tracker.id}
        if found != ids:
            atomic.write_json(file, found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=error is not None)

    def start(self, step: int) -> None:
        """The run goes on after `step`; what was sent of later steps is replaced where the tracker can."""
        self._each(lambda tracker: tracker.start(step), f"step {step}")

    def log(self, record: dict[str, Any]) -> None:
        """Send a record of metrics.jsonl: its numbers, at its step."""
        values = {k: v for k, v in record.items() if k != "step" and v is not None}
        self._each(lambda tracker: tracker.log(record["step"], values), f"step {record['step']}")

    def _close(self, *, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed=failed), "the end")
        self._open.clear()

    def _each(self, act: Callable[[_Tracker], None], when: str) -> None:
        for name, tracker in list(self._open.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    act(tracker)
            except Exception as error:  # a tracker must not end hours of training
                del self._open[name]
                self._note(f"report_to {name}: failed at {when} and is left out: {type(error).__name__}: {error}")

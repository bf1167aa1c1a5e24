"""Fine-tuning from options to a run directory: `train(options)`.

The order is the user's interest: everything that can be wrong is found before weights are loaded, and nothing is
written before that.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora import atomic, machine
from twinlora.adapters.lora import trainable_parameters
from twinlora.config import TrainOptions
from twinlora.data import sources
from twinlora.data.packing import Batch, make_batch
from twinlora.data.template import Example
from twinlora.errors import ConfigError, Interrupted, StorageError, TrainingDiverged
from twinlora.evaluate.metrics import mean_loss
from twinlora.model.load import pick_device
from twinlora.output import require_apart
from twinlora.reporter import Reporter
from twinlora.train import checkpoint, record, rehearsal
from twinlora.train.choices import Choices, choose
from twinlora.train.compatible import require_known_tokens, require_loadable, require_trainable
from twinlora.train.forecast import Forecast
from twinlora.train.inputs import Inputs, read_inputs
from twinlora.train.memory import Memory
from twinlora.train.notes import Notes
from twinlora.train.optim import MasterAdamW, learning_rate
from twinlora.train.prepare import prepare
from twinlora.train.progress import Progress
from twinlora.train.rng import restore_rng, rng_state
from twinlora.train.run import OWN, RunDirectory
from twinlora.train.selection import Selection
from twinlora.train.signals import StopSignals
from twinlora.train.step import StepResult, train_step
from twinlora.train.trackers import Trackers, require_installed

__all__ = ["TrainResult", "train"]


@dataclass
class TrainResult:
    """What a finished run leaves: its record (also in run.json) and, in memory, the trained model."""

    record: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain_head: bool
    packed: bool


def train(options: TrainOptions, reporter: Reporter | None = None) -> TrainResult:
    """Fine-tune as `options` say and write the run directory.

    Raises InputError before anything is written if an option, the model, data or adapter is wrong; BackendError if a
    tracker is missing; TrainingDiverged if a loss is not finite; Interrupted after a signal, when the state is saved;
    OutOfMemory if nothing is left to give up; StorageError if the disk is full; CheckpointError if `resume` finds a
    checkpoint of another run.
    """
    _require_one_process()
    require_installed(options.report_to)
    notes = Notes(reporter or Reporter())
    device = pick_device(options.device)
    inputs = read_inputs(options, notes)
    shapes = require_trainable(options, inputs.source, inputs.fingerprint)
    require_known_tokens(shapes, inputs)
    require_loadable(options, shapes, notes)
    require_apart(options.output, _read_paths(options, inputs), OWN)
    try:
        with RunDirectory(options.output, resume=options.resume, overwrite=options.overwrite) as run:
            return _train(options, inputs, run, notes, device)
    except StorageError as error:
        raise StorageError(
            f"{error}\n  what was saved before is whole; mend this, then continue with the same command and --resume"
        ) from None


def _require_one_process() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(
            f"WORLD_SIZE={world}: training in several processes is not supported yet; "
            "start `twinlora train` without torchrun, with --device cuda:0 to choose a GPU"
        )


def _read_paths(options: TrainOptions, inputs: Inputs) -> Iterator[Path]:
    """Files and directories that the run reads, some of them only after the output directory was claimed."""
    model = inputs.source.path
    yield model
    if model.is_dir():
        yield from (file for file in model.iterdir() if file.is_symlink())  # of weights, tokenizer or template
    for path in (options.init_adapter, options.layer_precision):
        if path is not None:
            yield path
            yield from path.glob("adapter")  # what is read of a run
    for source in (*options.data, *options.eval):
        if (path := Path(sources.split_weight(source)[0])).exists():
            yield path


def _train(options: TrainOptions, inputs: Inputs, run: RunDirectory, notes: Notes, device: torch.device) -> TrainResult:
    found = _find_checkpoint(run, notes) if options.resume else None
    choices = choose(options, inputs, found, device, notes)
    with Trackers(options.report_to, run.path, choices.options.model_dump(mode="json"), notes.add) as trackers:
        trainer = _Trainer(choices, inputs, run, notes, trackers, device)
        trainer.restore(found)
        trackers.start(trainer.at.step)
        trainer.fit()
        return trainer.finish()


def _find_checkpoint(run: RunDirectory, notes: Notes) -> checkpoint.Checkpoint | None:
    found, skipped = checkpoint.newest(run.path)
    for line in skipped:
        notes.add(line)
    if found is None:
        notes.add(f"resume: no checkpoint in {run.path}; starting at step 0")
    return found


class _Trainer:
    """One run: the model, the optimiser and where they are."""

    def __init__(
        self,
        choices: Choices,
        inputs: Inputs,
        run: RunDirectory,
        notes: Notes,
        trackers: Trackers,
        device: torch.device,
    ) -> None:
        options, dtype = choices.options, choices.dtype
        self.options, self.inputs, self.run, self.notes = options, inputs, run, notes
        self.trackers, self.device, self.dtype = trackers, device, dtype
        self.identity = choices.identity
        machine.reset_peaks(device)
        machine.keep_freed_memory()
        self.forecast = Forecast(options, inputs, dtype, device, notes)
        torch.manual_seed(options.seed)  # dropout draws from the global generators
        self.prepared = prepare(options, inputs, dtype, device, notes, choices.precision)
        self.model = self.prepared.model
        self.loading_peak = machine.peak_rss_bytes()
        machine.reset_peaks(device)  # what a step takes is predicted; loading may take more
        self.parameters = trainable_parameters(self.model)
        self.memory = Memory(
            options,
            self.model,
            packed=self.prepared.packed,
            device=device,
            notes=notes,
            blame=lambda memory: self.forecast.blame(self.prepared, memory),
        )
        self.optimizer = MasterAdamW(
            self.parameters, options, scaled=dtype == torch.float16, offload="optimizer" in options.offload
        )
        self.total = inputs.steps(options)
        self.at = Progress()
        self.began = 0  # the step that this process went on from
        chooses = bool(options.keep_best and options.eval and options.eval_every)
        self.selection = Selection(keep=chooses)

    def restore(self, found: checkpoint.Checkpoint | None) -> None:
        """Go to where `found` was saved, or to the start."""
        if found is None:
            self.run.rewind_metrics(0)
            return
        self.optimizer.load_state_tensors(found.tensors)
        with torch.no_grad():
            for name, parameter in self.prepared.frozen().items():
                parameter.copy_(found.tensors[f"frozen.{name}"])
        self.selection.load(found.state["selection"], found.tensors)
        self.memory.load(found.state["memory"])
        restore_rng(found.rng, self.device)
        self.at = Progress(step=found.state["step"], **found.state["progress"])
        self.began = self.at.step
        missing = self.run.rewind_metrics(found.state["records"])
        if missing:
            self.notes.add(f"resume: {missing} line(s) of {self.run.metrics} before this step are gone")
        self.notes.add(f"resume: continuing after step {self.at.step} of {self.total}")

    @property
    def _done(self) -> bool:
        return self.at.step == self.total or self.at.stopped

    def fit(self) -> None:
        """All remaining steps."""
        if self._done:
            return
        with StopSignals() as signals:
            self._rehearse()
            while not self._done:
                self._one_step()
                every = self.options.eval_every
                if self.inputs.eval_examples and (self._done or (every and self.at.step % every == 0)):
                    self._evaluate()
                every = self.options.checkpoint_every
                if signals.received or self._done or (every and self.at.step % every == 0):
                    self._save_checkpoint()
                if signals.received and not self._done:
                    raise Interrupted(
                        f"stopped by {signal.Signals(signals.received).name} after step {self.at.step}/{self.total}; "
                        f"saved in {self.run.path}; continue with the same command and --resume",
                        signals.received,
                    )

    def _rehearse(self) -> None:
        """The longest micro-batch once; then what it leaves of memory may be used."""

        def longest() -> list[Example]:
            limit = self.memory.micro_batch_tokens
            return rehearsal.longest_micro_batch(
                self.inputs, self.total, self.options, limit, packed=self.prepared.packed
            )

        def run() -> None:
            rehearsal.rehearse(self.prepared, longest(), self.optimizer, self.memory, device=self.device)

        self.memory.attempt(run, longest)
        self.memory.make_copies(self.dtype)

    def _batch(self, step: int) -> Batch:
        chosen = self.inputs.step_examples(step, self.options)
        return make_batch(
            chosen,
            self.memory.micro_batch_tokens,
            packed=self.prepared.packed,
            device=self.device,
        )

    def _step(self, lr: float) -> tuple[Batch, StepResult]:
        """One step; with less memory, and from its start, after a lack of memory."""
        rng = rng_state(self.device)

        def run() -> tuple[Batch, StepResult]:
            batch = self._batch(self.at.step)
            norm, plain = self.options.max_grad_norm, self.prepared.plain_head
            return batch, train_step(
                self.model,
                batch,
                self.optimizer,
                lr=lr,
                max_grad_norm=norm,
                plain_head=plain,
                saving=self.memory.saving,
            )

        def undo() -> None:
            self.optimizer.discard_gradients()
            restore_rng(rng, self.device)

        def part() -> list[Example]:
            return self._largest(self.inputs.step_examples(self.at.step, self.options))

        return self.memory.attempt(run, part, undo, lambda: not self.optimizer.updating)

    def _largest(self, examples: list[Example]) -> list[Example]:
        """The largest micro-batch of `examples`."""
        return rehearsal.largest_part(examples, self.memory.micro_batch_tokens, packed=self.prepared.packed)

    def _one_step(self) -> None:
        start = time.perf_counter()
        lr = learning_rate(self.at.step, self.total, self.options)
        batch, result = self._step(lr)
        loss, norm = self._checked(result, batch, lr)
        seconds = time.perf_counter() - start
        self.at.step += 1
        self.at.tokens += batch.tokens
        self.at.trained_tokens += batch.trained_tokens
        self.at.seconds += seconds
        self.at.loss = loss
        record = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.at.tokens, "seconds": seconds}
        self._log({"step": self.at.step} | record)
        rate = self.at.tokens / self.at.seconds
        self.notes.reporter.progress("training", self.at.step, self.total, f"loss {loss:.4f} · {rate:,.0f} tokens/s")

    def _checked(self, result: StepResult, batch: Batch, lr: float) -> tuple[float, float | None]:
        """Loss and gradient norm; the norm is None for a step that float16 skipped. Raises TrainingDiverged."""
        loss = result.loss.item()
        norm: float | None = result.grad_norm.item()
        scaler = self.optimizer.scaler
        if scaler.is_enabled() and norm is not None and not math.isfinite(norm):
            self.at.skipped += 1  # the step changed nothing; the next one has a smaller factor
            norm = None if scaler.get_scale() >= 1 else norm
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            raise TrainingDiverged(
                f"step {self.at.step + 1}: loss {loss}, gradient norm {norm}, learning rate {lr:g}\n"
                f"  rows: {', '.join(batch.where)}\n"
                "lower --lr, or look at these rows; the newest checkpoint holds the last good state"
            )
        return loss, norm

    def _log(self, record: dict[str, Any]) -> None:
        self.run.log(record)
        self.trackers.log(record)

    def _evaluate(self) -> None:
        """Loss on the evaluation rows: logged, and the reason to stop or to keep these weights."""

        def run() -> float:
            return mean_loss(
                self.model,
                self.inputs.eval_examples,
                micro_batch_tokens=self.memory.micro_batch_tokens,
                packed=self.prepared.packed,
                plain_head=self.prepared.plain_head,
            )

        loss = self.memory.attempt(run, lambda: self._largest(self.inputs.eval_examples), differentiated=False)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"evaluation after step {self.at.step}: loss {loss}; lower --lr")
        self.at.eval_loss = loss
        self._log({"step": self.at.step, "eval_loss": loss})
        self.selection.update(loss, self.at.step, self.parameters)
        patience = self.options.patience
        if patience and self.selection.stale >= patience and self.at.step < self.total:
            self.at.stopped = True
            self.notes.add(
                f"stopped after step {self.at.step} of {self.total}: no evaluation better than that of step "
                f"{self.selection.step} in {patience} evaluation(s)"
            )

    def _save_checkpoint(self) -> None:
        state = {
            "identity": self.identity,
            "progress": self.at.state(),
            "selection": self.selection.state(),
            "memory": self.memory.state(),
            "records": self.run.records,
        }
        tensors = self.optimizer.state_tensors() | self.selection.tensors()
        tensors |= {f"frozen.{name}": parameter.detach() for name, parameter in self.prepared.frozen().items()}
        self.run.sync_metrics()
        checkpoint.save(self.run.path, self.at.step, tensors, state, self.device)
        checkpoint.prune(self.run.path, self.at.step, self.options.keep_checkpoints)

    def finish(self) -> TrainResult:
        """The adapter (or the model, for method full) of the best or the last step, and run.json."""
        self.memory.release()
        self.selection.restore_best(self.parameters)
        options, inputs, prepared = self.options, self.inputs, self.prepared
        saved = record.save(self.run, options, inputs, prepared, self.selection.kept_step or self.at.step)
        result = record.result(options, self.at, self.selection, prepared, self.loading_peak, self.device) | saved
        as_planned = self.memory.untouched and self.at.step > self.began
        result["predicted"] = self.forecast.beside(result, prepared, self.memory, as_planned=as_planned)
        document = record.document(options, inputs, prepared, self.memory, self.notes, self.device)
        atomic.write_json(self.run.path / "run.json", document | {"result": result})
        machine.release_freed_memory()
        return TrainResult(result, self.model, inputs.tokenizer, prepared.plain_head, prepared.packed)

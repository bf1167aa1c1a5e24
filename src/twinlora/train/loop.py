"""Fine-tuning from options to a run directory: `train(options)`.

The order is the user's interest: everything that can be wrong is found before weights are loaded, and nothing is
written before that.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora import atomic, machine
from twinlora.adapters import files, init, passport
from twinlora.adapters.lora import attach, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import TrainOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row
from twinlora.data.packing import Batch, epoch_order, epoch_size, make_batch, steps_per_epoch
from twinlora.data.template import Example
from twinlora.errors import CheckpointError, ConfigError, Interrupted, TrainingDiverged
from twinlora.evaluate.metrics import mean_loss
from twinlora.model import forward, swap
from twinlora.model.fingerprint import fingerprint
from twinlora.model.linear import QuantLinear
from twinlora.model.load import (
    Source,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    precision_by_layer,
    resolve,
    weight_bytes,
)
from twinlora.numerics import ops
from twinlora.numerics.nf4 import NF4Format
from twinlora.reporter import Reporter
from twinlora.train import checkpoint
from twinlora.train.optim import MasterAdamW, learning_rate
from twinlora.train.run import RunDirectory
from twinlora.train.step import train_step

__all__ = ["TrainResult", "train"]


@dataclass
class TrainResult:
    """What a finished run leaves: its record (also in run.json) and, in memory, the trained model."""

    record: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain_head: bool
    packed: bool


@dataclass
class _Inputs:
    """What is known before any weight is loaded."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    examples: list[Example]
    eval_examples: list[Example]
    digests: dict[str, str]
    data_identity: str
    fingerprint: str
    notes: list[str]

    @cached_property
    def weights(self) -> list[float]:
        """How often each example is seen in an epoch."""
        return [example.weight for example in self.examples]

    @cached_property
    def epoch_size(self) -> int:
        """Examples that an epoch shows."""
        return epoch_size(self.weights)

    def steps_per_epoch(self, options: TrainOptions) -> int:
        """Optimiser steps of an epoch."""
        return steps_per_epoch(self.epoch_size, options.batch_size)

    def steps(self, options: TrainOptions) -> int:
        """Optimiser steps of the whole run."""
        steps = options.epochs * self.steps_per_epoch(options)
        return min(steps, options.max_steps or steps)


@dataclass
class _Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0  # steps whose float16 gradients overflowed
    seconds: float = 0.0
    loss: float = math.nan

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {k: v for k, v in vars(self).items() if k != "step" and not (isinstance(v, float) and math.isnan(v))}


@dataclass
class _Signals:
    """SIGINT and SIGTERM are remembered, so that the step in hand can end and be saved. A second one is immediate."""

    received: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Signals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        except ValueError:  # not the main thread: whoever runs us handles signals
            self._before.clear()
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(options: TrainOptions, reporter: Reporter | None = None) -> TrainResult:
    """Fine-tune as `options` say and write the run directory.

    Raises InputError before anything is written if an option, the model, data or adapter is wrong; TrainingDiverged
    if a loss is not finite; Interrupted after a signal, when the state is saved; CheckpointError if `resume` finds a
    checkpoint of another run.
    """
    reporter = reporter or Reporter()
    device = pick_device(options.device)
    inputs = _read_inputs(options, reporter)
    with RunDirectory(options.output, resume=options.resume, overwrite=options.overwrite) as run:
        trainer = _Trainer(options, inputs, run, reporter, device)
        trainer.restore()
        trainer.fit()
        return trainer.finish()


def _read_inputs(options: TrainOptions, reporter: Reporter) -> _Inputs:
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        reporter.note(text)

    def detail(text: str) -> None:
        notes.append(text)
        reporter.detail(text)

    streams = [source for source in options.data if sources.is_stream(sources.split_weight(source)[0])]
    if options.resume and streams:
        raise ConfigError(
            f"resume: {', '.join(streams)} is a stream, and what it gave the first time cannot be read again; "
            "write the rows to a file, and train from that"
        )
    source = resolve(options.model)
    data = sources.read(options.data, columns=options.columns, note=detail)
    held_out = sources.read(options.eval, columns=options.columns, note=detail)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)

    def encode(rows: list[Row]) -> list[Example]:
        o = options
        return encode_rows(
            tokenizer, rows, o.max_length, overlong=o.overlong, allow_untrained=o.allow_untrained, note=note
        )

    return _Inputs(
        source=source,
        tokenizer=tokenizer,
        rows=data.rows,
        examples=encode(data.rows),
        eval_examples=encode(held_out.rows) if options.eval else [],
        digests=sources.Data(data.sources + held_out.sources).digests,
        data_identity=data.identity,
        fingerprint=fingerprint(source),
        notes=notes,
    )


class _Trainer:
    """One run: the model, the optimiser and where they are."""

    def __init__(
        self, options: TrainOptions, inputs: _Inputs, run: RunDirectory, reporter: Reporter, device: torch.device
    ) -> None:
        self.options, self.inputs, self.run, self.reporter, self.device = options, inputs, run, reporter, device
        machine.reset_peaks(device)
        machine.keep_freed_memory()
        torch.manual_seed(options.seed)  # dropout draws from the global generators
        self.notes = inputs.notes
        self.lora = LoraConfig.from_options(options)
        self.dtype, reason = pick_dtype(options.dtype, device)
        if reason:
            self._note(reason)
        self.initial: dict[str, tuple[Tensor, Tensor]] = {}
        self.model = self._load()
        self.precision = precision_by_layer(self.model)
        self.weight_bytes = weight_bytes(self.model)
        self._prepare_training()
        self.replaced = swap.replace_blocks(self.model, self._note) if options.fused else {}
        self.plain_head = forward.has_plain_head(self.model)
        self.packed = self._decide_packing()
        scaled = self.dtype == torch.float16
        self.optimizer = MasterAdamW(trainable_parameters(self.model), options, scaled=scaled)
        self.total = inputs.steps(options)
        self.order = lru_cache(1)(
            lambda epoch: epoch_order(inputs.weights, epoch, options.seed, shuffle=options.shuffle)
        )
        self.at = _Progress()
        self.identity = self._identity()

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.note(text)

    def _load(self) -> PreTrainedModel:
        o = self.options
        fmt = NF4Format(o.block_size, 256 if o.double_quant else 0) if o.method == "qlora" else None
        model = load_model(
            self.inputs.source,
            quantize=fmt,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=o.trust_remote_code,
            on_quantized=self._make_up if o.init == "loftq" else None,
        )
        self.reporter.note(
            f"base {o.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M stored elements, "
            f"{weight_bytes(model) / 1e6:.0f} MB, backend {ops.backend(self.device)}"
        )
        return model

    def _make_up(self, name: str, weight: Tensor, quantized: QuantLinear) -> None:
        self.initial[name] = init.loftq(weight, quantized, self.lora.layer(name))

    def _prepare_training(self) -> None:
        if self.options.method == "full":
            self.model.requires_grad_(True)
        else:
            attach(self.model, self.lora, seed=self.options.seed, initial=self.initial or None)
            self.initial.clear()
            if self.options.init == "pissa":
                init.pissa(self.model)
            if self.options.init_adapter:
                files.set_weights(self.model, files.read_adapter(self.options.init_adapter))
        if self.options.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()

    def _decide_packing(self) -> bool:
        if self.options.packing == "off":
            return False
        refusal = forward.packing_refusal(self.model, len(self.inputs.tokenizer))
        if refusal:
            self._note(f"padded batches: packing was refused for this model, because {refusal}")
        return refusal is None

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to belong to this run."""
        free = {
            "output",
            "resume",
            "overwrite",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "json_output",
            "model",
        }
        options = self.options.model_dump(mode="json", exclude=free | {"data", "eval", "init_adapter", "device"})
        # The schedule stretches over all steps, so that max_steps is part of the identity.
        return {
            "options": options | {"dtype": str(self.dtype).removeprefix("torch.")},
            "base": self.inputs.fingerprint,
            "data": self.inputs.data_identity,
        }

    def restore(self) -> None:
        """With `resume`, go to the newest checkpoint that verifies; say so if there is none."""
        if not self.options.resume:
            return
        found, skipped = checkpoint.newest(self.run.path)
        for line in skipped:
            self._note(line)
        if found is None:
            self._note(f"resume: no checkpoint in {self.run.path}; starting at step 0")
            self.run.rewind_metrics(0)
            return
        differing = _differences(found.state["identity"], self.identity)
        if differing:
            raise CheckpointError(
                f"{found.directory} belongs to another run\n  "
                + "\n  ".join(differing)
                + "\ngive the options of the first run, or another --output"
            )
        self.optimizer.load_state_tensors(found.tensors)
        self._load_start(found.tensors)
        torch.set_rng_state(found.rng)
        self.at = _Progress(step=found.state["step"], **found.state["progress"])
        self.run.rewind_metrics(self.at.step)
        self._note(f"resume: continuing after step {self.at.step} of {self.total}")

    def _start(self) -> dict[str, Parameter]:
        """Frozen factors that belong to the adapter: a decomposition need not come out the same twice."""
        return {name: p for name, p in self.model.named_parameters() if ".start_" in name}

    def _load_start(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._start().items():
                parameter.copy_(tensors[f"frozen.{name}"])

    def fit(self) -> None:
        """All remaining steps."""
        with _Signals() as signals:
            while self.at.step < self.total:
                self._one_step()
                done = self.at.step == self.total
                if self.options.eval_every and not done and self.at.step % self.options.eval_every == 0:
                    self.evaluate()
                every = self.options.checkpoint_every
                if signals.received or done or (every and self.at.step % every == 0):
                    self._save_checkpoint()
                if signals.received and not done:
                    raise Interrupted(
                        f"stopped by {signal.Signals(signals.received).name} after step {self.at.step}/{self.total}; "
                        f"saved in {self.run.path}; continue with the same command and --resume",
                        signals.received,
                    )

    def _batch(self, step: int) -> Batch:
        o, examples = self.options, self.inputs.examples
        epoch, within = divmod(step, self.inputs.steps_per_epoch(o))
        order = self.order(epoch)
        chosen = [examples[i] for i in order[within * o.batch_size : (within + 1) * o.batch_size]]
        pad = self.inputs.tokenizer.pad_token_id or 0
        return make_batch(chosen, o.micro_batch_tokens, packed=self.packed, pad_id=pad, device=self.device)

    def _one_step(self) -> None:
        start = time.perf_counter()
        lr = learning_rate(self.at.step, self.total, self.options)
        batch = self._batch(self.at.step)
        result = train_step(
            self.model,
            batch,
            self.optimizer,
            lr=lr,
            max_grad_norm=self.options.max_grad_norm,
            plain_head=self.plain_head,
        )
        loss = result.loss.item()
        norm: float | None = result.grad_norm.item()
        seconds = time.perf_counter() - start
        if (
            self.optimizer.scaler.is_enabled() and norm is not None and not math.isfinite(norm)
        ):  # the step changed nothing; the next one has a smaller factor
            self.at.skipped += 1
            norm = None if self.optimizer.scaler.get_scale() >= 1 else norm
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            raise TrainingDiverged(
                f"step {self.at.step + 1}: loss {loss}, gradient norm {norm}, learning rate {lr:g}\n"
                f"  rows: {', '.join(batch.where)}\n"
                "lower --lr, or look at these rows; the newest checkpoint holds the last good state"
            )
        self.at.step += 1
        self.at.tokens += batch.tokens
        self.at.trained_tokens += batch.trained_tokens
        self.at.seconds += seconds
        self.at.loss = loss
        self.run.log(
            {
                "step": self.at.step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens": self.at.tokens,
                "seconds": seconds,
            }
        )
        rate = self.at.tokens / self.at.seconds
        self.reporter.progress("training", self.at.step, self.total, f"loss {loss:.4f} · {rate:,.0f} tokens/s")

    def evaluate(self) -> float | None:
        """Loss on the evaluation rows, logged; None without such rows."""
        if not self.inputs.eval_examples:
            return None
        loss = mean_loss(
            self.model,
            self.inputs.eval_examples,
            micro_batch_tokens=self.options.micro_batch_tokens,
            packed=self.packed,
            pad_id=self.inputs.tokenizer.pad_token_id or 0,
            plain_head=self.plain_head,
        )
        self.run.log({"step": self.at.step, "eval_loss": loss})
        return loss

    def _save_checkpoint(self) -> None:
        state = {"identity": self.identity, "progress": self.at.state()}
        tensors = self.optimizer.state_tensors()
        tensors |= {f"frozen.{name}": parameter.detach() for name, parameter in self._start().items()}
        checkpoint.save(self.run.path, self.at.step, tensors, state)
        checkpoint.prune(self.run.path, self.options.keep_checkpoints)

    def finish(self) -> TrainResult:
        """Final evaluation, the adapter (or the model, for method full), run.json."""
        eval_loss = self.evaluate()
        if self.options.method == "full":
            where = self.run.path / "model"
            with atomic.write_directory(where) as temporary:
                self.model.save_pretrained(temporary)
                self.inputs.tokenizer.save_pretrained(temporary)
        else:
            where = self.run.adapter
            files.save_adapter(self.model, where, self.options.model, self._passport())
        record = self._record(eval_loss) | {"adapter" if self.options.method != "full" else "model": str(where)}
        document: dict[str, Any] = {"options": self.options.model_dump(mode="json")}
        document |= {"base_fingerprint": self.inputs.fingerprint}
        document |= {"data_sha256": self.inputs.digests, "machine": machine.describe(self.device), "notes": self.notes}
        document |= {"replaced": self.replaced, "packed": self.packed, "plain_head": self.plain_head}
        atomic.write_json(self.run.path / "run.json", document | {"result": record})
        return TrainResult(record, self.model, self.inputs.tokenizer, self.plain_head, self.packed)

    def _record(self, eval_loss: float | None) -> dict[str, Any]:
        trained = sum(p.numel() for p in trainable_parameters(self.model).values())
        return {
            "method": self.options.method,
            "steps": self.at.step,
            "loss": self.at.loss,
            "eval_loss": eval_loss,
            "tokens": self.at.tokens,
            "trained_tokens": self.at.trained_tokens,
            "skipped_steps": self.at.skipped,
            "seconds": self.at.seconds,
            "tokens_per_second": self.at.tokens / self.at.seconds if self.at.seconds else None,
            "peak_rss_bytes": machine.peak_rss_bytes(),
            "peak_device_bytes": machine.peak_device_bytes(self.device),
            "trainable_parameters": trained,
            "base_weight_bytes": self.weight_bytes,
            "base_precision": self.precision,
            "backend": ops.backend(self.device),
        }

    def _passport(self) -> passport.Passport:
        tokenizer = self.inputs.tokenizer
        template = tokenizer.chat_template
        text = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
        )
        return passport.Passport(
            base_model=self.options.model,
            base_fingerprint=self.inputs.fingerprint,
            base_precision=self.precision,
            tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
            chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
            system=_common_system(self.inputs.rows),
            data_sha256=self.inputs.digests,
            method=self.options.method,
            seed=self.options.seed,
            steps=self.at.step,
            versions=passport.versions(),
        )


def _common_system(rows: list[Row]) -> str | None:
    """The system message that all rows share, if they do."""
    messages = {
        str(row.messages[0]["content"]) if row.messages and row.messages[0]["role"] == "system" else None
        for row in rows
    }
    return messages.pop() if len(messages) == 1 else None


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`option: was …, now …` for each leaf that differs."""
    out = []
    for key in sorted(set(saved) | set(now)):
        was, value = saved.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(value, dict):
            out += _differences(was, value, f"{prefix}{key}.")
        elif was != value:
            out.append(f"{prefix}{key}: was {was}, now {value}")
    return out

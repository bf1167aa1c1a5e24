"""The options of each verb and of each function that Python callers use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import ConfigDict, Field, field_validator, model_validator

from twinlora.config.groups import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    SourceOptions,
    TokenizerOptions,
)
from twinlora.config.values import AnswerMetric, HeldOut, Method, Positive, Tracker

__all__ = [
    "AdapterInspectOptions",
    "AttachOptions",
    "ChatOptions",
    "CompareOptions",
    "DataCheckOptions",
    "DemoOptions",
    "DoctorOptions",
    "EvalOptions",
    "LoadOptions",
    "TrainOptions",
]


class LoadOptions(ModelOptions):
    """A base model to train by other means than ours, from Python: `twinlora.load`."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    precision: Literal["16bit", "nf4"] = Field("16bit", description="Base precision.")
    adapter: Path | None = Field(None, description="Continue this PEFT adapter, or that of a run's directory.")


class AttachOptions(AdapterOptions):
    """Adapters on a loaded model: `twinlora.attach`."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    seed: int = Field(0, description="Seed of the initial adapter.")

    @model_validator(mode="after")
    def _loaded(self) -> Self:
        if self.init == "loftq":
            raise ValueError("init loftq must see the weights while they are quantised: use twinlora.finetune")
        return self


class TrainOptions(Options, ModelOptions, AdapterOptions, DataOptions, OptimizerOptions):
    """Fine-tune a model: `twinlora train`."""

    method: Method = Field(description="lora: 16-bit base; qlora: NF4 base; full: all weights, float32 masters.")
    output: Path = Field(description="The run's directory.")
    init_adapter: Path | None = Field(None, description="Start from this PEFT adapter instead of a fresh one.")
    resume: bool = Field(False, description="Continue from the newest checkpoint that verifies.")
    overwrite: bool = Field(False, description="Remove an earlier run in the output directory.")
    eval_every: Positive | None = Field(None, description="Steps between evaluations (always once at the end).")
    checkpoint_every: Positive | None = Field(None, description="Steps between checkpoints (always once at the end).")
    keep_checkpoints: Positive = Field(2, description="Newest checkpoints that are kept.")
    patience: Positive | None = Field(
        None, description="Stop after this many evaluations without a lower loss; needs eval and eval_every."
    )
    keep_best: bool = Field(
        True, description="With eval and eval_every: save the weights of the best evaluation; off: of the last step."
    )
    report_to: list[Tracker] = Field(
        [], description="Also send metrics to tensorboard, wandb, mlflow or trackio, through their own packages."
    )
    deploy: Literal["nf4", "q4_0", "q8_0"] | None = Field(
        None,
        description="Train with the merged weights as this format stores them, so that the exported low-bit model is "
        "what was trained: nf4 for export --to bnb, q4_0 and q8_0 for --to gguf.",
    )
    program: Annotated[Literal["vllm", "llama.cpp", "transformers", "peft"] | None, tyro.conf.arg(name="for")] = Field(
        None, description="Stop before training if this program could not load what would be trained."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, about a third slower.")
    fused: bool = Field(True, description="Replace blocks by our own where a numeric probe admits them.")
    seed: int = Field(0, description="Seed of the initial adapter, the order of rows and the dropout.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: leave one out")
        if self.method == "full" and self.init_adapter:
            raise ValueError("init_adapter has no use with method full: leave it out or choose lora or qlora")
        if self.init == "loftq" and self.method != "qlora":
            raise ValueError("init loftq makes up for what quantising loses: it needs method qlora")
        if self.init != "default" and self.init_adapter:
            raise ValueError("init_adapter and init exclude each other: leave one out")
        if self.deploy and (self.method == "full" or self.dora or self.dropout or self.modules_to_save):
            raise ValueError("deploy folds plain LoRA: leave out dora, dropout and modules_to_save, with lora or qlora")
        if self.patience and not (self.eval and self.eval_every):
            raise ValueError("patience counts evaluations: it needs eval and eval_every")
        return self


class EvalOptions(Options, ModelOptions, SourceOptions):
    """Measure a model, with or without an adapter: `twinlora eval`."""

    data: HeldOut = Field(min_length=1, description="Rows to measure on; sources as for `twinlora train`.")
    adapter: Path | None = Field(None, description="PEFT adapter directory, or a run's directory.")
    precision: Literal["16bit", "nf4", "auto"] = Field(
        "auto", description="Base precision; auto: as the adapter's passport says."
    )
    metric: list[Literal["loss", "perplexity"] | AnswerMetric] = Field(
        ["loss", "exact-match"], min_length=1, description="What to measure; all but the first two need answers."
    )
    rows: Positive | None = Field(None, description="Only the first rows.")
    max_new_tokens: Positive = Field(128, description="Longest answer when generating.")
    batch_size: Positive = Field(32, description="Answers generated at once.")
    output: Path | None = Field(None, description="Write each row with its answer and its scores here, as JSONL.")


class CompareOptions(Options, ModelOptions, AdapterOptions, DataOptions, OptimizerOptions):
    """Train by several methods, each in its own process, and say which to choose: `twinlora compare`."""

    eval: HeldOut = Field(min_length=1, description="Test rows. They are never used to choose anything.")
    validation: HeldOut = Field(
        [], description="Rows that choose the learning rate; default: split off the training rows."
    )
    methods: list[Method] = Field(["lora", "qlora"], description="Methods to compare.")
    output: Path = Field(description="Directory of the comparison.")
    lr_grid: list[float] = Field(
        [1e-4, 3e-4, 1e-3, 3e-3], description="Learning rates that each method may choose from."
    )
    metric: list[AnswerMetric] = Field(
        ["exact-match"],
        description="How answers are judged: the first decides, others are shown beside it.",
    )
    general: Path | None = Field(
        None,
        description="Text on which forgetting is measured: paragraphs with a blank line between; default: a built-in "
        "sample.",
    )
    search_rows: Positive | None = Field(
        None, description="Training rows of each search run; default: a quarter of the rows."
    )
    validation_rows: Positive = Field(200, description="Rows of the validation split.")
    test_rows: Positive | None = Field(None, description="Only the first test rows.")
    max_new_tokens: Positive = Field(128, description="Longest answer when generating.")
    eval_batch_size: Positive = Field(32, description="Answers generated at once.")
    seed: int = Field(0, description="Seed of the initial adapter, the order of rows and the splits.")
    title: str | None = Field(None, description="Heading of the report.")
    overwrite: bool = Field(False, description="Remove an earlier comparison in the output directory.")

    @field_validator("lr_grid")
    @classmethod
    def _sorted(cls, grid: list[float]) -> list[float]:
        if len(set(grid)) != len(grid) or min(grid, default=0) <= 0:
            raise ValueError("expected different rates above 0")
        return sorted(grid)

    @field_validator("methods", "metric")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if not names or len(set(names)) != len(names):
            raise ValueError("expected each one once, at least one")
        return names


class ChatOptions(Options, ModelOptions):
    """Talk to a model and switch adapters: `twinlora chat`."""

    adapter: list[str] = Field([], description="NAME=DIR, any number of them; the first is active.")
    precision: Literal["16bit", "nf4"] = Field("16bit", description="Base precision.")
    system: str | None = Field(None, description="System message; default: the adapter's own, from its passport.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0: greedy.")
    max_new_tokens: Positive = Field(256, description="Longest answer.")
    seed: int = Field(0, description="Seed of the sampling.")


class AdapterInspectOptions(Options):
    """What an adapter is and what can load it: `twinlora adapter inspect DIR`."""

    directory: Annotated[Path, tyro.conf.Positional] = Field(
        description="PEFT adapter directory, or a run's directory."
    )
    model: str | None = Field(None, description="Its base model, to measure what the adapter changes.")


class DataCheckOptions(Options, TokenizerOptions, SourceOptions):
    """Show what would be trained, before anything is: `twinlora data check`."""

    eval: HeldOut = Field([], description="Held-out rows: how many of them are training rows too.")
    samples: Annotated[int, Field(ge=0)] = Field(2, description="Rows to show with their trained tokens marked.")


class DoctorOptions(Options):
    """Show this machine, the backend that runs, and what is missing: `twinlora doctor`."""


class DemoOptions(Options):
    """The whole story on the embedded model and data: `twinlora demo`."""

    output: Path = Field(Path("runs/demo"), description="Directory of the demo.")
    model: str | None = Field(None, description="Another base model (directory, GGUF file or hub id).")
    hub: bool = Field(False, description="Take SmolLM2-135M-Instruct from the hub instead of the embedded copy.")
    train_rows: Positive = Field(480, description="Training rows of the comparison.")
    test_rows: Positive = Field(100, description="Held-out rows.")
    seed: int = Field(0, description="Seed of everything.")
    overwrite: bool = Field(True, description="Remove an earlier demo in the output directory.")

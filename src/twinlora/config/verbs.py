"""The options of each verb and of each function that Python callers use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import ConfigDict, Field, field_validator, model_validator

from twinlora.config.groups import (
    ADAPTERS,
    PRECISION,
    AdapterOptions,
    DataOptions,
    ExtentOptions,
    HybridOptions,
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    PrecisionOptions,
    SourceOptions,
    TokenizerOptions,
    changed,
    forbid_quantised,
)
from twinlora.config.values import (
    AnswerMetric,
    AutoOrOff,
    BasePrecision,
    Goal,
    HeldOut,
    Method,
    Positive,
    Size,
    Sources,
    Tracker,
    parse_size,
)

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
    "PlanOptions",
    "ServeOptions",
    "TrainOptions",
]


class LoadOptions(ModelOptions):
    """A base model to train by other means than ours, from Python: `twinlora.load`."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    precision: Literal["16bit", "nf4"] = Field("16bit", description="Base precision.")
    adapter: Path | None = Field(None, description="Continue this PEFT adapter, or that of a run's directory.")

    @model_validator(mode="after")
    def _quantised(self) -> Self:
        if self.precision == "16bit":
            forbid_quantised(self, "precision 16bit")
        return self


class AttachOptions(AdapterOptions):
    """Adapters on a loaded model: `twinlora.attach`."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    seed: int = Field(0, description="Seed of the initial adapter.")

    @model_validator(mode="after")
    def _loaded(self) -> Self:
        if self.init == "loftq":
            raise ValueError("init loftq must see the weights while they are quantised: use twinlora.finetune")
        return self


class TrainOptions(Options, ModelOptions, AdapterOptions, HybridOptions, DataOptions, OptimizerOptions, MemoryOptions):
    """Fine-tune a model: `twinlora train`."""

    method: Method | None = Field(
        None,
        description="lora: 16-bit base; qlora: NF4 base; hybrid: each layer of the base in 16 bit, int8, NF4 or NF3, "
        "as a budget allows; full: all weights, float32 masters.",
    )
    plan: AutoOrOff = Field(
        "off",
        description="auto: let the planner choose method, micro_batch_tokens and gradient_checkpointing; what you give "
        "yourself stays.",
    )
    goal: Goal = Field("balanced", description="What plan auto chooses for; see `twinlora plan --help`.")
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
    fused: bool = Field(True, description="Replace blocks by our own where a numeric probe admits them.")
    seed: int = Field(0, description="Seed of the initial adapter, the order of rows and the dropout.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method is None and self.plan == "off":
            raise ValueError("method is missing: choose lora, qlora, hybrid or full, or plan auto")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: leave one out")
        self._budget_for([self.method] if self.method else [])
        if self.method == "full" and self.init_adapter:
            raise ValueError("init_adapter has no use with method full: leave it out or choose lora, qlora or hybrid")
        if self.init == "loftq" and self.method != "qlora":
            raise ValueError("init loftq makes up for what quantising loses: it needs method qlora")
        if self.init != "default" and self.init_adapter:
            raise ValueError("init_adapter and init exclude each other: leave one out")
        if self.dense_copies != "off" and self.method != "qlora":
            raise ValueError("dense_copies are of weights in 4 bit: leave it out or choose method qlora")
        if self.deploy and self.dense_copies != "off":
            raise ValueError(
                "deploy multiplies by merged weights, of which dense_copies keep none: leave one of them out"
            )
        if self.deploy and self.plan == "auto":
            raise ValueError("plan auto does not know what deploy keeps in memory: leave one of them out")
        if self.deploy and (self.method not in ("lora", "qlora") or self.dora or self.dropout or self.modules_to_save):
            raise ValueError("deploy folds plain LoRA: leave out dora, dropout and modules_to_save, with lora or qlora")
        if self.patience and not (self.eval and self.eval_every):
            raise ValueError("patience counts evaluations: it needs eval and eval_every")
        if self.eval_every and not self.eval:
            raise ValueError("eval_every counts steps between evaluations: it needs eval, the rows to evaluate on")
        if self.plan == "off" and changed(self, "goal"):
            raise ValueError("goal is what plan auto chooses for: add plan auto, or leave goal out")
        if self.method == "full" and (unused := changed(self, *ADAPTERS)):
            raise ValueError(f"{' and '.join(unused)}: of adapters, which method full has none of: leave them out")
        if self.method in ("lora", "full"):
            forbid_quantised(self, f"method {self.method}")
        return self


class EvalOptions(Options, PrecisionOptions, SourceOptions):
    """Measure a model, with or without an adapter: `twinlora eval`."""

    data: HeldOut = Field(min_length=1, description="Rows to measure on; sources as for `twinlora train`.")
    adapter: Path | None = Field(None, description="PEFT adapter directory, or a run's directory.")
    precision: BasePrecision = Field("auto", description=PRECISION)
    metric: list[Literal["loss", "perplexity"] | AnswerMetric] = Field(
        ["loss", "exact-match"], min_length=1, description="What to measure; all but the first two need answers."
    )
    rows: Positive | None = Field(None, description="Only the first rows.")
    max_new_tokens: Positive = Field(128, description="Longest answer when generating.")
    batch_size: Positive = Field(32, description="Answers generated at once.")
    output: Path | None = Field(None, description="Write each row with its answer and its scores here, as JSONL.")


class CompareOptions(Options, ModelOptions, AdapterOptions, HybridOptions, DataOptions, OptimizerOptions):
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

    @model_validator(mode="after")
    def _budget(self) -> Self:
        self._budget_for(self.methods)
        if self.init == "loftq" and set(self.methods) != {"qlora"}:
            raise ValueError("init loftq makes up for what NF4 loses: with it compare qlora alone, --methods qlora")
        if self.lr != OptimizerOptions.model_fields["lr"].default:
            raise ValueError(f"lr {self.lr:g}: each method's rate is searched; give --lr-grid {self.lr:g} instead")
        return self


class ChatOptions(Options, PrecisionOptions):
    """Talk to a model and switch adapters: `twinlora chat`."""

    adapter: list[str] = Field([], description="NAME=DIR, any number of them; the first is active.")
    system: str | None = Field(None, description="System message; default: the adapter's own, from its passport.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0: greedy.")
    max_new_tokens: Positive = Field(256, description="Longest answer.")
    seed: int = Field(0, description="Seed of the sampling.")


class PlanOptions(Options, ModelOptions, AdapterOptions, DataOptions, ExtentOptions):
    """The right way to train, before a weight is loaded: `twinlora plan MODEL`."""

    model: Annotated[str, tyro.conf.Positional] = Field(
        "",
        description="A directory, a config.json, a GGUF file, a hub id (only its configuration and the headers of its "
        "weights are read), or a well-known name such as llama-65b.",
    )
    data: Sources = Field(
        [], description="Rows to train on; sources as for `twinlora train`. Without, rows of `length`."
    )
    device: str = Field("auto", description="auto: this machine; or a device by its exact name, such as 'RTX 4090'.")
    memory: Size | None = Field(
        None, description="Memory that a run may use, for example 24GiB; default: the device's."
    )
    goal: Goal = Field(
        "balanced",
        description="balanced; accuracy: the least rounding that fits; speed; memory; edge: for a device that runs a "
        "base of 4 bits; many-tasks: adapters that are switched over one base.",
    )
    micro_batch_tokens: Positive = Field(8192, description="Most tokens that may go through the model at once.")
    length: Positive = Field(512, description="Without data: tokens of each row.")
    rows: Positive = Field(1000, description="Without data: rows of an epoch.")
    seed: int = Field(0, description="Seed of the order of rows, as for `twinlora train`.")
    calibrate: bool = Field(False, description="Measure the rates of this machine and keep them; takes under a minute.")
    score: bool = Field(False, description="Show what past runs were predicted to take and what they took.")

    @model_validator(mode="after")
    def _asked(self) -> Self:
        if not (self.model or self.calibrate or self.score):
            hint = "name one to plan for, for example twinlora plan llama-65b"
            if len(self.data) > 1:  # a list takes all that follows it
                last = self.data[-1]
                hint = f"if {last!r} is it and not data, it stands first: twinlora plan {last} --data …"
            raise ValueError(f"model is missing: {hint}")
        if self.score and (self.model or self.calibrate):
            raise ValueError("score shows past runs alone: leave it out, or model and calibrate")
        if self.data and (unused := changed(self, "length", "rows")):
            raise ValueError(f"{' and '.join(unused)}: of the rows of a plan without data: leave out one or the other")
        return self


class ServeOptions(Options, PrecisionOptions):
    """One base and many adapters over HTTP, as OpenAI's API: `twinlora serve`."""

    adapter: list[str] = Field([], description="NAME=DIR, any number of them; requests choose by name.")
    adapters_dir: Path | None = Field(
        None,
        description="Directory of adapter directories, each served under its own name; the admin API registers from "
        "here alone.",
    )
    name: str | None = Field(None, description="What requests call the bare base; default: the last part of --model.")
    host: str = Field("127.0.0.1", description="Address to listen on; any other than this machine's own needs a token.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on; 0 takes a free one.")
    token_file: Path | None = Field(None, description="File with the token that requests must bring.")
    admin_token_file: Path | None = Field(
        None, description="File with the admin API's token; without it there is none."
    )
    slots: Positive = Field(16, description="Requests that are answered at once.")
    queue: Positive = Field(64, description="Requests that may wait; more get status 429.")
    context: Positive | None = Field(
        None, description="Longest prompt and answer together, in tokens; default: 2048, or what the model has."
    )
    batch_tokens: Positive = Field(256, description="Tokens that go through the model at once; prompts are cut to fit.")
    max_new_tokens: Positive = Field(256, description="Longest answer where a request does not say.")
    adapter_memory: str = Field(
        "1GiB", description="Adapters in memory, at most; the least recently used ones are read again when needed."
    )
    drain: Annotated[float, Field(ge=0)] = Field(
        60.0, description="Seconds for requests that run to end when the server is told to stop; then they are cut off."
    )
    blends: bool = Field(False, description="Let requests mix adapters: model a:0.7+b:0.3.")
    max_body: str = Field("1MiB", description="Largest request.")
    rate: Annotated[float, Field(ge=0)] = Field(0.0, description="Requests per second and client address; 0: no limit.")

    @field_validator("adapter_memory", "max_body")
    @classmethod
    def _size(cls, text: str) -> str:
        parse_size(text)
        return text

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_tokens < self.slots:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is less than slots {self.slots}: give it as many at least"
            )
        return self


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

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.hub and self.model:
            raise ValueError("hub and model name two base models: leave one of them out")
        return self

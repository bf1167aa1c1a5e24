"""Every option, once. Flags, recipe files and run records derive from these models; unknown keys are errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tyro
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from twinlora.errors import ConfigError

__all__ = [
    "AdapterInspectOptions",
    "AdapterOptions",
    "AttachOptions",
    "ChatOptions",
    "CompareOptions",
    "DataCheckOptions",
    "DataOptions",
    "DemoOptions",
    "DoctorOptions",
    "EvalOptions",
    "LoadOptions",
    "ModelOptions",
    "OptimizerOptions",
    "Options",
    "SourceOptions",
    "TokenizerOptions",
    "TrainOptions",
    "parse_patterns",
    "parse_ranges",
    "parse_size",
    "read_recipe",
    "validated",
]

Method = Literal["lora", "qlora", "full"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
AnswerMetric = Literal["exact-match", "chrf", "rouge-l", "json-valid", "json-fields"]
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """`24GiB`, `500MB`, `4096` -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if not match:
        raise ConfigError(f"size {text!r}: expected a number with a unit, for example 24GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_ranges(text: str) -> tuple[int, ...]:
    """`0-2,5` -> (0, 1, 2, 5). Raises ValueError."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{part!r} is not a number or a range such as 0-7")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(numbers))


def parse_patterns(entries: list[str]) -> dict[str, float]:
    """`["q_proj=8"]` -> {"q_proj": 8.0}; names are regular expressions. Raises ValueError."""
    patterns: dict[str, float] = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        if not name or not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) <= 0:
            raise ValueError(f"{entry!r} is not NAME=NUMBER, for example down_proj=32")
        patterns[name] = float(value)
    return patterns


def _listed(given: Any) -> Any:
    """One source is a list of one; paths are as good as text."""
    given = [given] if isinstance(given, (str, Path)) else given
    return [str(one) if isinstance(one, Path) else one for one in given] if isinstance(given, list) else given


def _unweighted(sources: list[str]) -> list[str]:
    for source in sources:
        if re.search(r"@\d*\.?\d+$", source) and not Path(source).exists():
            raise ValueError(f"{source!r} has a weight; held-out rows are read once each")
    return sources


Sources = Annotated[list[str], BeforeValidator(_listed)]
HeldOut = Annotated[list[str], BeforeValidator(_listed), AfterValidator(_unweighted)]

# Columns that rows may have (data/formats.py).
_FIELDS = (
    "messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion", "text", "system",
    "tools",
)  # fmt: skip


class Options(BaseModel):
    """What every verb shares."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    json_output: Annotated[bool, tyro.conf.arg(name="json")] = Field(
        False, description="Print one JSON document on stdout; prose and progress go to stderr."
    )


class TokenizerOptions(BaseModel):
    """Which base model."""

    model: str = Field(description="Base model: a local directory, a GGUF file, or a hub id such as owner/name.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for code you read."
    )


class ModelOptions(TokenizerOptions):
    """Which base model, and where it runs."""

    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto takes the first GPU if there is one.")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="Type of computation and of weights that are not quantised. auto: bfloat16, unless this device is "
        "slow at it (measured).",
    )
    block_size: int = Field(64, description="NF4: weights that share one scale.")
    double_quant: bool = Field(True, description="NF4: quantise the scales too (4.127 instead of 4.5 bits per weight).")


class LoadOptions(ModelOptions):
    """A base model to train by other means than ours, from Python: `twinlora.load`."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    precision: Literal["16bit", "nf4"] = Field("16bit", description="Base precision.")
    adapter: Path | None = Field(None, description="Continue this PEFT adapter, or that of a run's directory.")


class AdapterOptions(BaseModel):
    """The low-rank matrices."""

    rank: Positive = Field(16, description="Rank r of the update B·A.")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="The update is scaled by alpha / rank.")
    dropout: Probability = Field(0.0, description="Dropout on the adapter's input while training.")
    target: list[str] = Field(
        ["all-linear"],
        description="Layers that get an adapter: all-linear (the head excluded), names such as q_proj, or regular "
        "expressions for whole names.",
    )
    exclude: list[str] = Field([], description="Layers that get none, named like targets.")
    layers: str | None = Field(None, description="Only these blocks, for example 0-7,12.")
    rank_pattern: list[str] = Field([], description="NAME=RANK for layers of another rank, for example down_proj=32.")
    alpha_pattern: list[str] = Field([], description="NAME=ALPHA for layers of another alpha.")
    rslora: bool = Field(False, description="Scale by alpha / √rank: steadier at high ranks.")
    dora: bool = Field(False, description="DoRA: also train the length of each row of the updated weight.")
    init: Literal["default", "pissa", "loftq"] = Field(
        "default",
        description="default: B is 0; pissa: the weight's principal components; loftq: what NF4 lost (method qlora).",
    )
    modules_to_save: list[str] = Field([], description="Modules trained as a whole and saved, for example lm_head.")

    @field_validator("layers")
    @classmethod
    def _ranges(cls, text: str | None) -> str | None:
        parse_ranges(text or "0")
        return text

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, entries: list[str]) -> list[str]:
        parse_patterns(entries)
        return entries

    @model_validator(mode="after")
    def _variant(self) -> Self:
        if self.dora and self.dropout:
            raise ValueError("dora with dropout is not supported: leave one out")
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


class SourceOptions(BaseModel):
    """Rows, wherever they come from."""

    data: Sources = Field(
        min_length=1,
        description="Rows: files (.jsonl, .json, .csv, .tsv, .parquet), hub data sets (owner/name, owner/name:PART), "
        "or - for JSON Lines on standard input. Several are mixed; FILE@0.5 shows half of its rows in an epoch, FILE@2 "
        "all of them twice.",
    )
    columns: list[str] = Field(
        [], description="FIELD=COLUMN for columns of other names, for example prompt=question,completion=answer."
    )
    max_length: Positive = Field(2048, description="Longest row in tokens.")

    @field_validator("columns")
    @classmethod
    def _columns(cls, entries: list[str]) -> list[str]:
        for entry in entries:
            field, _, column = entry.partition("=")
            if field not in _FIELDS or not column:
                raise ValueError(f"{entry!r} is not FIELD=COLUMN with a field of {', '.join(_FIELDS)}")
        if len({entry.partition("=")[2] for entry in entries}) < len(entries):
            raise ValueError("a column is named twice")
        return entries


class DataOptions(SourceOptions):
    """Training rows and how they become batches."""

    eval: HeldOut = Field([], description="Held-out rows for the loss during and after training; sources like data.")
    overlong: Literal["error", "truncate", "drop"] = Field(
        "error", description="Rows above max_length; truncate keeps the answer and the end of the prompt."
    )
    allow_untrained: bool = Field(False, description="Leave out rows with nothing to train on instead of stopping.")
    batch_size: Positive = Field(16, description="Rows per optimiser step.")
    micro_batch_tokens: Positive = Field(
        2048, description="Tokens that go through the model at once; a batch is split into as many parts as it needs."
    )
    packing: Literal["auto", "off"] = Field(
        "auto",
        description="auto: rows are concatenated without padding where the model is proved to allow it; off: padded.",
    )
    shuffle: bool = Field(True, description="New random order each epoch (from the seed); off keeps the file's order.")


class OptimizerOptions(BaseModel):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = Field(2e-4, description="Peak learning rate.")
    scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay after the warm-up.")
    lora_plus_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0, description="LoRA+: B learns this many times as fast as A; 16 is usual."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="Steps of linear warm-up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    beta1: Probability = Field(0.9, description="AdamW first-moment decay.")
    beta2: Probability = Field(0.999, description="AdamW second-moment decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    epochs: Positive = Field(1, description="Passes over the data.")
    max_steps: Positive | None = Field(None, description="Stop after this many optimiser steps.")


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


T = TypeVar("T", bound=BaseModel)


def validated(cls: type[T], values: dict[str, Any], *, where: str = "options") -> T:
    """`cls(**values)`; every problem in one ConfigError that names the option, what it got and what was expected."""
    try:
        return cls(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]) or "options"
            got = (
                ""
                if problem["type"] in ("missing", "value_error") or not problem["loc"]
                else f" (got {problem['input']!r})"
            )
            lines.append(f"  {name}: {problem['msg'].removeprefix('Value error, ')}{got}")
        known = f"\n  known options: {', '.join(cls.model_fields)}" if "Extra inputs" in str(error) else ""
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines) + known) from None


def read_recipe(path: Path, cls: type[BaseModel]) -> dict[str, Any]:
    """The options in a YAML recipe, typed as the fields of `cls`; dashes and underscores are the same.

    Raises ConfigError that names every unknown option and every value of the wrong type.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"recipe {path}: not readable as YAML: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"recipe {path}: expected `option: value` lines, found {type(given).__name__}")
    given = {str(key).replace("-", "_"): value for key, value in given.items()}
    unknown = sorted(set(given) - set(cls.model_fields))
    if unknown:
        raise ConfigError(
            f"recipe {path}: unknown option(s) {', '.join(unknown)}; known: {', '.join(cls.model_fields)}"
        )
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in given.items():
        field = cls.model_fields[name]
        try:
            kind: Any = Annotated[field.annotation, *(field.metadata or [None])]
            values[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            wrong += [f"  {name}: {problem['msg']} (got {problem['input']!r})" for problem in error.errors()]
    if wrong:
        raise ConfigError(f"recipe {path}: {len(wrong)} problem(s)\n" + "\n".join(wrong))
    return values

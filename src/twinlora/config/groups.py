"""Groups of options that several verbs share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from twinlora.config.values import (
    AutoOrOff,
    BasePrecision,
    HeldOut,
    Positive,
    Probability,
    SizeOrWord,
    Sources,
    Switch,
    parse_patterns,
    parse_ranges,
    parse_size,
)

__all__ = [
    "AdapterOptions",
    "DataOptions",
    "ExtentOptions",
    "HybridOptions",
    "LayerOptions",
    "MemoryOptions",
    "ModelOptions",
    "OptimizerOptions",
    "Options",
    "PrecisionOptions",
    "SourceOptions",
    "TokenizerOptions",
    "changed",
]

# Said once: verbs differ in the default alone.
PRECISION = (
    "How the base's linear layers are stored: 16bit (the type is dtype's), bf16 (in bfloat16), int8, nf4, nf3; hybrid: "
    "each as the adapters were trained on it, which must agree; auto: as the first adapter's passport says."
)

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


def changed(options: BaseModel, *names: str) -> list[str]:
    """Those of the options that have another value than their default."""
    fields = type(options).model_fields
    return [name for name in names if getattr(options, name) != fields[name].get_default()]


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
    block_size: int = Field(64, description="Quantised weights that share one scale.")
    double_quant: bool = Field(
        True, description="NF4 and NF3: quantise the scales too (NF4: 4.127 instead of 4.5 bits per weight)."
    )


QUANTISED = ("block_size", "double_quant")  # options of quantised weights


def forbid_quantised(options: ModelOptions, what: str) -> None:
    """Raise ValueError if `options` say how weights are quantised, where `what` quantises none."""
    if unused := changed(options, *QUANTISED):
        raise ValueError(
            f"{' and '.join(unused)}: of quantised weights, which {what} has none of: leave out one or the other"
        )


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
    def _patterns(cls, entries: list[str], info: ValidationInfo) -> list[str]:
        patterns = parse_patterns(entries)
        if info.field_name == "rank_pattern" and any(value != int(value) for value in patterns.values()):
            raise ValueError("ranks are whole numbers")
        return entries

    @model_validator(mode="after")
    def _variant(self) -> Self:
        if self.dora and self.dropout:
            raise ValueError("dora with dropout is not supported: leave one out")
        return self


ADAPTERS = (*AdapterOptions.model_fields, "lora_plus_ratio")  # options of adapters


def unused_by(method: str) -> tuple[str, ...]:
    """Options that have no use with `method`, and are refused there."""
    return {"full": (*ADAPTERS, *QUANTISED), "lora": QUANTISED}.get(method, ())


class LayerOptions(BaseModel):
    """The precision of each layer of a base, given by hand."""

    layer_precision: Path | None = Field(
        None,
        description="hybrid: the precision of each linear layer, a JSON file {layer: format} with formats such as "
        "nf3-64-dq256, nf4-64-dq256, int8-64 and 16bit; or the directory of an adapter or run that was trained so.",
    )


class PrecisionOptions(ModelOptions, LayerOptions):
    """How the base of a model that answers is stored."""

    precision: BasePrecision = Field("16bit", description=PRECISION)

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.precision == "bf16" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"precision bf16 and dtype {self.dtype} exclude each other: leave one out, or say 16bit")
        if self.layer_precision is not None and self.precision not in ("16bit", "auto", "hybrid"):
            raise ValueError(f"layer_precision says each layer's format: leave out precision {self.precision}")
        if self.precision in ("16bit", "bf16") and self.layer_precision is None:
            forbid_quantised(self, f"precision {self.precision}")
        return self


class HybridOptions(LayerOptions):
    """What the base of method hybrid may take: one of these."""

    memory: str | None = Field(
        None,
        description="hybrid: bytes of all weights of the base, for example 6GiB; activations, adapter and optimiser "
        "come on top.",
    )
    bits: Annotated[float, Field(gt=0)] | None = Field(
        None, description="hybrid: average bits per weight of the linear layers (the head excluded), scales included."
    )

    @field_validator("memory")
    @classmethod
    def _size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text

    def _budget_for(self, methods: Collection[str]) -> None:
        """Raise ValueError unless exactly method hybrid has a budget, and one only."""
        given = [name for name in HybridOptions.model_fields if getattr(self, name) is not None]
        if "hybrid" in methods and len(given) != 1:
            raise ValueError("method hybrid needs one of memory, bits and layer_precision, for example --bits 4.5")
        if "hybrid" not in methods and given:
            raise ValueError(f"{', '.join(given)}: only method hybrid has a budget")


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
        if len({entry.partition("=")[0] for entry in entries}) < len(entries):
            raise ValueError("a field is named twice: which of its columns is meant?")
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
    packing: AutoOrOff = Field(
        "auto",
        description="auto: rows are concatenated without padding where the model is proved to allow it; off: padded.",
    )
    shuffle: bool = Field(True, description="New random order each epoch (from the seed); off keeps the file's order.")


class ExtentOptions(BaseModel):
    """How much of the data a run sees."""

    epochs: Positive = Field(1, description="Passes over the data.")
    max_steps: Positive | None = Field(None, description="Stop after this many optimiser steps.")


class OptimizerOptions(ExtentOptions):
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


class MemoryOptions(BaseModel):
    """What a run trades for memory. None of these changes the result but by the order of sums."""

    gradient_checkpointing: Switch = Field(
        "auto",
        description="Recompute activations: less memory, about a third slower. auto: once memory has run out.",
    )
    on_oom: Literal["retry", "stop"] = Field(
        "retry",
        description="Where memory runs out. retry: recompute activations if gradient_checkpointing is auto, then halve "
        "the micro-batches; the batch of a step stays what it is. stop: say what to lower.",
    )
    offload: list[Literal["optimizer", "activations"]] = Field(
        [],
        description="Keep in host memory, for the price of copies: the optimiser (masters, moments and the update), "
        "and the activations that the backward pass wants.",
    )
    dense_copies: SizeOrWord = Field(
        "off",
        description="Method qlora: keep 16-bit copies beside the 4-bit weights of as many layers as fit into this "
        "size, or into what a step leaves (auto); they need no decoding.",
    )

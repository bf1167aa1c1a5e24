"""The options of the verbs that make something to run elsewhere out of an adapter."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, field_validator, model_validator

from twinlora.config.groups import Options, changed
from twinlora.config.values import HeldOut, Positive

__all__ = [
    "AdapterCombineOptions",
    "AdapterCompressOptions",
    "ArtefactOptions",
    "ExportOptions",
    "MergeOptions",
    "RankOptions",
]

# Quants that are written here; those that llama-quantize makes.
_OURS = ("f16", "bf16", "q8_0", "q4_0", "iq4_nl")
_LLAMA_CPP = (
    "q2_k", "q2_k_s", "q3_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k", "q4_k_s", "q4_k_m", "q5_k", "q5_k_s", "q5_k_m",
    "q6_k", "q4_1", "q5_0", "q5_1", "iq4_xs",
)  # fmt: skip
_Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ArtefactOptions(Options):
    """What is folded into what, and how the result is compared with the trained model."""

    run: Annotated[Path, tyro.conf.Positional] = Field(
        description="A run's directory, or a PEFT adapter directory; of method full: its model."
    )
    output: Path = Field(description="Directory to write, whole or not at all.")
    model: str | None = Field(
        None, description="Base model; default: the one that the adapter names. A directory, a GGUF file or a hub id."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for code you read."
    )
    base: Literal["auto", "16bit", "dequantised"] = Field(
        "auto",
        description="For an adapter trained on a quantised base, the weights it is folded into: the original 16bit "
        "ones, or those it was trained on, dequantised; auto builds both, measures them on held-out rows and takes the "
        "better one.",
    )
    weights: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Type of weights that are not quantised. auto: the base's own. In bfloat16 an update that is small "
        "beside the weight vanishes; float16 has three more bits.",
    )
    data: HeldOut = Field(
        [], description="Held-out rows for the comparison; default: the run's evaluation rows, else its training rows."
    )
    columns: list[str] = Field([], description="FIELD=COLUMN for columns of other names, as in train.")
    rows: Positive = Field(32, description="How many of the rows are compared.")
    gate: bool = Field(True, description="Compare with the trained model, and write nothing if they differ.")
    max_kl: _Limit | None = Field(
        None, description="Another limit on the mean divergence in nats; default: by format, see the page."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type in which the trained model is asked; bfloat16 halves the memory and adds noise."
    )
    overwrite: bool = Field(False, description="Replace the output directory if it exists.")

    @model_validator(mode="after")
    def _gated(self) -> Self:
        if self.max_kl is not None and not self.gate:
            raise ValueError("max_kl is the gate's limit, and no-gate has none: leave one of them out")
        return self


class RankOptions(Options):
    """Adapters rewritten without training, and measured on rows."""

    output: Path = Field(description="Directory of the new adapter.")
    data: HeldOut = Field([], description="Held-out rows: the loss of what is given and of the result is measured.")
    columns: list[str] = Field([], description="FIELD=COLUMN for columns of other names, as in train.")
    rows: Positive | None = Field(None, description="Only the first rows.")
    model: str | None = Field(None, description="Base model for measuring; default: the one that the adapters name.")
    overwrite: bool = Field(False, description="Replace the output directory if it exists.")

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if (unused := changed(self, "rows", "columns")) and not self.data:
            raise ValueError(f"{' and '.join(unused)}: nothing is measured without rows; give some with --data")
        return self


class AdapterCombineOptions(RankOptions):
    """Several adapters as one: `twinlora adapter combine DIR DIR …`."""

    adapters: list[Path] = Field(min_length=2, description="PEFT adapter directories or runs, for the same base.")
    weights: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(
        [], description="What each counts, in the order of the adapters; default: 1 for all."
    )
    method: Literal[
        "svd", "linear", "cat", "ties", "dare_linear", "dare_ties", "ties_svd", "dare_linear_svd", "dare_ties_svd"
    ] = Field(
        "svd",
        description="PEFT's methods. svd: the nearest of a rank to the sum of updates; cat: the sum itself, ranks add "
        "up; linear, ties and dare_… work on A and B apart; …_svd on the updates.",
    )
    rank: Positive | None = Field(None, description="Rank of svd methods; default: the highest there is.")
    density: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="Share of entries that ties and dare keep.")
    seed: int = Field(0, description="Seed of what dare keeps.")

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if self.weights and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.adapters)} adapters")
        if self.weights and not any(self.weights):
            raise ValueError("weights: all are 0, and the result would do nothing")
        return self

    @model_validator(mode="after")
    def _applicable(self) -> Self:
        if self.rank is not None and not self.method.endswith("svd"):
            raise ValueError(f"rank is what svd and …_svd cut to; method {self.method} cuts nothing: leave it out")
        if changed(self, "density") and not self.method.startswith(("ties", "dare")):
            raise ValueError(f"density is what ties and dare keep; method {self.method} keeps all: leave it out")
        if changed(self, "seed") and not self.method.startswith("dare"):
            raise ValueError(f"seed is dare's; method {self.method} draws nothing: leave it out")
        return self


class AdapterCompressOptions(RankOptions):
    """An adapter in a lower rank: `twinlora adapter compress DIR --rank 8`."""

    directory: Annotated[Path, tyro.conf.Positional] = Field(
        description="PEFT adapter directory, or a run's directory."
    )
    rank: Positive = Field(description="The new rank; the nearest update of that rank is taken (SVD).")


class MergeOptions(ArtefactOptions):
    """Fold an adapter into its base as a 16-bit checkpoint: `twinlora merge RUN`."""


class ExportOptions(ArtefactOptions):
    """Write an adapter or the merged model for another program: `twinlora export RUN`."""

    to: Literal["merged", "bnb", "gguf", "gguf-lora", "peft"] = Field(
        description="merged: 16-bit safetensors; bnb: 4-bit for transformers with bitsandbytes; gguf: for llama.cpp; "
        "gguf-lora: an adapter that llama-server swaps; peft: the adapter as the plainest LoRA."
    )
    quant: str = Field(
        "f16",
        description="gguf: f16, bf16, q8_0, q4_0, iq4_nl, or a K-quant such as q4_k_m (needs llama-quantize); "
        "gguf-lora: the base that it is compared on.",
    )
    block_size: int = Field(64, description="bnb: weights that share one scale.")
    double_quant: bool = Field(True, description="bnb: quantise the scales too.")
    edge: bool = Field(
        False, description="gguf: also measure size, memory and speed in llama.cpp, beside the 16-bit model."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.edge and self.to != "gguf":
            raise ValueError("edge measures GGUF files in llama.cpp: it needs to gguf")
        if self.to not in ("gguf", "gguf-lora") and changed(self, "quant"):
            raise ValueError("quant is of GGUF files: it needs to gguf or gguf-lora")
        if self.to not in ("merged", "bnb") and changed(self, "weights"):
            raise ValueError("weights is of 16-bit and bnb checkpoints: it needs to merged or bnb")
        if self.to != "bnb" and (given := changed(self, "block_size", "double_quant")):
            raise ValueError(f"{' and '.join(given)}: of 4-bit checkpoints alone, they need to bnb")
        if self.to == "gguf-lora" and self.quant not in _OURS:
            raise ValueError(f"quant {self.quant}: the base for comparing is one of {', '.join(_OURS)}")
        return self

    @field_validator("quant")
    @classmethod
    def _known(cls, name: str) -> str:
        quant = name.lower()
        if quant not in _OURS + _LLAMA_CPP:
            near = difflib.get_close_matches(quant, _OURS + _LLAMA_CPP, n=1)
            raise ValueError(
                f"{name!r} is not known{f', did you mean {near[0]}?' if near else ''}; expected one of "
                f"{', '.join(_OURS)}, or with llama-quantize of {', '.join(_LLAMA_CPP)}"
            )
        return quant

"""What a model without weights shows: whether options fit it, and `train --for PROGRAM`, whether what is about to be
trained could be loaded there. Both are looked at before anything is written or removed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from twinlora.adapters import files, passport
from twinlora.adapters.loaders import GGUF_MODELS, nearest, planned, refused, setting
from twinlora.adapters.precision import read_layers
from twinlora.adapters.targets import LoraConfig, resolve_modules, resolve_targets
from twinlora.config import TrainOptions
from twinlora.errors import AdapterError, ConfigError, DataError
from twinlora.model.load import Source, skeleton
from twinlora.model.quantizer import nf4_of, quantizable
from twinlora.numerics.formats import by_layer
from twinlora.train.hybrid import candidates
from twinlora.train.inputs import Inputs
from twinlora.train.notes import Notes

__all__ = ["require_known_tokens", "require_loadable", "require_trainable"]


def require_trainable(options: TrainOptions, source: Source, fingerprint: str) -> PreTrainedModel:
    """The model without weights. Raises InputError for options that do not fit it."""
    model = skeleton(source, trust_remote_code=options.trust_remote_code)
    if options.method == "qlora" or options.deploy:
        nf4_of(options)
    if options.layer_precision is not None:
        by_layer(read_layers(options.layer_precision), quantizable(model))
    if options.method == "hybrid" and options.bits is not None:
        counts = [model.get_submodule(name).weight.numel() for name in quantizable(model)]
        least = sum(min(fmt.stored_bytes(count) for fmt in candidates(options)) for count in counts)
        if int(options.bits / 8 * sum(counts)) < least:
            raise ConfigError(
                f"hybrid: --bits {options.bits:g}; the smallest formats take {8 * least / sum(counts):.3f} bits a "
                f"weight; give --bits {-(-8 * least * 1000 // sum(counts)) / 1000:g} or more, or a smaller model"
            )
    if options.method != "full":
        lora = LoraConfig.from_options(options)
        resolve_targets(model, lora)
        resolve_modules(model, lora)
        if options.init_adapter is not None:
            _require_start(model, options, lora, options.init_adapter, fingerprint)
    return model


def _require_start(
    model: PreTrainedModel, options: TrainOptions, lora: LoraConfig, directory: Path, fingerprint: str
) -> None:
    """Raise AdapterError for an adapter of another base or other layers, or one that would start with another scale."""
    adapter = files.read_adapter(directory)
    files.require_fit(model, adapter)
    paper = passport.read(passport.home(directory))
    if paper is not None:
        passport.require_base(directory, paper, fingerprint=fingerprint, base=options.model)
    other = {
        name: config
        for name, config in adapter.configs.items()
        if not math.isclose(config.scale, lora.layer(name).scale, rel_tol=1e-6)
    }
    if other:
        name, config = next(iter(other.items()))
        alpha = config.scale * (math.sqrt(config.rank) if lora.rslora else config.rank)
        raise AdapterError(
            f"adapter {directory}: {len(other)} layer(s) have another scale than this run's options mean, such as "
            f"{name} with {config.scale:g} instead of {lora.layer(name).scale:g}; give --rank {config.rank} "
            f"--alpha {alpha:g} (--alpha-pattern where layers differ)"
        )


def require_known_tokens(model: PreTrainedModel, inputs: Inputs) -> None:
    """Raise DataError for a row with a token that the model has no embedding for."""
    size = model.get_input_embeddings().weight.shape[0]
    for example in [*inputs.examples, *inputs.eval_examples]:
        if max(example.ids) >= size:
            raise DataError(
                f"{example.where}: token {max(example.ids):,} ({inputs.tokenizer.decode([max(example.ids)])!r}) of the "
                f"tokenizer has no embedding in the model, which has {size:,}: leave such text out, or give the model "
                "one with transformers' resize_token_embeddings"
            )


def require_loadable(options: TrainOptions, model: PreTrainedModel, notes: Notes) -> None:
    """Raises ConfigError with every reason and the nearest options that it takes; `model` is without weights."""
    program = options.program
    if program is None:
        return
    kind = model.config.model_type
    if program == "llama.cpp" and kind not in GGUF_MODELS:
        raise ConfigError(
            f"--for llama.cpp: {kind} models are not written as GGUF; expected one of {', '.join(GGUF_MODELS)}"
        )
    if options.method == "full":
        notes.add(f"for {program}: all weights are trained, there is no adapter that it could refuse")
        return
    traits = planned(model, options)
    refusals = refused(program, traits)
    if not refusals:
        how = setting(program, traits)
        notes.add(f"for {program}: it can be loaded{f', {how}' if how else ''}")
        return
    changes = nearest(refusals, options)
    still = refused(program, planned(model, options.model_copy(update=changes)))
    assert not still, still
    reasons = "\n  ".join(refusal.reason for refusal in refusals)
    merged = "" if program != "llama.cpp" else "\nor leave --for out and fold it in: twinlora export --to gguf"
    raise ConfigError(
        f"--for {program}: it could not load what would be trained\n  {reasons}\n"
        f"the nearest that it loads: {_as_flags(changes)}{merged}"
    )


def _as_flags(changes: dict[str, Any]) -> str:
    given = [
        f"--{name.replace('_', '-')} {','.join(value) if isinstance(value, list) else value}"
        for name, value in changes.items()
        if value
    ]
    left = [f"--{name.replace('_', '-')}" for name, value in changes.items() if not value]
    return "; ".join(
        [*([f"without {', '.join(left)}"] if left else []), *([f"with {' '.join(given)}"] if given else [])]
    )

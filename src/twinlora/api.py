"""What `import twinlora` offers, for Python: the same options as on the command line, by the same names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora.adapters import files, hf, init, lora, passport
from twinlora.adapters.hf import without_adapters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import AttachOptions, LoadOptions, TrainOptions, validated
from twinlora.data.collate import PackedCollator, features
from twinlora.data.examples import Advice, encode_rows
from twinlora.data.sources import read_rows
from twinlora.data.template import encode_chat, encode_text
from twinlora.errors import ConfigError
from twinlora.evaluate.opening import open_model
from twinlora.model import generate as decoding
from twinlora.model.fingerprint import fingerprint
from twinlora.model.forward import evaluating
from twinlora.model.load import precision_by_layer, resolve
from twinlora.reporter import ConsoleReporter
from twinlora.train.loop import TrainResult, train

_ADVICE = Advice("give max_length={longest}, or shorten these rows", "mend them, or leave them out")

__all__ = ["PackedCollator", "attach", "encode", "finetune", "generate", "load", "without_adapters"]


def finetune(**options: Any) -> TrainResult:
    """`twinlora train`, from Python: options of TrainOptions. Raises as `train.loop.train` does."""
    return train(validated(TrainOptions, options, where="twinlora.finetune"), ConsoleReporter())


def load(model: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model (directory, GGUF file, hub id) to train, and its tokenizer; options of LoadOptions.

    `precision="nf4"` quantises while loading; `adapter=DIR` continues that one, ready to train and to be saved.
    Raises ConfigError, ModelError, AdapterError.
    """
    o = validated(LoadOptions, {"model": str(model)} | options, where="twinlora.load")
    reporter = ConsoleReporter()
    adapter = files.read_adapter(o.adapter) if o.adapter is not None else None
    opened = open_model(o, {}, precision=o.precision, reporter=reporter)
    base, tokenizer = opened.model, opened.tokenizer
    digests = passport.tokenizer_digests(tokenizer)
    origin = passport.Passport(
        base_model=o.model,
        base_fingerprint=fingerprint(resolve(o.model), reporter.note),
        base_precision=precision_by_layer(base),
        method="qlora" if o.precision == "nf4" else "lora",
        versions=passport.versions(),
        **digests,
    )
    base.twinlora_origin = origin  # the passport of what will be trained on it
    if adapter is not None:
        notes = passport.check(
            adapter.directory,
            fingerprint=origin.base_fingerprint,
            base=o.model,
            precision=origin.base_precision,
            tokenizer=digests,
        )
        for line in notes:
            reporter.note(line)
        files.load_adapter(base, adapter)
        hf.follow_peft(base, origin)
        base.train()
    return base, tokenizer


def attach(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Freeze `model`, put adapters on it as AttachOptions say, and let it save itself as a PEFT directory.

    Returns the same model, in training mode. Raises ConfigError, AdapterError.
    """
    o = validated(AttachOptions, options, where="twinlora.attach")
    lora.attach(model, LoraConfig.from_options(o), seed=o.seed)
    if o.init == "pissa":
        init.pissa(model)
    hf.follow_peft(model, getattr(model, "twinlora_origin", None))
    return model.train()


def encode(
    tokenizer: PreTrainedTokenizerBase, data: str | Path | Sequence[str], max_length: int = 2048
) -> list[dict[str, list[int]]]:
    """The rows of sources as `input_ids` and `labels`, with loss on the answers alone. Raises DataError."""
    return features(encode_rows(tokenizer, read_rows(data), max_length, advice=_ADVICE))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """What the model says to `prompt`: text, or a list of messages. Text is a user's message if there is a template."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template:
        ids = encode_chat(tokenizer, messages)
    elif isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt)
    else:
        raise ConfigError("this model has no chat template: give the prompt as text")
    with evaluating(model):
        (answer,) = decoding.generate(
            model,
            [ids],
            max_new_tokens=max_new_tokens,
            stop=decoding.end_tokens(model, tokenizer),
            temperature=temperature,
            generator=torch.Generator(device=model.device).manual_seed(seed),
        )
    return str(tokenizer.decode(answer, skip_special_tokens=True))

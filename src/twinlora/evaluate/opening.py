"""A base model with adapters, ready to answer: what eval, chat and serve share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora import machine
from twinlora.adapters import files, passport
from twinlora.adapters.bank import AdapterBank, require_switchable
from twinlora.adapters.precision import agreed, read_layers, trained_on
from twinlora.config import ModelOptions
from twinlora.config.values import BasePrecision
from twinlora.model import bnb4, swap
from twinlora.model.fingerprint import fingerprint
from twinlora.model.linear import bits_per_weight
from twinlora.model.load import (
    Source,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    precision_by_layer,
    resolve,
)
from twinlora.numerics.formats import Format, Precision, of_kind
from twinlora.reporter import Reporter

__all__ = ["Opened", "open_model"]

Papers = Mapping[str, passport.Passport | None]


@dataclass
class Opened:
    """The model, its tokenizer, its bank of adapters, their passports by name, and the precision of each layer of the
    base if that was chosen by layer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: AdapterBank
    passports: dict[str, passport.Passport | None]
    layers: Mapping[str, str] | None


def open_model(
    options: ModelOptions,
    adapters: dict[str, Path],
    *,
    precision: BasePrecision,
    reporter: Reporter,
    layer_precision: Path | None = None,
    papers: Papers | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Opened:
    """Load the base and every adapter, check their passports, activate the first; `tokenizer` if it is loaded already.

    `precision` auto follows the first of `papers`, by default the passports of `adapters`: each layer as in training if
    that was chosen layer by layer, else the one format it was trained on. hybrid is the precision of each layer on
    which all of `papers` agree. `layer_precision` says it instead. Raises ConfigError, ModelError, AdapterError.
    """
    machine.keep_freed_memory()
    read = {name: files.read_adapter(path) for name, path in adapters.items()}
    for adapter in read.values():
        require_switchable(adapter)
    passports = {name: passport.read(adapter.directory) for name, adapter in read.items()}
    source = resolve(options.model)
    identity = fingerprint(source, reporter.note) if read else ""
    if tokenizer is None:
        tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    digests = passport.tokenizer_digests(tokenizer)
    for name, paper in passports.items():
        if paper is not None:
            passport.require_base(read[name].directory, paper, fingerprint=identity, base=options.model)
            passport.check_tokenizer(read[name].directory, paper, digests)  # its lines come again from `check`
    if layer_precision is not None:
        quantize: Precision | None = read_layers(layer_precision)
    else:
        quantize = _quantize(options, precision, passports if papers is None else papers)
    dtype = "bfloat16" if precision == "bf16" else options.dtype
    model = _load(options, source, quantize, dtype, reporter)
    stored = precision_by_layer(model)
    layers = None if quantize is None or isinstance(quantize, Format) else quantize
    if layers is not None:
        bits = bits_per_weight(model)[0]
        reporter.note(f"base: {passport.described(stored)}; {bits:.3f} bits per weight of the linear layers")
    bank = AdapterBank(model)
    for name, adapter in read.items():
        for line in passport.check(
            adapter.directory,
            fingerprint=identity,
            base=options.model,
            precision=stored,
            layers=layers,
            tokenizer=digests,
        ):
            reporter.note(line)
        bank.add(name, adapter)
    swap.replace_blocks(model, reporter.note)
    bank.use(next(iter(read), None))
    return Opened(model, tokenizer, bank, passports, layers)


def _load(
    options: ModelOptions, source: Source, quantize: Precision | None, name: str, reporter: Reporter
) -> PreTrainedModel:
    """The base, computing in the type `name`."""
    device = pick_device(options.device)
    dtype, reason = pick_dtype(name, device)
    if reason:
        reporter.note(reason)
    model = load_model(
        source, quantize=quantize, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code
    )
    if quantize is None and not source.is_gguf and bnb4.is_stored(source.path, source.given):
        reporter.note("the base's 4-bit weights were dequantised; --precision nf4 computes with them as they are")
    return model


def _quantize(options: ModelOptions, precision: BasePrecision, papers: Papers) -> Precision | None:
    """What `load_model` is told."""
    if precision in ("16bit", "bf16"):
        return None
    if precision == "hybrid":
        return agreed(papers)
    if precision == "auto":
        name, paper = next(iter(papers.items()), ("", None))
        return trained_on(paper, name)
    return of_kind(precision, options.block_size, double_quant=options.double_quant)

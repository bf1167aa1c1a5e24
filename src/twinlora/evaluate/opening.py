"""A base model with adapters, ready to answer: what eval and chat share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora import machine
from twinlora.adapters import files, passport
from twinlora.adapters.bank import AdapterBank
from twinlora.config import ModelOptions
from twinlora.model import bnb4, swap
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import load_model, load_tokenizer, pick_device, pick_dtype, precision_by_layer, resolve
from twinlora.model.quantizer import nf4_of
from twinlora.numerics.formats import Format
from twinlora.reporter import Reporter

__all__ = ["Opened", "open_model"]


@dataclass
class Opened:
    """The model, its tokenizer, its bank of adapters, and their passports by name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: AdapterBank
    passports: dict[str, passport.Passport | None]


def open_model(
    options: ModelOptions,
    adapters: dict[str, Path],
    *,
    precision: Literal["16bit", "nf4", "auto"],
    reporter: Reporter,
    origin: passport.Passport | None = None,
) -> Opened:
    """Load the base and every adapter, check their passports, activate the first.

    `precision` auto follows `origin`, by default the first adapter's passport: each layer as in training if that was
    chosen layer by layer, NF4 if it was trained on NF4. Raises ModelError, AdapterError.
    """
    machine.keep_freed_memory()
    source = resolve(options.model)
    read = {name: files.read_adapter(path) for name, path in adapters.items()}
    passports = {name: passport.read(adapter.directory) for name, adapter in read.items()}
    quantize = _quantize(options, precision, origin or next(iter(passports.values()), None))
    identity = fingerprint(source) if read else ""
    device = pick_device(options.device)
    dtype, reason = pick_dtype(options.dtype, device)
    if reason:
        reporter.note(reason)
    model = load_model(
        source,
        quantize=quantize,
        dtype=dtype,
        device=device,
        trust_remote_code=options.trust_remote_code,
    )
    if quantize is None and not source.is_gguf and bnb4.is_stored(source.path, source.given):
        reporter.note("the base's 4-bit weights were dequantised; --precision nf4 computes with them as they are")
    stored = precision_by_layer(model)
    layers = None if quantize is None or isinstance(quantize, Format) else quantize
    bank = AdapterBank(model)
    for name, adapter in read.items():
        for line in passport.check(
            adapter.directory, fingerprint=identity, base=options.model, precision=stored, layers=layers
        ):
            reporter.note(line)
        bank.add(name, adapter)
    swap.replace_blocks(model, reporter.note)
    bank.use(next(iter(read), None))
    return Opened(model, load_tokenizer(source, trust_remote_code=options.trust_remote_code), bank, passports)


def _quantize(
    options: ModelOptions, precision: Literal["16bit", "nf4", "auto"], origin: passport.Passport | None
) -> Format | dict[str, str] | None:
    """What `load_model` is told; `origin` is what auto follows."""
    if precision == "auto" and origin is not None and origin.layer_precision is not None:
        return origin.layer_precision
    quantised = origin is not None and any(key.startswith("nf4") for key in origin.base_precision)
    if precision == "nf4" or (precision == "auto" and quantised):
        return nf4_of(options)
    return None

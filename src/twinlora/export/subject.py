"""What is to be shipped: an adapter, the base it belongs to, and the rows on which the two are compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora.adapters import files, passport
from twinlora.adapters.deploy import Storage, deploy
from twinlora.adapters.merge import Merged
from twinlora.adapters.precision import trained_on
from twinlora.adapters.read import AdapterFile
from twinlora.config import ArtefactOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row
from twinlora.data.template import Example
from twinlora.errors import ConfigError, DataError
from twinlora.export.merged import generation_values
from twinlora.export.probes import Probe, probes_of
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import Source, load_model, load_tokenizer, resolve
from twinlora.numerics.formats import Precision, is_format
from twinlora.reporter import Reporter

__all__ = ["Subject", "open_subject"]

_MAX_LENGTH = 2048


@dataclass
class Subject:
    """Everything about a trained model but its weights. `trained_on`: the format of its base, by layer
    where they differ, None for 16 bit."""

    options: ArtefactOptions
    source: Source
    adapter: AdapterFile | None
    passport: passport.Passport | None
    trained_on: Precision | None
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    digests: dict[str, str]  # of the deployed layers, by run.json

    @property
    def deployed(self) -> Storage | None:
        """The format with whose rounding it was trained."""
        return Storage(self.passport.deploy) if self.passport and self.passport.deploy else None

    def merged(self, quantized: Precision | None) -> Merged:
        """The tensors with the adapter folded in."""
        return Merged(self.checkpoint, self.adapter, quantized, self._rounded)

    @property
    def _rounded(self) -> torch.dtype | None:
        """The type that the base was rounded to while training counted on its bits."""
        if self.deployed is None or self.passport is None:
            return None
        names = [name for name in self.passport.base_precision if not is_format(name)]
        return getattr(torch, names[0]) if names else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base's tensors."""
        return Checkpoint(self.source, trust_remote_code=self.options.trust_remote_code)

    @property
    def formats(self) -> str:
        """The names of the formats that its base was trained in."""
        return ", ".join(name for name in (self.passport.base_precision if self.passport else ()) if is_format(name))

    @property
    def name(self) -> str:
        """What the artefact is called."""
        path = self.options.run.resolve()
        return path.parent.name if path.name in ("adapter", "model") else path.name

    @cached_property
    def examples(self) -> list[Example]:
        """The rows as tokens; those that are too long are cut."""
        return encode_rows(self.tokenizer, self.rows, _MAX_LENGTH, overlong="truncate", allow_untrained=True)

    @cached_property
    def probes(self) -> list[Probe]:
        """What is asked."""
        return probes_of(self.examples)

    @property
    def stop(self) -> set[int]:
        """Tokens that end an answer."""
        ends = generation_values(self.source, self.checkpoint.config, self.tokenizer)["eos_token_id"]
        return set(ends if isinstance(ends, list) else [ends])

    @torch.no_grad()
    def model(self, quantized: Precision | None) -> PreTrainedModel:
        """The trained model with its adapter beside the base, which is in 16 bits or `quantized`."""
        model = load_model(
            self.source,
            quantize=quantized,
            dtype=getattr(torch, self.options.dtype),
            trust_remote_code=self.options.trust_remote_code,
        )
        if self.adapter is not None:
            files.load_adapter(model, self.adapter)
        if self.deployed is not None:
            for parameter in model.parameters() if self._rounded else ():
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.copy_(parameter.to(self._rounded))
            deploy(model, self.deployed)
        return model.eval()


def open_subject(options: ArtefactOptions, reporter: Reporter) -> Subject:
    """Read adapter, passport, tokenizer and rows. Raises InputError."""
    if options.output.exists() and not options.overwrite:
        raise ConfigError(f"output {options.output}: exists; give --overwrite to replace it, or another --output")
    record = _record(options.run)
    if (options.run / "model" / "config.json").is_file() or (options.run / "config.json").is_file():
        whole = options.run if (options.run / "config.json").is_file() else options.run / "model"
        source, adapter, paper = resolve(options.model or str(whole)), None, None
    else:
        adapter = files.read_adapter(options.run)
        paper = passport.read(adapter.directory)
        source = resolve(_base_name(options, adapter, paper))
        if paper is not None:
            found = fingerprint(source, reporter.note)
            passport.check(adapter.directory, fingerprint=found, base=source.given, precision=paper.base_precision)
        else:
            reporter.note(f"adapter {options.run}: no passport (not written by twinlora); taken as trained on 16 bit")
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    base = trained_on(paper, str(options.run))
    chooses = options.base == "auto" and base is not None
    rows = _rows(options, record.get("options", {}), reporter) if options.gate or chooses else []
    return Subject(options, source, adapter, paper, base, tokenizer, rows, record.get("deployed", {}))


def _record(run: Path) -> dict[str, Any]:
    """run.json, of the run's directory or of the one above `adapter`."""
    for directory in (run, run.parent):
        if (directory / "run.json").is_file():
            record: dict[str, Any] = json.loads((directory / "run.json").read_text(encoding="utf-8"))
            return record
    return {}


def _base_name(options: ArtefactOptions, adapter: AdapterFile, paper: passport.Passport | None) -> str:
    name = options.model or (paper and paper.base_model) or adapter.options.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"adapter {options.run} names no base model: give --model")
    return str(name)


def _rows(options: ArtefactOptions, used_options: dict[str, Any], reporter: Reporter) -> list[Row]:
    """The rows to compare on: given, or the run's own."""
    given, columns = list(options.data), list(options.columns)
    if not given:
        used = used_options.get("eval") or [sources.split_weight(source)[0] for source in used_options.get("data", [])]
        given = [source for source in used if not sources.is_stream(source)]
        columns = columns or used_options.get("columns", [])
        if not given:
            raise DataError(f"{options.run}: no rows to compare on are known; give some with --data")
        kind = "evaluation" if used_options.get("eval") else "training"
        reporter.note(f"comparing on {kind} rows of the run: {', '.join(given)}")
    try:
        return sources.read(given, columns=columns, limit=options.rows, note=reporter.detail).rows
    except DataError as error:
        hint = "" if options.data else "\nthese are the run's own rows, from where it was started: give --data"
        raise DataError(f"{error}{hint}") from None

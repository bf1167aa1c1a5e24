"""What is to be shipped: an adapter, the base it belongs to, and the rows on which the two are compared."""

from __future__ import annotations

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
from twinlora.adapters.strict import read_json
from twinlora.config import ArtefactOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row
from twinlora.data.template import Example
from twinlora.errors import AdapterError, ConfigError, DataError, ModelError
from twinlora.export.merged import generation_values
from twinlora.export.probes import Probe, probes_of
from twinlora.model.checkpoint import Checkpoint
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import Source, load_model, load_tokenizer, resolve
from twinlora.numerics.formats import Precision, is_format
from twinlora.output import ARTEFACT, require_apart, require_free
from twinlora.reporter import Reporter

__all__ = ["Subject", "find_base", "open_subject"]

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
    reporter: Reporter

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
        """The rows as tokens; those that are too long, also for the model, are cut."""
        most = getattr(self.checkpoint.config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH
        return encode_rows(
            self.tokenizer,
            self.rows,
            min(_MAX_LENGTH, most),
            overlong="truncate",
            allow_untrained=True,
            note=self.reporter.note,
        )

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
    require_free(options.output, options.overwrite, ARTEFACT)
    record = _record(options.run)
    whole, adapter, paper = _whole(options.run), None, None
    if whole is not None:
        if options.model is not None:
            raise ConfigError(f"model {options.model}: {options.run} is a whole model and has no base; leave it out")
        source = resolve(str(whole))
    else:
        _require_finished(options.run)
        adapter = files.read_adapter(options.run)
        paper = passport.read(adapter.directory)
        source = find_base(options.model, adapter, paper)
    require_apart(options.output, [adapter.directory if adapter else source.path, source.path])
    if paper is not None and adapter is not None:
        found = fingerprint(source, reporter.note)
        passport.check(adapter.directory, fingerprint=found, base=source.given, precision=paper.base_precision)
    elif adapter is not None:
        reporter.note(f"adapter {options.run}: no passport (not written by twinlora); taken as trained on 16 bit")
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    if paper is not None and adapter is not None:
        digests = passport.tokenizer_digests(tokenizer)
        for line in passport.check_tokenizer(adapter.directory, paper, digests):
            reporter.note(line)
    base = trained_on(paper, str(options.run))
    chooses = options.base == "auto" and base is not None
    rows = _rows(options, record.get("options", {}), reporter) if options.gate or chooses else []
    deployed = record.get("deployed", {})
    if paper is not None and paper.deploy and not deployed:
        reporter.note(f"{options.run}: no run.json with the digests of what was trained; not compared to the bit")
    return Subject(options, source, adapter, paper, base, tokenizer, rows, deployed, reporter)


def _whole(run: Path) -> Path | None:
    """Where all weights of a model are, if they are there and no adapter is."""
    if (run / files.CONFIG).exists():
        return None
    return next((path for path in (run, run / "model") if (path / "config.json").is_file()), None)


def _require_finished(run: Path) -> None:
    begun = (run / "metrics.jsonl").exists() or (run / "checkpoints").is_dir()
    if begun and not (run / "adapter").exists():
        raise AdapterError(
            f"run {run}: did not finish, and has no adapter yet; continue it with its own command and --resume"
        )


def _record(run: Path) -> dict[str, Any]:
    """run.json of the run, also where `adapter` or `model` in it was given. Raises AdapterError for a damaged one."""
    run = run.resolve()
    path = (run.parent if run.name in ("adapter", "model") else run) / "run.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    record = found.value
    problems = found.problems + [
        f"{key} is no object" for key in ("options", "deployed") if not isinstance(record.get(key, {}), dict)
    ]
    if problems:
        raise AdapterError(f"{path}: damaged ({'; '.join(problems)}); delete it, and name held-out rows with --data")
    return record


def find_base(given: str | None, adapter: AdapterFile, paper: passport.Passport | None) -> Source:
    """The base of `adapter`: `given`, or the one that it names. Raises ConfigError, ModelError."""
    name = given or (paper and paper.base_model) or adapter.options.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"adapter {adapter.directory} names no base model: give --model")
    try:
        return resolve(str(name))
    except ModelError as error:
        if given:
            raise
        raise ModelError(
            f"{error}\nso it stands in {adapter.directory}; if the base has moved, give --model with its place now"
        ) from None


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

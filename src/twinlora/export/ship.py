"""`merge(options)` and `export(options)`: from a run to an artefact that answers as it does, or to none."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twinlora import atomic, machine
from twinlora.adapters import files
from twinlora.adapters.merge import Merged
from twinlora.config import ArtefactOptions, ExportOptions, MergeOptions
from twinlora.errors import AdapterError, BackendError, ParityError
from twinlora.export import bnb, edge, families, readback
from twinlora.export import gguf as gguf_files
from twinlora.export.choose import Choice, choose_base, weight_type
from twinlora.export.deployed import prove, require_match
from twinlora.export.gguf_lora import write_gguf_lora
from twinlora.export.llama_cpp import LlamaCpp
from twinlora.export.merged import save_16bit
from twinlora.export.parity import LIMITS, Limits, Parity, Runtime, compare
from twinlora.export.probes import model_answers
from twinlora.export.stock import Stock
from twinlora.export.subject import Subject, open_subject
from twinlora.model.load import quiet
from twinlora.model.quantizer import nf4_of
from twinlora.numerics.formats import Precision
from twinlora.output import ARTEFACT, claimed
from twinlora.reporter import Reporter

__all__ = ["export", "merge"]


_LIMIT_NAMES = {torch.float32: "float32", torch.float16: "f16", torch.bfloat16: "bf16"}
_PROGRAMS = {"bnb": "bitsandbytes", "peft": "peft", "gguf": "xllamacpp", "gguf-lora": "xllamacpp"}  # by pip's names


@dataclass
class Artefact:
    """Something written, how to run it, how far it may differ, and how to find the tensor that does."""

    run: Callable[[], AbstractContextManager[Runtime]]
    limits: Limits
    differing: Callable[[], str | None]
    facts: dict[str, Any]


def merge(options: MergeOptions, reporter: Reporter | None = None) -> dict[str, Any]:
    """Fold an adapter into its base as a 16-bit checkpoint. Raises InputError, ParityError, BackendError."""
    return _ship(options, "merged", reporter or Reporter())


def export(options: ExportOptions, reporter: Reporter | None = None) -> dict[str, Any]:
    """Write an artefact of any kind. Raises InputError, ParityError, BackendError."""
    _require_program(options)
    if options.to == "bnb":
        nf4_of(options)
    if options.to == "gguf" and options.quant not in gguf_files.OURS:
        gguf_files.find_llama_quantize()
    return _ship(options, options.to, reporter or Reporter())


def _require_program(options: ExportOptions) -> None:
    """Raises BackendError if what the artefact is to run in is not installed."""
    program = _PROGRAMS.get(options.to)
    if program is None or not (options.gate or options.edge) or importlib.util.find_spec(program) is not None:
        return
    raise BackendError(
        f"export --to {options.to} runs the artefact in {program}, which is not installed: pip install {program}, "
        f"or write it unseen with --no-gate{' and without --edge' if options.edge else ''}"
    )


def _ship(options: ArtefactOptions, kind: str, reporter: Reporter) -> dict[str, Any]:
    subject = open_subject(options, reporter)
    if subject.adapter is None and kind in ("peft", "gguf-lora"):
        raise AdapterError(f"{options.run}: all weights were trained, there is no adapter; export --to merged or gguf")
    if subject.deployed is not None:
        require_match(options, subject.deployed)
    if kind in ("gguf", "gguf-lora"):
        families.family_of(subject.checkpoint.config)
    with claimed(options.output, options.overwrite, ARTEFACT):
        quantized, choice = _base_of(subject, kind, reporter)
        with atomic.write_directory(options.output) as directory:
            record = _write(subject, kind, quantized, choice, directory)
    if not options.gate:
        reporter.note("NOT compared with the trained model (--no-gate)")
    return record | {"output": str(options.output), "peak_rss_bytes": machine.peak_rss_bytes()}


def _write(
    subject: Subject, kind: str, quantized: Precision | None, choice: Choice | None, directory: Path
) -> dict[str, Any]:
    """The artefact and its record, in a directory that is removed if anything is wrong with it."""
    options, reporter = subject.options, subject.reporter
    reporter.note(f"writing {kind}: {options.output}")
    artefact = _WRITERS[kind](subject, quantized, directory)
    for line in artefact.facts.get("notes", ()):
        reporter.note(line)
    parity = _gate(subject, quantized, artefact, reporter) if options.gate else None
    record = _record(subject, kind, quantized, choice, artefact, parity)
    if subject.deployed is not None and subject.digests:
        record["deploy"] = prove(subject.merged(quantized), subject.deployed, subject.digests)
    if isinstance(options, ExportOptions) and options.edge:
        record["edge"] = _edge(subject, quantized, directory, options)
    name = "parity.json" if parity else "export.json"
    (directory / name).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _base_of(subject: Subject, kind: str, reporter: Reporter) -> tuple[Precision | None, Choice | None]:
    """The base of the artefact. An adapter that stays one is compared on a base that it will meet: for PEFT the one it
    was trained on, in llama.cpp the 16-bit one, unless `--base` says otherwise."""
    if kind == "peft":
        return (None if subject.options.base == "16bit" else subject.trained_on), None
    if kind == "gguf-lora":
        quantized = subject.trained_on if subject.options.base == "dequantised" else None
        if subject.trained_on is not None and quantized is None:
            reporter.note(f"trained on {subject.formats}; compared on the 16-bit base (--base dequantised)")
        return quantized, None
    return choose_base(subject, reporter)


def _record(
    subject: Subject,
    kind: str,
    quantized: Precision | None,
    choice: Choice | None,
    artefact: Artefact,
    parity: Parity | None,
) -> dict[str, Any]:
    paper = subject.passport
    return {
        "kind": kind,
        "adapter": str(subject.options.run),
        "base_model": subject.source.given,
        "base_fingerprint": paper.base_fingerprint if paper else None,
        "base": "dequantised" if quantized else "16bit",
        "choice": choice.record() if choice else None,
        "parity": asdict(parity) if parity else None,
    } | artefact.facts


def _gate(subject: Subject, quantized: Precision | None, artefact: Artefact, reporter: Reporter) -> Parity:
    """Compare, or raise ParityError, which removes what was written."""
    options = subject.options
    model = subject.model(quantized)
    trained = model_answers(model, subject.probes)
    del model
    limits = artefact.limits
    if options.max_kl is not None:
        wider = (options.max_kl / limits.kl) ** 0.5  # a divergence goes with the square of what log p is off by
        limits = Limits(options.max_kl, limits.log_prob * wider, 0.0, "given by --max-kl")
    reporter.note(f"comparing on {len(subject.probes)} rows, {len(trained)} tokens")
    with artefact.run() as runtime:
        parity = compare(trained, runtime, subject.probes, subject.rows, subject.tokenizer, subject.stop, limits)
    tensor = artefact.differing()
    if parity.passed and tensor is None:
        return parity
    listed = "\n  ".join([*([tensor] if tensor else []), *parity.problems])
    raise ParityError(
        f"{options.output}: in {parity.runtime} it does not answer as the trained model does, and was deleted\n"
        f"  {listed}\nlimits: {limits.reason}; --max-kl sets another one, --no-gate writes it uncompared"
    )


@contextmanager
def _stock(name: str, load: Callable[[], Any], directory: Path | None, subject: Subject) -> Iterator[Runtime]:
    trust = {"trust_remote_code": subject.options.trust_remote_code}
    tokenizer = subject.tokenizer if directory is None else AutoTokenizer.from_pretrained(directory, **trust)
    yield Stock(name, load(), tokenizer, subject.stop if directory is None else None)


def _transformers(directory: Path, subject: Subject, dtype: torch.dtype | None) -> Any:
    trust = subject.options.trust_remote_code
    arguments = {"dtype": dtype or "auto", "trust_remote_code": trust}
    return quiet(AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=directory, **arguments)


def _merged(subject: Subject, quantized: Precision | None, directory: Path) -> Artefact:
    weights = subject.merged(quantized)
    save_16bit(weights, directory, subject.tokenizer, weight_type(subject))
    dtype = getattr(torch, subject.options.dtype)
    return Artefact(
        lambda: _stock("transformers", lambda: _transformers(directory, subject, dtype), directory, subject),
        LIMITS[_LIMIT_NAMES[weight_type(subject)]],
        lambda: readback.checkpoint_difference(directory, weights, trust_remote_code=subject.options.trust_remote_code),
        {"dtype": str(weight_type(subject)).removeprefix("torch.")},
    )


def _bnb(subject: Subject, quantized: Precision | None, directory: Path) -> Artefact:
    options = subject.options
    assert isinstance(options, ExportOptions)
    fmt = nf4_of(options)
    weights = subject.merged(quantized)
    bnb.save_bnb(weights, directory, subject.tokenizer, weight_type(subject), fmt)
    return Artefact(
        lambda: _stock("bitsandbytes", lambda: _transformers(directory, subject, None), directory, subject),
        LIMITS["4bit"],
        lambda: readback.checkpoint_difference(directory, weights, trust_remote_code=subject.options.trust_remote_code),
        {"quant": fmt.name},
    )


def _gguf(subject: Subject, quantized: Precision | None, directory: Path) -> Artefact:
    options = subject.options
    assert isinstance(options, ExportOptions)
    weights = subject.merged(quantized)
    notes = families.caveats(subject.checkpoint.config)
    path = directory / f"{subject.name}-{options.quant}.gguf"
    ours = options.quant in gguf_files.OURS
    written = path if ours else directory / "wide.gguf"
    counts = gguf_files.write_gguf(
        weights, written, subject.tokenizer, quant=options.quant if ours else "bf16", name=subject.name,
        stop=subject.stop,
    )  # fmt: skip
    if not ours:
        gguf_files.llama_quantize(written, path, options.quant)
        written.unlink()
    return Artefact(
        lambda: LlamaCpp(path, context=_context(subject)),
        LIMITS.get(options.quant, LIMITS["4bit"]),
        lambda: readback.gguf_difference(path, weights),
        {"quant": options.quant, "tensors": counts if ours else None, "bytes": path.stat().st_size, "notes": notes},
    )


def _gguf_lora(subject: Subject, quantized: Precision | None, directory: Path) -> Artefact:
    options, adapter = subject.options, subject.adapter
    assert isinstance(options, ExportOptions)
    assert adapter is not None
    path = directory / f"{subject.name}-lora.gguf"
    write_gguf_lora(adapter, subject.checkpoint.config, path, subject.name)

    @contextmanager
    def run() -> Iterator[Runtime]:
        with tempfile.TemporaryDirectory(prefix=".base.", dir=directory) as scratch:
            base = Path(scratch) / "base.gguf"
            bare = Merged(subject.checkpoint, None, quantized)
            gguf_files.write_gguf(
                bare, base, subject.tokenizer, quant=options.quant, name=subject.source.given, stop=subject.stop
            )
            with LlamaCpp(base, lora=path, context=_context(subject)) as running:
                yield running

    limits = LIMITS.get(options.quant, LIMITS["4bit"])
    differing = lambda: readback.gguf_lora_difference(path, adapter, subject.checkpoint.config)  # noqa: E731
    return Artefact(run, limits, differing, {"base_quant": options.quant, "bytes": path.stat().st_size})


def _peft(subject: Subject, quantized: Precision | None, directory: Path) -> Artefact:
    adapter = subject.adapter
    assert adapter is not None
    for file in adapter.directory.iterdir():
        if file.name in (files.CONFIG, files.WEIGHTS, "twinlora.json"):
            shutil.copyfile(file, directory / file.name)

    def load() -> Any:
        from peft import PeftModel

        with tempfile.TemporaryDirectory(prefix=".base.", dir=directory) as scratch:
            bare = Merged(subject.checkpoint, None, quantized)
            save_16bit(bare, Path(scratch), subject.tokenizer, torch.float32)
            base = _transformers(Path(scratch), subject, getattr(torch, subject.options.dtype))
        return PeftModel.from_pretrained(base, directory)

    return Artefact(lambda: _stock("peft", load, None, subject), LIMITS["float32"], lambda: None, {})


_WRITERS: dict[str, Callable[[Subject, Precision | None, Path], Artefact]] = {
    "merged": _merged,
    "bnb": _bnb,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "peft": _peft,
}


def _context(subject: Subject) -> int:
    return max(512, 64 + max(len(probe.ids) for probe in subject.probes)) if subject.options.gate else 512


def _edge(subject: Subject, quantized: Precision | None, directory: Path, options: ExportOptions) -> dict[str, Any]:
    """The artefact beside the same model in F16."""
    ids = subject.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    path = next(directory.glob("*.gguf"))
    found = {options.quant: edge.measure(path, ids)}
    if options.quant != "f16":
        with tempfile.TemporaryDirectory(prefix=".f16.", dir=directory) as scratch:
            wide = Path(scratch) / "f16.gguf"
            weights = subject.merged(quantized)
            gguf_files.write_gguf(weights, wide, subject.tokenizer, quant="f16", name=subject.name, stop=subject.stop)
            found["f16"] = edge.measure(wide, ids)
    return {"measured": found, "phones": edge.phones(path.stat().st_size)}

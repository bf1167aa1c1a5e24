"""New adapters of old ones, on disk: read, checked to belong together, written with a passport, measured on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinlora.adapters import combine as factors
from twinlora.adapters import files, passport
from twinlora.adapters.read import AdapterFile
from twinlora.config import AdapterCombineOptions, AdapterCompressOptions, EvalOptions, RankOptions
from twinlora.errors import AdapterError, ConfigError
from twinlora.evaluate.evaluate import evaluate
from twinlora.export.subject import find_base
from twinlora.output import ADAPTER, claimed, require_apart, require_free
from twinlora.reporter import Reporter

__all__ = ["combine", "compress"]


def combine(options: AdapterCombineOptions, reporter: Reporter | None = None) -> dict[str, Any]:
    """Several adapters as one. Raises AdapterError if they do not belong together or cannot be combined."""
    adapters = _opened(options.adapters, options)
    weights = options.weights or [1.0] * len(adapters)
    found = factors.combine(
        adapters, weights, options.method, rank=options.rank, density=options.density, seed=options.seed
    )
    result = _save_and_measure(options, options.adapters, adapters, found, f"combined ({options.method})", reporter)
    return result | {"method": options.method, "weights": weights}


def compress(options: AdapterCompressOptions, reporter: Reporter | None = None) -> dict[str, Any]:
    """An adapter in a lower rank. Raises AdapterError for one that has no rank to cut, ConfigError for one no lower."""
    adapters = _opened([options.directory], options)
    highest = max((config.rank for config in adapters[0].configs.values()), default=0)
    if options.rank >= highest > 0:
        raise ConfigError(f"rank {options.rank}: {options.directory} has rank {highest}; give a lower one")
    found = factors.compress(adapters[0], options.rank)
    how = f"compressed to rank {options.rank}"
    result = _save_and_measure(options, [options.directory], adapters, found, how, reporter)
    return result | {"energy_lost": factors.energy_lost(adapters[0], found)}


def _opened(paths: list[Path], options: RankOptions) -> list[AdapterFile]:
    require_free(options.output, options.overwrite, ADAPTER)
    adapters = [files.read_adapter(path) for path in paths]
    require_apart(options.output, [adapter.directory for adapter in adapters])
    return adapters


def _save_and_measure(
    options: RankOptions,
    given: list[Path],
    adapters: list[AdapterFile],
    found: dict[str, factors.Factors],
    how: str,
    reporter: Reporter | None,
) -> dict[str, Any]:
    """Ranks, sizes, and with rows the loss of each adapter that was given, before anything is written, and of the new
    one."""
    reporter = reporter or Reporter()
    papers = [passport.read(adapter.directory) for adapter in adapters]
    _note_other_bases(adapters, papers, reporter)
    paper = _passport(adapters, papers, how)
    with claimed(options.output, options.overwrite, ADAPTER):
        losses = {str(path): _loss(options, path, reporter) for path in given} if options.data else {}
        _save(options, adapters, found, paper)
    if options.data:
        losses[str(options.output)] = _loss(options, options.output, reporter)
    return {
        "adapter": str(options.output),
        "layers": len(found),
        "ranks": sorted({len(a) for a, _ in found.values()}),
        "parameters": sum(t.numel() for pair in found.values() for t in pair),
        "losses": losses,
    }


def _save(
    options: RankOptions,
    adapters: list[AdapterFile],
    found: dict[str, factors.Factors],
    paper: passport.Passport | None,
) -> None:
    base = options.model or str(adapters[0].options.get("base_model_name_or_path") or "")
    targets = [adapter.options.get("target_modules") for adapter in adapters]
    kinds = sorted({kind for several in targets if isinstance(several, list) for kind in several})
    listed = kinds if all(isinstance(several, list) for several in targets) else sorted(found)
    files.save_factors(options.output, found, listed, base, paper)


def _note_other_bases(adapters: list[AdapterFile], papers: list[passport.Passport | None], reporter: Reporter) -> None:
    """Say so where adapters name different bases, and one has no passport that would tell whether they are the same."""
    named = {a.directory: a.options.get("base_model_name_or_path") for a in adapters}
    if None in papers and len({base for base in named.values() if base}) > 1:
        listed = "\n  ".join(f"{directory}: {base or 'not named'}" for directory, base in named.items())
        reporter.note(
            f"the adapters name different base models, and not all have a passport that could be compared\n  {listed}\n"
            "what is combined of them is right only if these are one base under several names"
        )


def _passport(
    adapters: list[AdapterFile], papers: list[passport.Passport | None], how: str
) -> passport.Passport | None:
    """The first one's, where all agree on what counts; None if one has none."""
    known = [paper for paper in papers if paper is not None]
    for key, what in (("base_fingerprint", "other base models"), ("base_precision", "bases of other precision"),
                      ("layer_precision", "layers of other precision"),
                      ("tokenizer_sha256", "other tokenizers"), ("chat_template_sha256", "other chat templates"),
                      ("deploy", "other deployments")):  # fmt: skip
        values = {str(getattr(paper, key)) for paper in known}
        if len(values) > 1:
            named = "\n  ".join(f"{a.directory}: {getattr(p, key)}" for a, p in zip(adapters, papers, strict=True) if p)
            raise AdapterError(
                f"the adapters were trained with {what} ({key})\n  {named}\n"
                f"give adapters that agree in it, or delete their {passport.FILE} if you know better"
            )
    if len(known) < len(papers):
        return None
    if known[0].deploy:
        raise AdapterError(
            f"{adapters[0].directory}: trained to be deployed as {known[0].deploy}; another update would be rounded "
            "otherwise than it was trained"
        )
    systems = {paper.system for paper in known}
    data = {name: digest for paper in known for name, digest in paper.data_sha256.items()}
    changes = {"method": how, "steps": None, "seed": None, "data_sha256": data, "versions": passport.versions()}
    return known[0].model_copy(update=changes | {"system": systems.pop() if len(systems) == 1 else None})


def _loss(options: RankOptions, path: Path, reporter: Reporter | None) -> float:
    """Held-out loss of an adapter on its base."""
    adapter = files.read_adapter(path)
    base = find_base(options.model, adapter, passport.read(adapter.directory))
    asked = EvalOptions(
        model=base.given, adapter=path, data=options.data, columns=options.columns, rows=options.rows, metric=["loss"]
    )
    loss: float = evaluate(asked, reporter)["loss"]
    return loss

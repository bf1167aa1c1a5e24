"""`twinlora adapter inspect`."""

from __future__ import annotations

import dataclasses
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from twinlora.cli.console import carry_out, figures_table, out
from twinlora.config import AdapterInspectOptions, ModelOptions
from twinlora.reporter import Reporter

if TYPE_CHECKING:
    from twinlora.adapters.inspect import Inspection, Layer
    from twinlora.adapters.read import AdapterFile


def run(options: AdapterInspectOptions) -> None:
    """Print what the adapter is and, with a model, what it does to it."""
    carry_out(options, _inspect, _show, _document)


def _inspect(options: AdapterInspectOptions, reporter: Reporter) -> tuple[Inspection, float | None]:
    from twinlora.adapters.inspect import inspect
    from twinlora.adapters.read import read_adapter

    adapter = read_adapter(options.directory)
    return inspect(adapter), None if options.model is None else _effect(adapter, options.model, reporter)


def _document(inspected: tuple[Inspection, float | None]) -> dict[str, Any]:
    found, kl = inspected
    passport = found.passport.model_dump(mode="json") if found.passport else None
    return dataclasses.asdict(found) | {"mean_kl": kl, "passport": passport}


def _show(inspected: tuple[Inspection, float | None]) -> None:
    found, kl = inspected
    for title, text in _facts(found, kl):
        out.print(Text.assemble((f"{title:<9} ", "dim"), text))
    out.print()
    if found.layers:
        out.print(_norms(found.layers))
        out.print()
    width = max(len(loader.name) for loader in found.loaders)
    for loader in found.loaders:
        sign = ("yes", "green") if loader.loads else ("no", "red")
        detail = f"{' ' * (5 - len(sign[0]))}{loader.detail}" if loader.detail else ""
        out.print(Text.assemble((f"{loader.name:<{width}}  ", "dim"), sign, detail))


def _effect(adapter: AdapterFile, name: str, reporter: Reporter) -> float:
    """Mean KL on the model `name`, in the precision that the adapter was trained on. Raises if it does not fit."""
    from twinlora.adapters import files, passport
    from twinlora.evaluate.effect import mean_kl
    from twinlora.evaluate.opening import open_model
    from twinlora.model.fingerprint import fingerprint
    from twinlora.model.load import precision_by_layer, resolve

    origin = passport.read(adapter.directory)
    papers = {str(adapter.directory): origin}
    opened = open_model(ModelOptions(model=name), {}, precision="auto", reporter=reporter, papers=papers)
    notes = passport.check(
        adapter.directory,
        fingerprint=fingerprint(resolve(name), reporter.note),
        base=name,
        precision=precision_by_layer(opened.model),
        layers=opened.layers,
        tokenizer=passport.tokenizer_digests(opened.tokenizer),
    )
    for line in notes:
        reporter.note(line)
    return mean_kl(opened.model, opened.tokenizer, lambda: files.load_adapter(opened.model, adapter))


def _facts(found: Inspection, kl: float | None) -> list[tuple[str, str]]:
    ranks = sorted({layer.rank for layer in found.layers})
    scales = sorted({layer.scale for layer in found.layers})
    kind = "DoRA" if found.dora else "rsLoRA" if found.rslora else "LoRA"
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in found.layers))
    lines = [("adapter", found.directory)]
    if found.layers:
        lines.append(("kind", f"{kind}, rank {_span(ranks)}, scale {_span(scales)}"))
        lines.append(("targets", f"{', '.join(kinds)} ({len(found.layers)} layers)"))
    if found.modules:
        lines.append(("whole", ", ".join(f"{name} ({_count(n)})" for name, n in found.modules.items())))
    lines.append(
        ("size", f"{_count(found.parameters)} parameters, {_megabytes(found.bytes)}, {', '.join(found.dtypes)}")
    )
    lines.append(("base", found.base_model or "not named"))
    passport = found.passport
    if passport is None:
        lines.append(("passport", "none: not written by twinlora, so its base cannot be checked"))
    else:
        base = ", ".join(f"{n} layers {name}" for name, n in passport.base_precision.items())
        steps = "" if passport.steps is None else f", {passport.steps} steps"
        version = passport.versions.get("twinlora", "?")
        lines.append(
            (
                "passport",
                f"{passport.method} on {base}{steps}, weights {passport.base_fingerprint[:12]}, twinlora {version}",
            )
        )
    if found.does_nothing:
        lines.append(("effect", "does nothing: every update B·A is zero"))
    elif kl is not None:
        lines.append(("effect", f"mean KL {kl:.3g} nats from the base, over the tokens of five fixed prompts"))
    return lines


def _span(values: list[int] | list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _norms(layers: list[Layer]) -> Table:
    """A line for each kind of layer: the median, and the range of the update."""
    table = figures_table("norms", "layers", "rank", "|A|", "|B|", "|scale · B·A|", "least", "most")
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    for kind, group in kinds.items():
        updates = [layer.update_norm for layer in group]
        a, b = median(layer.a_norm for layer in group), median(layer.b_norm for layer in group)
        figures = [f"{value:.3g}" for value in (a, b, median(updates), min(updates), max(updates))]
        table.add_row(kind, str(len(group)), _span(sorted({layer.rank for layer in group})), *figures)
    return table

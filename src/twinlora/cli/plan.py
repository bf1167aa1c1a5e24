"""`twinlora plan`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from twinlora.cli.console import as_typed, carry_out, figures_table, out, print_json, print_table, print_wide
from twinlora.config import PlanOptions
from twinlora.errors import ConfigError
from twinlora.reporter import ConsoleReporter, Reporter

if TYPE_CHECKING:
    from twinlora.plan.answer import Plan
    from twinlora.plan.rows import Row
    from twinlora.plan.score import Past

_FITS = {"fits": "green", "tight": "yellow", "does not fit": "red"}
_LABEL = 9  # columns
_NARROWEST = 80  # columns that the tables need


def run(options: PlanOptions) -> None:
    """Show the score, or calibrate and plan, whatever was asked."""
    if options.score:
        carry_out(options, _past_runs, _show_score, _score_document)
    if options.calibrate:
        _calibrate(options)
    if options.model:
        from twinlora.plan.answer import plan

        carry_out(options, plan, _show_plan, lambda found: found.document())


def _calibrate(options: PlanOptions) -> None:
    from twinlora.model.load import pick_device
    from twinlora.plan import calibrate
    from twinlora.plan.devices import DEVICES
    from twinlora.plan.speed import computes

    if options.device in DEVICES:
        raise ConfigError(f"--calibrate measures this machine, not {options.device!r}: leave one of them out")
    device, reporter = pick_device(options.device), ConsoleReporter()
    try:
        rates = calibrate.calibrate(device, reporter)
    finally:
        reporter.close()
    name = calibrate.hardware(device)
    if options.json_output and not options.model:
        found = {"hardware": name, "source": rates.source, "overhead_seconds": rates.overhead}
        every = {**rates.sorts, **rates.operations}
        print_json(found | {"cost_seconds": {call: asdict(cost) for call, cost in every.items()}})
        return
    reporter.note(f"rates of {name} are kept; {rates.overhead * 1e6:.1f} µs around a call; large ones:")
    for call, cost in rates.sorts.items():
        if (computes(call) or call == "copy") and (cost.flop or cost.byte):
            seconds, unit = (cost.flop, "GFLOP/s") if cost.flop else (cost.byte, "GB/s")
            reporter.note(f"  {call:<22} {1e-9 / seconds:8,.0f} {unit}")


def _past_runs(options: PlanOptions, reporter: Reporter) -> list[Past]:
    from twinlora.plan import score

    return score.read(reporter.note)


def _score_document(runs: list[Past]) -> dict[str, Any]:
    from twinlora.plan import score

    return {
        "history": None if (file := score.history_file()) is None else str(file),
        "score": score.summary(runs),
        "runs": [run.model_dump() for run in runs],
    }


def _show_score(runs: list[Past]) -> None:
    from twinlora.plan import score

    if not runs:
        file = score.history_file()
        empty = f"no runs yet in {file}: each `twinlora train` adds one"
        out.print("no history is kept (TWINLORA_HISTORY=off)" if file is None else empty, markup=False)
        return
    print_table(_history(runs))
    for name, of in score.summary(runs).items():
        out.print(f"\n{name}: {of['runs']} run(s), median error", markup=False)
        time, corrected = (_percent(of[key]) for key in ("time", "time_corrected"))
        out.print(f"  peak {_percent(of['peak'])}; time {time}, corrected by the other runs {corrected}")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _history(runs: list[Past]) -> Table:
    titles = ("run", "model", "method", "peak GiB", "measured", "off", "s/step", "measured", "off")
    table = figures_table(*titles, words=("model", "method"), gap=2)
    for run in runs[-30:]:
        predicted, time = run.predicted_step_seconds, run.time_ratio
        table.add_row(
            run.when[:16],
            run.model[-24:],
            run.method + (" ckpt" if run.checkpointing else ""),
            f"{run.predicted_peak_bytes / 2**30:.2f}",
            f"{run.measured_peak_bytes / 2**30:.2f}",
            f"{100 * (1 / run.peak_ratio - 1):+.1f} %",
            "–" if predicted is None else f"{predicted:.3f}",
            f"{run.measured_step_seconds:.3f}",
            "–" if time is None else f"{100 * (1 / time - 1):+.1f} %",
        )
    return table


def _show_plan(found: Plan) -> None:
    width = max(_NARROWEST, out.width)
    print_wide(show(found, width), width)
    if found.command:
        out.print()
        out.print(as_typed(found.command), style="cyan", markup=False)  # on one line, to be copied


def show(plan: Plan, width: int) -> Group:
    """The whole answer, for a terminal of `width` columns; 80 are enough."""
    from twinlora.plan.words import runner_up

    parts: list[Table | Text | Padding] = [
        _head(plan),
        Text(),
        _ways(plan, width),
        Text(),
        _causes(plan, width),
        Text(),
    ]
    first, second = plan.sentences
    parts += [Text(first, style="bold"), Text(second), Text()]
    second_best = runner_up(plan.choice)
    if second_best:
        parts.append(_lines("runner-up", [second_best]))
    if plan.change_lines:
        parts.append(_lines("changes", plan.change_lines))
    parts.append(_lines("expected", _expectations(plan)))
    if plan.claims:
        parts.append(_lines("often said", plan.claims))
    notes = [plan.left_out] if plan.left_out else []
    notes += plan.notes
    notes += [f"* {_name(row)} needs {row.way.needs}" for row in plan.rows if row.way.needs]
    if notes:
        parts.append(_lines("notes", notes))
    return Group(*parts)


def _lines(label: str, lines: list[str]) -> Table:
    """Lines beside a label, wrapped under each other."""
    return _labelled([("" if number else label, line) for number, line in enumerate(lines)])


def _labelled(lines: Iterable[tuple[str, str]]) -> Table:
    """Each line beside its label."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(style="dim", width=_LABEL + 1, no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in lines:
        table.add_row(label, Text(line))
    return table


def _head(plan: Plan) -> Table:
    work, planned = plan.workload, plan.planned
    size = plan.ways[0].parameters
    checkpoint = f", {planned.checkpoint_bytes / 1e9:,.1f} GB on disk" if planned.checkpoint_bytes else ""
    data = (
        f"{work.rows:,} rows, {work.tokens:,} tokens, longest {work.longest:,}, {len(work.batches):,} steps"
        if work.from_data
        else f"none; {work.rows:,} rows of {work.longest:,} tokens, {len(work.batches):,} steps "
        "(--data, --rows, --length)"
    )
    count = f"{size / 1e9:,.2f} B" if size >= 1e9 else f"{size / 1e6:,.0f} M"
    stored = ", in 4 bits (bitsandbytes NF4)" if planned.nf4 is not None else ""
    lines = {
        "model": f"{planned.given}, {count} parameters{stored}{checkpoint}; {planned.origin}",
        "device": f"{plan.device.name}, {_memory(plan)}",
        "data": data,
        "goal": plan.options.goal,
    }
    return _labelled(lines.items())


def _gap(width: int) -> int:
    """Blanks between columns: few on a narrow terminal."""
    return 1 if width < 100 else 3


def _memory(plan: Plan) -> str:
    from twinlora.plan.words import gib

    if plan.options.memory is not None:
        return f"{gib(plan.memory)} as given"
    return f"{gib(plan.memory)} free" if plan.device.date == "now" else gib(plan.memory)


def _ways(plan: Plan, width: int) -> Table:
    """A row for each way."""
    titles = ("way", "in memory?", "peak", "micro×n", "ckpt", "tokens/s", "time", "disk", "quality")
    table = figures_table(*titles, words=("in memory?", "ckpt"), gap=_gap(width))
    for row in plan.rows:
        setting, chosen = row.setting, row is plan.choice.row and plan.choice.method is not None
        speed = row.tokens_per_second
        table.add_row(
            Text(("▸ " if chosen else "  ") + _name(row), style="bold" if chosen else ""),
            Text(row.fit + ("*" if row.way.needs else ""), style=_FITS[row.fit]),
            f"{row.peak / 2**30:,.1f}",
            f"{setting.micro_batch_tokens:,}×{setting.micro_batches}",
            "on" if setting.checkpointing else "off",
            "–" if speed is None else f"{speed:,.0f}",
            "–" if row.seconds is None else _time(row.seconds),
            _disk(row.way.disk_bytes),
            _quality(row),
            style="" if row.fit != "does not fit" else "dim",
        )
    return table


def _name(row: Row) -> str:
    names = {"full": "full", "lora": f"LoRA {row.way.bits:.0f}-bit", "int8": "LoRA int8", "qlora": "QLoRA"}
    return names.get(row.method) or f"hybrid {row.bits:.2g}"


def _time(seconds: float) -> str:
    """In six columns."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}" if unit != "min" else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _disk(size: float) -> str:
    """In seven columns."""
    number, unit = (size / 1e12, "TB") if size >= 1e12 else (size / 1e9, "GB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.1f} {unit}"


def _quality(row: Row) -> str:
    points = row.way.expected.points
    return "?" if points is None else "±0" if points == 0 else f"{points:+.1f}"


def _causes(plan: Plan, width: int) -> Table:
    """The peaks by cause, in GiB."""
    table = figures_table("peak by cause, GiB", *map(_name, plan.rows), gap=_gap(width))
    table.columns[0].style = "dim"
    causes = dict.fromkeys(cause for row in plan.rows for cause, size in row.by_cause.items() if size)
    for cause in causes:
        table.add_row(cause, *(_gib(row.by_cause.get(cause, 0)) for row in plan.rows))
    table.add_row(Text("needed, with reserve"), *(_gib(row.needed) for row in plan.rows), style="bold")
    return table


def _gib(size: int) -> str:
    return "–" if not size else f"{size / 2**30:,.1f}" if size >= 2**30 else f"{size / 2**30:.2f}"


def _expectations(plan: Plan) -> list[str]:
    """Where the column of quality comes from."""
    lines = ["quality: points against LoRA over a 16-bit base, by the source's own score"]
    for row in plan.rows:
        known = row.way.expected
        if row.method != "lora" and row.fit != "does not fit":
            interval = "" if known.low is None else f" ({known.low:+.1f} to {known.high:+.1f})"
            lines.append(f"{_name(row)} {_quality(row)}{interval}: {known.source}")
    return lines

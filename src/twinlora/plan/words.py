"""A plan in words: the recommendation in two sentences, the runner-up, what would change it, the command to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from twinlora.config import Goal, PlanOptions, TrainOptions, unused_by
from twinlora.plan.advise import Change, Choice
from twinlora.plan.quality import SAME_POINTS
from twinlora.plan.rows import Row

__all__ = ["change_lines", "command", "duration", "gib", "memory_note", "runner_up", "sentences"]

_GIB = 2**30
_DEFAULTS = PlanOptions(model="any")
# What `twinlora train` takes as it was given to the plan.
_PASSED_ON = [
    name for name in PlanOptions.model_fields
    if name in TrainOptions.model_fields
    and name not in ("model", "data", "device", "micro_batch_tokens", "memory", "goal", "json_output")
]  # fmt: skip


def _title(method: str, bits: float) -> str:
    """What a way is called; `bits` are those of a weight of its base."""
    names = {"full": "full fine-tuning", "lora": f"LoRA in {bits:.0f} bit", "int8": "LoRA over int8", "qlora": "QLoRA"}
    return names.get(method) or (f"hybrid at {bits:.2g} bits" if bits < 10 else f"hybrid at {bits:.0f} bits")


def _name(row: Row) -> str:
    return _title(row.method, row.bits)


def gib(size: float) -> str:
    """A size of memory."""
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB else f"{size / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """`2 h 10 min`, `3 d 4 h`, `45 s`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 2:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def sentences(choice: Choice, rows: Sequence[Row], goal: Goal) -> tuple[str, str]:
    """Which way and why; then what it means for this run."""
    row = choice.row
    if choice.method is None:
        return (
            f"Nothing fits into {gib(row.memory)}: the least is {_name(row)} with {gib(row.needed)} (peak "
            f"{gib(row.peak)} and {100 * row.reserve:.0f} % reserve).",
            "Take a smaller model, shorter rows (--max-length; without data --length), or more memory.",
        )
    name = _name(row)
    return f"Choose {name}: {_why(choice, rows, goal)}.", _run(row)


def _why(choice: Choice, rows: Sequence[Row], goal: Goal) -> str:
    row = choice.row
    lora = next((r for r in rows if r.method == "lora"), row)
    qlora = next((r for r in rows if r.method == "qlora"), row)
    quality = row.way.expected
    expectation = "" if quality.points is None else f"; expected quality {_points(quality.points)} ({quality.source})"
    plain = _name(lora)
    beside = "is tight in" if lora.fit == "tight" else "does not fit into"
    too_large = f"{plain} needs {gib(lora.needed)} and {beside} {gib(row.memory)}"
    reasons = {
        "alone": f"no other way was planned, and it needs {gib(row.needed)} of {gib(row.memory)}",
        "not rounded": f"it fits with {gib(row.needed)}, and its base is not rounded",
        "switching": f"it fits, and switching between tasks swaps {_size(row.way.artefact_bytes)} of adapter over one "
        "base that is not rounded",
        "fastest": _first(row, rows, lambda r: r.setting.cost, "is the fastest that fits", "faster") + expectation,
        "least memory": _first(
            row,
            rows,
            lambda r: r.peak,
            f"needs the least memory without rounding more than NF4 does, {gib(row.needed)}",
            f"smaller than its {gib(row.needed)}",
        )
        + expectation,
        "edge": "an edge device runs a base of about 4 bits, so train on the base that will run, and export both for it"
        + expectation,
    }
    if choice.reason == "only way":
        return f"it is the only way that fits into {gib(row.memory)}; {_short(rows, row)}"
    fits = too_large if lora.fit != "fits" else f"{plain} fits, but {_slower(lora, row)}"
    if choice.reason == "no rounding to fear":
        if (quality.points or 0) <= -SAME_POINTS:
            return f"{fits}, and QLoRA does{expectation}"
        return f"{fits}, and QLoRA's rounding is not expected to cost anything that matters{expectation}"
    if choice.reason == "less rounded":
        kept = 100 * (1 - row.rounding / max(qlora.rounding, 1e-9))
        return f"{fits}, and this memory, between QLoRA's and LoRA's, buys back {kept:.0f} % of what NF4 rounds"
    return reasons[choice.reason]


def _slower(lora: Row, row: Row) -> str:
    """What is wrong with LoRA, which fits, beside the chosen row."""
    one, other = lora.setting, row.setting
    if one.checkpointing > other.checkpointing or one.micro_batch_tokens < other.micro_batch_tokens:
        return "only with smaller or recomputed steps"
    return f"takes {100 * (one.cost / other.cost - 1):.0f} % longer"


def _first(row: Row, rows: Sequence[Row], cost: Callable[[Row], float], first: str, more: str) -> str:
    """That `row` costs the least of what fits, or that what costs less is hardly `more` than it, and less simple."""
    fitting = [other for other in rows if other.fit == row.fit and other.way.needs is None]
    least = min(fitting, key=cost)
    return f"it {first}" if cost(least) >= cost(row) else f"{_name(least)} is hardly {more}, and less simple"


def _short(rows: Sequence[Row], chosen: Row) -> str:
    """The nearest of the others, and what it needs."""
    others = [row for row in rows if row is not chosen and row.way.needs is None]
    if not others:
        return "nothing else was planned"
    nearest = min(others, key=lambda row: row.needed)
    return f"{_name(nearest)} would need {gib(nearest.needed)}"


def _run(row: Row) -> str:
    setting = row.setting
    shape = f"micro-batches of at most {setting.micro_batch_tokens:,} tokens, {setting.micro_batches} a step"
    held = "recomputing activations" if setting.checkpointing else "keeping activations"
    time = ""
    if row.seconds is not None and row.tokens_per_second is not None:
        time = f", at {row.tokens_per_second:,.0f} tokens/s in {duration(row.seconds)}"
    close = ", which is tight" if row.fit == "tight" else ""
    return f"It trains in {shape}, {held}{time}, and peaks at {gib(row.peak)} of {gib(row.memory)}{close}."


def _points(points: float) -> str:
    near = abs(points) < SAME_POINTS
    return "that of LoRA in 16 bit" if near else f"{points:+.1f} points against LoRA in 16 bit"


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def runner_up(choice: Choice) -> str | None:
    """The second choice and its figures."""
    if choice.runner_up is None:
        return None
    row = choice.runner_up
    time = "" if row.seconds is None else f", {duration(row.seconds)}"
    return f"{_name(row)}: peak {gib(row.peak)}{time}"


def change_lines(found: Sequence[Change], memory: int) -> list[str]:
    """What would change the choice, a line each."""
    lines = []
    by_name: dict[str, list[str]] = {}
    for change in found:
        name = "nothing would fit" if change.method is None else _title(change.method, change.bits)
        if change.memory is not None:
            more = change.memory > memory
            lines.append(f"with {gib(abs(change.memory - memory))} {'more' if more else 'less'}: {name}")
        else:
            by_name.setdefault(name, []).append(f"--goal {change.goal}")
    return lines + [f"with {' or '.join(goals)}: {name}" for name, goals in by_name.items()]


def memory_note(given: str | None, size: int) -> str | None:
    """GB and GiB told apart, where somebody may have meant the other."""
    if given is None or not given.lower().rstrip("b").endswith(("g", "t")):
        return None
    sold = given.strip().upper().rstrip("B") + "B"
    number, unit = sold[:-2].strip(), sold[-2:]
    return (
        f"{number} {unit} are {size / _GIB:,.1f} GiB; cards that are sold with {number} {unit} mostly have {number} "
        f"{unit[0]}iB: for one give --memory {number}{unit[0]}iB, or its name with --device"
    )


def command(row: Row, options: PlanOptions, train_as: str) -> str:
    """The `twinlora train` command that does what the row says."""
    setting = row.setting
    data = options.data or ["train.jsonl"]
    if not options.data:  # rows as long as those that were planned must pass
        options = options.model_copy(update={"max_length": max(options.max_length, options.length)})
    mixed = row.method in ("hybrid", "int8")
    parts = ["twinlora", "train", "--model", train_as, "--data", *data, "--method", "hybrid" if mixed else row.method]
    parts += ["--bits", f"{row.bits:.2f}"] if mixed else []
    parts += ["--micro-batch-tokens", str(setting.micro_batch_tokens)]
    parts += ["--gradient-checkpointing"] if setting.checkpointing else []
    unused = unused_by(row.method)
    for name in _PASSED_ON:
        if name not in unused and getattr(options, name) != getattr(_DEFAULTS, name):
            parts += _flag(name, getattr(options, name))
    if options.device.startswith(("cpu", "cuda")):
        parts += ["--device", options.device]
    parts += ["--output", f"runs/{row.method}"]
    return shlex.join(parts)


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]

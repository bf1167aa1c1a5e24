"""`plan(options)`: from a model, a device and data to the rows, the choice and what would change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twinlora import machine
from twinlora.config import PlanOptions, parse_size
from twinlora.model.load import pick_device, pick_dtype
from twinlora.numerics import pool
from twinlora.plan import calibrate, score
from twinlora.plan.advise import Change, Choice, changes, choose, rows_for
from twinlora.plan.claims import checked
from twinlora.plan.devices import Device, find, this_machine
from twinlora.plan.model import Planned, describe
from twinlora.plan.overhead import Overhead, overhead
from twinlora.plan.rows import RESERVE, Row, Way
from twinlora.plan.speed import Rates, stated
from twinlora.plan.ways import Conditions, Ways
from twinlora.plan.words import change_lines, command, gib, memory_note, runner_up, sentences
from twinlora.plan.workload import Workload, assumed, tokenised
from twinlora.reporter import Reporter

__all__ = ["Plan", "plan"]

_CUDA_CONTEXT = 600 << 20  # bytes: the driver's context and the libraries' workspaces, as seen on data-centre cards


@dataclass(frozen=True)
class Plan:
    """A plan: what it is for, its rows in the order of METHODS, the choice, and what is to be said beside it."""

    options: PlanOptions
    planned: Planned
    device: Device
    memory: int
    dtype: torch.dtype
    workload: Workload
    rates: Rates | None
    reserve: float
    ways: list[Way]
    rows: list[Row]
    choice: Choice
    changes: list[Change]
    claims: list[str]
    left_out: str | None  # why QLoRA alone was planned
    notes: list[str]

    @property
    def sentences(self) -> tuple[str, str]:
        """The recommendation."""
        return sentences(self.choice, self.rows, self.options.goal)

    @property
    def command(self) -> str | None:
        """What trains as recommended, if there is something to train from."""
        if self.choice.method is None or self.planned.train_as is None:
            return None
        return command(self.choice.row, self.options, self.planned.train_as)

    @property
    def change_lines(self) -> list[str]:
        """What would change the choice, in words."""
        return change_lines(self.changes, self.memory)

    def document(self) -> dict[str, Any]:
        """All of it as JSON. Sizes in bytes, times in seconds."""
        return {
            "model": {"given": self.planned.given, "origin": self.planned.origin, "parameters": self.ways[0].parameters,
                      "checkpoint_bytes": self.planned.checkpoint_bytes, "weights": self.planned.types,
                      "type": self.planned.config.model_type},
            "device": dataclasses.asdict(self.device),
            "memory_bytes": self.memory,
            "reserve": self.reserve,
            "dtype": str(self.dtype).removeprefix("torch."),
            "goal": self.options.goal,
            "rates": None if self.rates is None else self.rates.source,
            "data": {"from": self.options.data or "assumed", "rows": self.workload.rows, "tokens": self.workload.tokens,
                     "longest": self.workload.longest, "steps": len(self.workload.batches)},
            "rows": [_row(row) for row in self.rows],
            "choice": self.choice.method,
            "reason": self.choice.reason,
            "sentences": list(self.sentences),
            "runner_up": runner_up(self.choice),
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "change_lines": self.change_lines,
            "claims": self.claims,
            "left_out": self.left_out,
            "command": self.command,
            "notes": self.notes,
        }  # fmt: skip


def _row(row: Row) -> dict[str, Any]:
    setting, way = row.setting, row.way
    return {
        "method": row.method,
        "fit": row.fit,
        "needs": way.needs,
        "peak_bytes": row.peak,
        "needed_bytes": row.needed,
        "by_cause": dict(row.by_cause),
        "bits": row.bits,
        "micro_batch_tokens": setting.micro_batch_tokens,
        "micro_batches": setting.micro_batches,
        "gradient_checkpointing": setting.checkpointing,
        "simulated": setting.exact and row.method != "hybrid",  # its layers are chosen by measuring them
        "tokens_per_second": row.tokens_per_second,
        "seconds": row.seconds,
        "disk_bytes": way.disk_bytes,
        "artefact_bytes": way.artefact_bytes,
        "trainable_parameters": way.trainable,
        "expected": dataclasses.asdict(way.expected),
    }


def plan(
    options: PlanOptions,
    reporter: Reporter,
    workload: Workload | None = None,
    *,
    only: str | None = None,
    checkpointing: bool | None = None,
    bits: float | None = None,
    weights: int | None = None,
    precision: Mapping[str, str] | None = None,
    fused: bool = True,
    held: int = 0,
) -> Plan:
    """Plan as `options` say, for a `workload` if there is one already; `only` one method, with `checkpointing` alone or
    without (None: either), a hybrid of so many `bits`, bytes of `weights` or whose layers have this `precision`, the
    model with its stock blocks (not `fused`). `held`: bytes that the process which will train has already.

    Raises InputError; StorageError for rates that are damaged.
    """
    notes: list[str] = []
    planned = describe(options.model, trust_remote_code=options.trust_remote_code)
    left_out = _left_out(planned, options) if only is None else None
    if planned.nf4 not in (None, options.double_quant):
        options = options.model_copy(update={"double_quant": planned.nf4})
        notes.append(f"double_quant {'on' if planned.nf4 else 'off'}, as the checkpoint has it")
    here = options.device in ("auto", "cpu") or options.device.startswith("cuda")
    local = pick_device(options.device) if here else None
    device = find(options.device) if local is None else this_machine(local)
    memory = device.memory_bytes if options.memory is None else parse_size(options.memory)
    notes += _memory_notes(options, device, memory, here=here)
    dtype, reason = _dtype(options, device)
    notes += [reason] if reason else []
    rates, reserve = _of_table(device, dtype, notes) if local is None else _measured(local, options, notes)
    before = machine.rss_bytes()
    if workload is None:
        workload = tokenised(options, planned, reporter.note) if options.data else assumed(options)
    rows_held = max(0, machine.rss_bytes() - before)
    maker = Ways(
        planned.config,
        workload,
        Conditions(options, device.target, dtype, rates, _overhead(device, held, rows_held), fused),
        lambda done, total: reporter.progress("simulating", done, total),
    )
    wanted = "qlora" if left_out else only
    made = maker.make(wanted)
    if checkpointing is not None:
        made = [way.with_checkpointing(checkpointing) for way in made]
    if precision is not None:
        weights = maker.weight_bytes(precision)
    if bits is not None:
        made = [way.with_bits(bits) for way in made]
    elif weights is not None:
        made = [way.with_weights(weights) for way in made]
    if planned.train_as is None:
        notes.append(f"no command: {planned.origin} is nothing to train from; give a directory or a hub id for one")
    ways, rows, choice = _settled(maker, made, memory, options, reserve)
    found = changes(ways, memory, options.goal, reserve)
    claims = checked({row.method: row for row in rows}, model=planned.given, rank=options.rank)
    return Plan(
        options, planned, device, memory, dtype, workload, rates, reserve, ways, rows, choice, found, claims, left_out,
        notes,
    )  # fmt: skip


def _left_out(planned: Planned, options: PlanOptions) -> str | None:
    """Why QLoRA alone is planned, or None."""
    if planned.nf4 is not None:
        return (
            "QLoRA alone: this base is stored in 4 bits (bitsandbytes NF4), and the other ways want its 16-bit "
            "weights; to plan them, name the model that it was made of"
        )
    return "QLoRA alone: --init loftq makes up for what NF4 loses" if options.init == "loftq" else None


def _memory_notes(options: PlanOptions, device: Device, memory: int, *, here: bool) -> list[str]:
    """What the user may have meant otherwise."""
    has = "has free" if here else "has"
    lines = [memory_note(options.memory, memory)]
    if memory > 1.02 * device.memory_bytes:
        lines.append(f"{gib(memory)} as given are more than {device.name} {has}: {gib(device.memory_bytes)}")
    if here and device.target == "cpu" and (why := pool.refusal()):
        lines.append(f"what the C library's heap loses to holes comes on top: no pool for large tensors, since {why}")
    return [line for line in lines if line]


def _settled(
    maker: Ways, ways: Sequence[Way], memory: int, options: PlanOptions, reserve: float
) -> tuple[list[Way], list[Row], Choice]:
    """Rows, after what is recommended or close to a border was simulated rather than derived from its neighbours."""
    ways = list(ways)
    while True:
        rows = rows_for(ways, memory, options.goal, reserve)
        choice = choose(rows, options.goal)
        rough = [i for i, row in enumerate(rows) if not row.setting.exact and (row is choice.row or _close(row))]
        if not rough:
            return ways, rows, choice
        for i in rough:
            ways[i] = maker.exact(rows[i])


def _close(row: Row) -> bool:
    """Whether an error of a derived peak could decide if the row fits. Hybrid fills its memory, whatever that is."""
    return row.method != "hybrid" and abs(row.needed / row.memory - 1) < 0.05


def _overhead(device: Device, held: int, rows: int) -> Overhead:
    """What a process takes beside the step, one that has `held` already, or with `rows` in memory. Nothing on a GPU of
    this machine: its free memory is without it."""
    if device.target == "cpu":
        found = overhead()
        return dataclasses.replace(found, libraries=max(found.libraries + rows, held))
    if device.product_flops is None:
        return Overhead(0, 0)
    return Overhead(_CUDA_CONTEXT, 0)


def _dtype(options: PlanOptions, device: Device) -> tuple[torch.dtype, str | None]:
    if options.dtype == "auto" and device.target == "cuda":
        return (torch.bfloat16, None) if device.bfloat16 else (torch.float16, "float16: no bfloat16 on this device")
    return pick_dtype(options.dtype, torch.device("cpu"))


def _of_table(device: Device, dtype: torch.dtype, notes: list[str]) -> tuple[Rates | None, float]:
    """Rates of a device of the table, and the reserve of memory."""
    if dtype == torch.float32:
        notes.append("no times: the makers' peaks are those of 16-bit products, and this plan is in float32")
        return None, RESERVE
    notes.append(f"times follow from the maker's peaks ({device.source}, {device.date}), not from a measurement")
    return stated(device), RESERVE


def _measured(device: torch.device, options: PlanOptions, notes: list[str]) -> tuple[Rates | None, float]:
    """Rates of this machine's device and the reserve of memory, both corrected by what past runs took there."""
    hardware = calibrate.hardware(device)
    measured = calibrate.load(hardware)
    history = score.of_hardware(score.read(notes.append), hardware)
    reserve = score.reserve(history)
    if measured is None:
        command = "twinlora plan --calibrate" + ("" if options.device == "auto" else f" --device {options.device}")
        notes.append(f"no times: this machine is not measured yet; {command} does it in under a minute")
        return None, reserve
    factor = score.time_factor(score.with_rates(history, measured.source))
    if history:
        kept = f"times × {factor:.2f}, a reserve of {100 * reserve:.0f} %"
        notes.append(f"from {len(history)} past run(s) here: {kept}")
    return dataclasses.replace(measured, factor=factor), reserve

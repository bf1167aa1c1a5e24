"""`train --plan auto`: what the planner would choose, as options of the run."""

from __future__ import annotations

from typing import Any

from twinlora import machine
from twinlora.adapters.precision import read_layers
from twinlora.config import PlanOptions, TrainOptions, parse_size
from twinlora.errors import ConfigError
from twinlora.plan.answer import plan
from twinlora.plan.workload import Workload
from twinlora.train.inputs import Inputs
from twinlora.train.notes import Notes

__all__ = ["CHOSEN", "planned_options"]

# What the planner decides; checkpoints say what is recomputed.
CHOSEN = ("method", "bits", "double_quant", "micro_batch_tokens", "dtype")


def planned_options(options: TrainOptions, inputs: Inputs, notes: Notes) -> TrainOptions:
    """`options` with what the planner chose for this machine. A method with its budget and checkpointing that is on or
    off stay as given, and micro-batches no larger than what was given. Raises ConfigError if nothing fits."""
    shared = {name: getattr(options, name) for name in PlanOptions.model_fields if name in TrainOptions.model_fields}
    del shared["memory"]  # of train it is what the weights of a hybrid base may take
    if "micro_batch_tokens" not in options.model_fields_set:
        del shared["micro_batch_tokens"]  # train's default bounds no plan
    asked = PlanOptions(**(shared | {"model": str(inputs.source.path)}))
    workload = Workload(inputs.examples, asked, from_data=True, packed=options.packing == "auto")
    found = plan(
        asked,
        notes.reporter,
        workload,
        only=options.method,
        checkpointing={"on": True, "off": False, "auto": None}[options.gradient_checkpointing],
        bits=options.bits,
        weights=None if options.memory is None else parse_size(options.memory),
        precision=None if options.layer_precision is None else read_layers(options.layer_precision),
        fused=options.fused,
        held=machine.held_bytes(),
    )
    for note in found.notes:
        notes.add(f"plan: {note}")
    if found.left_out:
        notes.add(f"plan: {found.left_out}")
    first, second = found.sentences
    if found.choice.method is None:
        raise ConfigError(f"plan auto: {first} {second}")
    notes.add(f"plan: {first} {second}")
    setting = found.choice.row.setting
    update: dict[str, Any] = {
        "method": found.choice.method,
        "double_quant": found.options.double_quant,
        "dtype": str(found.dtype).removeprefix("torch."),  # measured once
        "micro_batch_tokens": min(setting.micro_batch_tokens, asked.micro_batch_tokens),  # a longer row goes alone
        "gradient_checkpointing": "on" if setting.checkpointing else options.gradient_checkpointing,
    }
    if options.method is None and found.choice.method in ("hybrid", "int8"):
        update |= {"method": "hybrid", "bits": found.choice.row.bits}
    return options.model_copy(update=update)

"""Phrase banks, and how a message is put together from one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

__all__ = ["Bank", "fill"]


@dataclass(frozen=True)
class Bank:
    """The phrases of one split: templates by label with a slot `{x}`, values for it, and sentences around."""

    templates: dict[str, list[str]]
    values: list[str]
    before: list[str]
    after: list[str]
    urgent: list[str] = field(default_factory=list)


def fill(bank: Bank, generator: random.Random, label: str, value: str, extra: str = "") -> str:
    """A message with `label`'s template around `value`; `extra` is a sentence that goes before or after it."""
    core = generator.choice(bank.templates[label]).replace("{x}", value)
    middle = [core, extra] if generator.random() < 0.7 else [extra, core]
    parts = [generator.choice(bank.before), *middle, generator.choice(bank.after)]
    return " ".join(part for part in parts if part)

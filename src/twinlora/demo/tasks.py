"""Three small tasks, generated: customer-service routing, legal clause tagging, medical triage.

Held-out rows use templates, entities and surrounding sentences that training rows never show, so that a good score
means the task was learnt, not the phrases.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from twinlora.data.formats import Row
from twinlora.demo import legal, support, triage
from twinlora.demo.bank import Bank
from twinlora.errors import DataError

__all__ = ["SPLITS", "TASKS", "Split", "Task", "rows"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_TRIES = 200  # draws for each row before the bank counts as exhausted


@dataclass(frozen=True)
class Task:
    """A task: what the model is told, the phrases of each split, and how a row is made of them."""

    name: str
    title: str
    system: str
    banks: dict[str, Bank]
    make: Callable[[Bank, random.Random], tuple[str, str]]


TASKS = {
    "support": Task("support", "customer-service routing", support.SYSTEM, support.BANKS, support.make),
    "legal": Task("legal", "contract clause tagging", legal.SYSTEM, legal.BANKS, legal.make),
    "triage": Task("triage", "patient message triage", triage.SYSTEM, triage.BANKS, triage.make),
}


def rows(task: str, split: Split, count: int, seed: int = 0) -> list[Row]:
    """`count` different chats of a split, the same for the same arguments.

    Raises DataError for an unknown task, or for more rows than its phrases can make.
    """
    if task not in TASKS:
        raise DataError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    chosen = TASKS[task]
    generator = random.Random(f"{task}/{split}/{seed}")
    made: dict[str, str] = {}
    for _ in range(count * _TRIES):
        if len(made) == count:
            break
        question, answer = chosen.make(chosen.banks[split], generator)
        made.setdefault(question, answer)
    if len(made) < count:
        raise DataError(f"task {task}, split {split}: {count} rows asked, its phrases make {len(made)} different ones")
    return [
        Row(
            f"{task}/{split}:{number}",
            messages=(
                {"role": "system", "content": chosen.system},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ),
        )
        for number, (question, answer) in enumerate(made.items(), 1)
    ]

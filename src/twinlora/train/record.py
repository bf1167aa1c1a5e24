"""What a run says about itself: notes, the adapter's passport, and run.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from twinlora.adapters import passport
from twinlora.config import TrainOptions
from twinlora.data.formats import Row
from twinlora.reporter import Reporter
from twinlora.train.inputs import Inputs

__all__ = ["Notes", "passport_of"]


@dataclass
class Notes:
    """Lines that are shown at once; those that `add` gets also end up in run.json."""

    reporter: Reporter
    lines: list[str] = field(default_factory=list)

    def show(self, text: str) -> None:
        """Show a line."""
        self.reporter.note(text)

    def add(self, text: str) -> None:
        """Show a line and keep it."""
        self.lines.append(text)
        self.show(text)


def passport_of(options: TrainOptions, inputs: Inputs, precision: dict[str, int], steps: int) -> passport.Passport:
    """The passport of an adapter after `steps` steps over a base of `precision`."""
    return passport.Passport(
        base_model=options.model,
        base_fingerprint=inputs.fingerprint,
        base_precision=precision,
        **passport.tokenizer_digests(inputs.tokenizer),
        system=_common_system(inputs.rows),
        data_sha256=inputs.data_sha256 | inputs.eval_sha256,
        method=options.method,
        seed=options.seed,
        steps=steps,
        versions=passport.versions(),
    )


def _common_system(rows: list[Row]) -> str | None:
    """The system message that all rows share, if they do."""
    messages = {
        str(row.messages[0]["content"]) if row.messages and row.messages[0]["role"] == "system" else None
        for row in rows
    }
    return messages.pop() if len(messages) == 1 else None

"""What a run says about itself: notes, the adapter's passport, and run.json."""

from __future__ import annotations

import hashlib
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
    tokenizer = inputs.tokenizer
    template = tokenizer.chat_template
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return passport.Passport(
        base_model=options.model,
        base_fingerprint=inputs.fingerprint,
        base_precision=precision,
        tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
        chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
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

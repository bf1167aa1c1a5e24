"""What a run says about the adapter that it leaves."""

from __future__ import annotations

from twinlora.adapters import passport
from twinlora.config import TrainOptions
from twinlora.data.formats import Row
from twinlora.train.inputs import Inputs
from twinlora.train.prepare import Prepared, storage_of

__all__ = ["passport_of"]


def passport_of(options: TrainOptions, inputs: Inputs, prepared: Prepared, steps: int) -> passport.Passport:
    """The passport of an adapter after `steps` steps over the base of `prepared`."""
    return passport.Passport(
        base_model=options.model,
        base_fingerprint=inputs.fingerprint,
        base_precision=prepared.precision,
        layer_precision=prepared.layers,
        **passport.tokenizer_digests(inputs.tokenizer),
        system=_common_system(inputs.rows),
        data_sha256=inputs.digests,
        method=options.method,
        deploy=storage_of(options).name if options.deploy else None,
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

"""What a run says about the adapter that it leaves."""

from __future__ import annotations

from twinlora.adapters import passport
from twinlora.adapters.deploy import Storage, storage_named
from twinlora.config import TrainOptions
from twinlora.data.formats import Row
from twinlora.numerics.nf4 import NF4Format
from twinlora.train.inputs import Inputs

__all__ = ["passport_of", "storage_of"]


def passport_of(options: TrainOptions, inputs: Inputs, precision: dict[str, int], steps: int) -> passport.Passport:
    """The passport of an adapter after `steps` steps over a base of `precision`."""
    return passport.Passport(
        base_model=options.model,
        base_fingerprint=inputs.fingerprint,
        base_precision=precision,
        **passport.tokenizer_digests(inputs.tokenizer),
        system=_common_system(inputs.rows),
        data_sha256=inputs.digests,
        method=options.method,
        deploy=storage_of(options).name if options.deploy else None,
        seed=options.seed,
        steps=steps,
        versions=passport.versions(),
    )


def storage_of(options: TrainOptions) -> Storage:
    """The format of `deploy`."""
    assert options.deploy is not None
    return storage_named(options.deploy, NF4Format(options.block_size, 256 if options.double_quant else 0))


def _common_system(rows: list[Row]) -> str | None:
    """The system message that all rows share, if they do."""
    messages = {
        str(row.messages[0]["content"]) if row.messages and row.messages[0]["role"] == "system" else None
        for row in rows
    }
    return messages.pop() if len(messages) == 1 else None

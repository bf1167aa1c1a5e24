"""`train --for PROGRAM`: what is about to be trained must be loadable there, or nothing is trained."""

from __future__ import annotations

from typing import Any

from twinlora.adapters.loaders import GGUF_MODELS, nearest, planned, refused, setting
from twinlora.config import TrainOptions
from twinlora.errors import ConfigError
from twinlora.model.load import Source, skeleton
from twinlora.train.notes import Notes

__all__ = ["require_loadable"]


def require_loadable(options: TrainOptions, source: Source, notes: Notes) -> None:
    """Raises ConfigError with every reason and the nearest options that the program takes."""
    program = options.program
    if program is None:
        return
    model = skeleton(source, trust_remote_code=options.trust_remote_code)
    kind = model.config.model_type
    if program == "llama.cpp" and kind not in GGUF_MODELS:
        raise ConfigError(
            f"--for llama.cpp: {kind} models are not written as GGUF; expected one of {', '.join(GGUF_MODELS)}"
        )
    if options.method == "full":
        notes.add(f"for {program}: all weights are trained, there is no adapter that it could refuse")
        return
    traits = planned(model, options)
    refusals = refused(program, traits)
    if not refusals:
        how = setting(program, traits)
        notes.add(f"for {program}: it can be loaded{f', {how}' if how else ''}")
        return
    changes = nearest(refusals, options)
    still = refused(program, planned(model, options.model_copy(update=changes)))
    assert not still, still
    reasons = "\n  ".join(refusal.reason for refusal in refusals)
    merged = "" if program != "llama.cpp" else "\nor leave --for out and fold it in: twinlora export --to gguf"
    raise ConfigError(
        f"--for {program}: it could not load what would be trained\n  {reasons}\n"
        f"the nearest that it loads: {_as_flags(changes)}{merged}"
    )


def _as_flags(changes: dict[str, Any]) -> str:
    given = [
        f"--{name.replace('_', '-')} {','.join(value) if isinstance(value, list) else value}"
        for name, value in changes.items()
        if value
    ]
    left = [f"--{name.replace('_', '-')}" for name, value in changes.items() if not value]
    return "; ".join(
        [*([f"without {', '.join(left)}"] if left else []), *([f"with {' '.join(given)}"] if given else [])]
    )

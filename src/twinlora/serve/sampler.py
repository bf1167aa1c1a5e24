"""The next token of every row of a pass, each by its own request's rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twinlora.serve.state import Sampling, TokenOut

__all__ = ["choose", "generator"]

_COLDEST = 1e-5  # a temperature below is 0: the most likely token is all that float32 leaves


def generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """The request's own source of chance; None where nothing is left to it."""
    if sampling.temperature < _COLDEST:
        return None
    made = torch.Generator(device=device)
    if sampling.seed is None:
        made.seed()
    else:
        made.manual_seed(sampling.seed)
    return made


def choose(
    logits: Tensor, rules: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[TokenOut | None]:
    """A token for each row of logits [n, V]; None where they hold NaN or Inf.

    Log-probabilities are the model's, before temperature and top_p.
    """
    most, greedy = logits.max(dim=-1)  # argmax takes five times as long in 16 bit
    out: list[TokenOut | None] = []
    rows = zip(greedy.tolist(), most.isfinite().tolist(), rules, generators, strict=True)
    for row, (token, finite, rule, source) in enumerate(rows):
        if not finite:
            out.append(None)
            continue
        if source is not None:
            token = _draw(logits[row].float(), rule, source)
        if rule.top_logprobs is None:
            out.append(TokenOut(token))
            continue
        log_probs = torch.log_softmax(logits[row].float(), dim=-1)
        values, ids = log_probs.topk(rule.top_logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        out.append(TokenOut(token, float(log_probs[token]), top))
    return out


def _draw(logits: Tensor, rule: Sampling, source: torch.Generator) -> int:
    """A random token of those that make up `top_p` of the probability."""
    probabilities = torch.softmax(logits / rule.temperature, dim=-1)
    if rule.top_p < 1:
        values, ids = probabilities.sort(descending=True)
        beyond = values.cumsum(0) - values >= rule.top_p
        beyond[0] = False  # where top_p is less than float32 can tell from 0
        values = values.masked_fill(beyond, 0.0)
        return int(ids[torch.multinomial(values, 1, generator=source)])
    return int(torch.multinomial(probabilities, 1, generator=source))

"""Decoding: many prompts at once, greedy or sampled, with transformers' key/value cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["end_tokens", "generate"]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's and the generation config's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def _cache_argument(model: PreTrainedModel) -> str:
    """transformers renamed the argument in 5.2x."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: set[int],
    pad_id: int = 0,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answers to `prompts` (token ids), without the token of `stop` that ended them.

    Prompts are padded on the left; rows that have ended leave the batch. `on_token` sees the first row's tokens.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    cache = DynamicCache(config=model.config)
    arguments = {_cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **arguments).logits[:, -1]
        tokens = _pick(logits, temperature, generator)
        keep = []
        for row, token in enumerate(tokens.tolist()):
            if token in stop:
                continue
            answers[active[row]].append(token)
            keep.append(row)
            if active[row] == 0 and on_token is not None:
                on_token(token)
        if not keep:
            break
        if len(keep) < len(active):
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            tokens, mask, positions = tokens[index], mask[index], positions[index]
            active = [active[row] for row in keep]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
    return answers

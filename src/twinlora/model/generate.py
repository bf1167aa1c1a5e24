"""Decoding: many prompts at once, greedy or sampled.

A model whose attention blocks are ours decodes without padding on our cache (kvcache.py), others with transformers'.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from twinlora.model.attention import NO_MASK_SHAPE, Layout
from twinlora.model.blocks import Attention
from twinlora.model.kvcache import KVCache, Prefill, Step

__all__ = ["end_tokens", "generate", "is_ragged"]


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
        return logits.max(dim=-1).indices  # argmax takes five times as long in 16 bit
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: set[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[int], None] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Answers to `prompts` (token ids), without the token of `stop` that ended them.

    Rows that have ended leave the batch. `on_token` sees the first row's tokens; `ended` ends an answer by its tokens.
    """
    state = (_Ragged if is_ragged(model) else _Padded)(model, prompts, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    logits = state.start()
    for number in range(max_new_tokens):
        tokens = _pick(logits, temperature, generator)
        keep, kept = [], []
        for row, token in enumerate(tokens.tolist()):
            if token in stop:
                continue
            answers[active[row]].append(token)
            if active[row] == 0 and on_token is not None:
                on_token(token)
            if ended is None or not ended(answers[active[row]]):
                keep.append(row)
                kept.append(token)
        if not keep or number + 1 == max_new_tokens:
            break
        active = [active[row] for row in keep]
        logits = state.step(keep, kept)
    return answers


def is_ragged(model: PreTrainedModel) -> bool:
    """Whether every attention block is ours, so that sequences need no padding."""
    ours = sum(isinstance(module, Attention) for module in model.modules())
    return ours > 0 and ours == getattr(model.config, "num_hidden_layers", None)


class _Ragged:
    """Sequences of their own lengths, on our cache."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], new: int) -> None:
        self.model, self.prompts = model, prompts
        self.device = model.get_input_embeddings().weight.device
        self.cache = KVCache(len(prompts), max(map(len, prompts)) + new)
        self.rows = list(range(len(prompts)))

    def start(self) -> Tensor:
        """Logits [n, V] of the first new tokens."""
        layout = Prefill(self.cache, [len(prompt) for prompt in self.prompts], self.device)
        last = torch.tensor(layout.starts[1:], device=self.device) - 1
        return self._logits([token for prompt in self.prompts for token in prompt], layout, last)

    def step(self, keep: list[int], tokens: list[int]) -> Tensor:
        """Logits of the next tokens of the rows `keep` of the last batch, whose `tokens` were chosen."""
        self.rows = [self.rows[row] for row in keep]
        layout = Step(self.cache, self.rows, self.device)
        logits = self._logits(tokens, layout, torch.arange(len(tokens), device=self.device))
        layout.advance()
        return logits

    def _logits(self, ids: list[int], layout: Layout, rows: Tensor) -> Tensor:
        out: Tensor = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=layout.positions(),
            attention_mask=torch.empty(NO_MASK_SHAPE, device=self.device),
            layout=layout,
            use_cache=False,
            logits_to_keep=rows,
        ).logits[0]
        return out


class _Padded:
    """Prompts padded on the left, on transformers' cache: any model."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], new: int) -> None:
        device = model.get_input_embeddings().weight.device
        longest = max(map(len, prompts))
        self.model = model
        self.ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.positions = (self.mask.cumsum(1) - 1).clamp_(min=0)
        self.cache = DynamicCache(config=model.config)
        self.arguments = {_cache_argument(model): self.cache, "use_cache": True, "logits_to_keep": 1}

    def start(self) -> Tensor:
        """See _Ragged."""
        out: Tensor = self.model(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, **self.arguments
        ).logits[:, -1]
        return out

    def step(self, keep: list[int], tokens: list[int]) -> Tensor:
        """See _Ragged."""
        if len(keep) < len(self.ids):
            index = torch.tensor(keep, device=self.ids.device)
            self.cache.batch_select_indices(index)
            self.mask, self.positions = self.mask[index], self.positions[index]
        self.ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self.start()

"""How much an adapter changes what its base says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROMPTS", "mean_kl"]

PROMPTS = (
    "The capital of France is",
    "Dear Sir or Madam,\nI am writing to",
    "def fibonacci(n):\n    ",
    "Question: What is 17 + 25?\nAnswer:",
    "今天的天气",
)


def mean_kl(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, change: Callable[[], None]) -> float:
    """KL(after ‖ before) of the next-token distributions in nats, before and after `change` acts on the model.

    The mean over all tokens of PROMPTS.
    """
    before = _log_probabilities(model, tokenizer)
    change()
    after = _log_probabilities(model.eval(), tokenizer)
    return float((after.exp() * (after - before)).sum(-1).mean())


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        rows.append(F.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1))
    return torch.cat(rows)

"""One pass over a micro-batch to the sum of its token losses, and the proof that packing does not leak."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from twinlora.model.attention import NAME, NO_MASK_SHAPE, Layout
from twinlora.model.linear import DenseLinear
from twinlora.numerics import ops
from twinlora.numerics.loss import linear_cross_entropy

__all__ = ["evaluating", "has_plain_head", "hidden_states", "loss_sum", "packing_refusal", "token_log_probs"]

_CHUNK_ELEMENTS = 1 << 24  # logits in hand at once when every token's own figure is wanted


def _arguments(micro: Any) -> dict[str, Any]:
    arguments = {"input_ids": micro.input_ids, "position_ids": micro.position_ids, "use_cache": False}
    if micro.layout is None:
        return arguments | {"attention_mask": micro.attention_mask}
    return arguments | {
        "attention_mask": torch.empty(NO_MASK_SHAPE, device=micro.input_ids.device),
        "layout": micro.layout,
    }


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In eval mode, without dropout; afterwards as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def hidden_states(model: PreTrainedModel, micro: Any) -> Tensor:
    """Last hidden states of all positions of a `data.packing.MicroBatch`, flattened: [batch · length, D]."""
    hidden: Tensor = model.base_model(**_arguments(micro))[0]
    return hidden.flatten(0, 1)


def loss_sum(model: PreTrainedModel, micro: Any, *, plain_head: bool) -> Tensor:
    """Sum of -log p(label) over the rows that carry loss, float32 []. `plain_head` as `has_plain_head` found it."""
    if plain_head:
        rows = hidden_states(model, micro).index_select(0, micro.loss_rows)
        head: Any = model.get_output_embeddings()
        return linear_cross_entropy(rows, head.weight, micro.labels)
    return F.cross_entropy(_loss_logits(model, micro).float(), micro.labels, reduction="sum")


def _loss_logits(model: PreTrainedModel, micro: Any) -> Tensor:
    """Logits of the rows that carry loss, [R, V]."""
    if micro.layout is None:
        rows: Tensor = model(**_arguments(micro)).logits.flatten(0, 1).index_select(0, micro.loss_rows)
    else:
        rows = model(**_arguments(micro), logits_to_keep=micro.loss_rows).logits[0]
    return rows


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, micro: Any, *, plain_head: bool) -> tuple[Tensor, Tensor]:
    """log p(label) of each row that carries loss, float32 [R], and whether no token is likelier, bool [R]."""
    if not plain_head:
        return _log_probs(_loss_logits(model, micro), micro.labels)
    rows = hidden_states(model, micro).index_select(0, micro.loss_rows)
    head: Any = model.get_output_embeddings()
    step = max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
    chunks = zip(rows.split(step), micro.labels.split(step), strict=True)
    log_probs, best = zip(*(_log_probs(head(h), labels) for h, labels in chunks), strict=True)
    return torch.cat(log_probs), torch.cat(best)


def _log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None]).squeeze(1)
    return chosen, logits.argmax(dim=-1) == labels


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just `hidden @ W.T`: no bias, no soft-capping, no scaling. Found by trying two tokens."""
    head = model.get_output_embeddings()
    if not isinstance(head, (nn.Linear, DenseLinear)) or head.bias is not None or model.base_model is model:
        return False
    ids = torch.tensor([[1, 2]], device=head.weight.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        dense = isinstance(head, DenseLinear)
        expected = ops.dense_linears(hidden, [head.weight])[0] if dense else F.linear(hidden, head.weight)
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.equal(logits, expected)


def packing_refusal(model: PreTrainedModel, vocabulary: int) -> str | None:
    """None if the model may train on packed rows; else why not.

    Two sequences side by side: the second's hidden states must not change when the first one's words do (but for the
    last bits: experts multiply the rows of both together), and must be those it has alone, within the rounding noise of
    the model's type.
    """
    if model.config._attn_implementation != NAME:
        return f"its attention runs as {model.config._attn_implementation!r}"
    if any(getattr(model.config, key, 0.0) for key in ("attention_dropout", "attn_pdrop")):
        return "it uses attention dropout"
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (7, 7, 11))
    try:
        with torch.no_grad(), evaluating(model):  # dropout is no difference between the two
            one, two = (_packed_hidden(model, [head, second], device)[7:] for head in (first, other))
            alone = model.base_model(input_ids=second[None].to(device), use_cache=False)[0][0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"it does not run packed ({type(error).__name__}: {error})"
    eps = torch.finfo(alone.dtype).eps
    if _apart(one, two) > 4 * eps:
        return "a sequence sees its neighbour"
    noise, off = eps**0.5, _apart(one, alone)
    return None if off < noise else f"packed and alone differ by {off:.2g} (expected below {noise:.2g})"


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


def _packed_hidden(model: PreTrainedModel, sequences: list[Tensor], device: torch.device) -> Tensor:
    layout = Layout([len(s) for s in sequences], device)
    out: Tensor = model.base_model(
        input_ids=torch.cat(sequences)[None].to(device),
        position_ids=layout.positions(),
        attention_mask=torch.empty(NO_MASK_SHAPE, device=device),
        layout=layout,
        use_cache=False,
    )[0][0]
    return out

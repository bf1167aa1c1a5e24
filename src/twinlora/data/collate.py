"""Examples for trainers of others, and a collator that keeps them free of padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from twinlora.data.template import Example
from twinlora.errors import ModelError
from twinlora.model.attention import NO_MASK_SHAPE, Layout
from twinlora.model.forward import packing_refusal

__all__ = ["IGNORED", "PackedCollator", "features"]

IGNORED = -100  # the label of a token that carries no loss, everywhere in the field


def features(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """`{"input_ids": […], "labels": […]}` of each example."""
    return [
        {
            "input_ids": example.ids,
            "labels": [token if on else IGNORED for token, on in zip(example.ids, example.trained, strict=True)],
        }
        for example in examples
    ]


class PackedCollator:
    """Rows of `features` side by side in one row [1, T] with a `Layout`: no token is fill, and no row sees another.

    For `model`, which must be one of `load_model`, with our attention: it is tried out. transformers'
    DataCollatorWithFlattening does the same for every model, over a mask of T × T. Raises ModelError.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refusal = packing_refusal(model, model.get_input_embeddings().num_embeddings)
        if refusal:
            raise ModelError(
                f"this model cannot train on packed rows, because {refusal}; "
                "pad them: transformers.DataCollatorForSeq2Seq(tokenizer)"
            )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        layout = Layout([len(row["input_ids"]) for row in rows])
        labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([labels]),
            "position_ids": layout.positions(),
            "attention_mask": torch.empty(NO_MASK_SHAPE),
            "layout": layout,
        }

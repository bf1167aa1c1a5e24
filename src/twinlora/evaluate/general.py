"""Forgetting: the loss on general text before and after training.

The built-in sample is forty short paragraphs on everyday topics, English and Chinese, written for this project: a model
cannot have learnt them by heart. Each paragraph is a row; all its tokens but the first carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from twinlora.data.template import Example
from twinlora.errors import DataError

__all__ = ["encode_texts", "read_texts"]


def read_texts(path: Path | None) -> list[str]:
    """The paragraphs of a UTF-8 text file, separated by blank lines; of the built-in sample without a path."""
    if path is None:
        text = files("twinlora.evaluate").joinpath("general.txt").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"general {path}: cannot be read ({error}); expected UTF-8 text, paragraphs with a blank line between"
            ) from None
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1].append(line.strip())
        elif paragraphs[-1]:
            paragraphs.append([])
    found = ["\n".join(lines) for lines in paragraphs if lines]
    if not found:
        raise DataError(f"general {path}: no text; expected paragraphs with a blank line between")
    return found


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[Example]:
    """The paragraphs as examples, those longer than `max_length` tokens in pieces; what has one token says nothing."""
    examples = []
    for number, text in enumerate(texts):
        ids = list(tokenizer(text)["input_ids"])
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            if len(piece) > 1:
                examples.append(Example(piece, [True] * len(piece), f"general text {number + 1}"))
    if not examples:
        raise DataError("general text: no paragraph has two tokens; give longer ones")
    return examples

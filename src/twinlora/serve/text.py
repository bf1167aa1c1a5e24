"""Tokens to text as they come, up to a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["TextStream", "spelled"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = 8  # tokens that may be needed for one character
_CONTEXT = 8  # tokens before that may change how the next one reads
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


class TextStream:
    """Whole characters only; what might be the beginning of a stop string is held back.

    `after`: the tokens that the text goes on from; without, it begins here.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = (), after: Sequence[int] = ()
    ) -> None:
        self._backend, self._stop = tokenizer.backend_tokenizer, stop
        self._tokens = list(after[-_CONTEXT:])
        # Tokens from `_first` on are decoded together, since some change their neighbours; up to `_read` they are out.
        self._first, self._read = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token; nothing more once a stop string is complete (`stopped`)."""
        self._tokens.append(token)
        waited = len(self._tokens) - self._read
        return "" if self.stopped else self._sift(self._new(whole=waited < _LONGEST_WAIT))

    def finish(self) -> str:
        """What was held back; an incomplete character as the tokenizer shows it."""
        if self.stopped:
            return ""
        text = self._sift(self._new(whole=False))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new(self, *, whole: bool) -> str:
        """Text of the tokens that are not out yet; "" if it must be `whole` and is not."""
        before, now = (self._backend.decode(part) for part in (
            self._tokens[self._first : self._read], self._tokens[self._first :]))  # fmt: skip
        if len(now) <= len(before) or (whole and now.endswith(_INCOMPLETE)):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return str(now[len(before) :])

    def _sift(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                self._held = text[-length:]
                return text[:-length]
        return text


def spelled(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, bytes]:
    """The text of one token, and its bytes, which may be a part of a character; the text then shows U+FFFD."""
    backend = tokenizer.backend_tokenizer
    text, piece = str(backend.decode([token], skip_special_tokens=False)), backend.id_to_token(token) or ""
    if match := _BYTE.fullmatch(piece):  # SentencePiece's
        return text, bytes([int(match[1], 16)])
    raw = bytes(_BYTES[char] for char in piece) if all(char in _BYTES for char in piece) else None
    if raw is not None and raw.decode(errors="replace") == text:  # a byte-level piece
        return text, raw
    if piece.startswith("▁") and not text.startswith(" "):  # decoded alone it loses its space
        text = f" {text}"
    return text, text.encode()

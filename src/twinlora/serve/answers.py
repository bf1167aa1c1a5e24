"""Events as OpenAI's objects: whole answers and streams of chunks, of chats and of completions."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from twinlora.serve.engine import Event
from twinlora.serve.service import Answer, ApiError
from twinlora.serve.state import TokenOut
from twinlora.serve.text import spelled

__all__ = ["ChatForm", "CompletionForm", "Form", "stream", "whole"]

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Form:
    """One of the two kinds of answers."""

    prefix: str
    object_whole: str
    object_chunk: str

    def __init__(self, model: str, answer: Answer, tokenizer: PreTrainedTokenizerBase, top: int | None) -> None:
        self.tokenizer, self.top = tokenizer, top
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": answer.identity,  # the version that answers: name@sha256
        }
        self.offset = 0  # characters so far
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def spelled(self, token: int) -> str:
        """The text of one token; of one that is no whole character its bytes, as OpenAI writes them."""
        text, raw = spelled(self.tokenizer, token)
        return text if text.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def advance(self, token: int) -> int:
        """Characters before this token; then count its own."""
        before = self.offset
        self.offset += len(self._decoder.decode(spelled(self.tokenizer, token)[1]))
        return before

    def logprobs(self, events: list[Event]) -> dict[str, Any] | None:
        """The log-probabilities of the events' tokens, in this form; None if they were not asked for."""
        raise NotImplementedError

    def choice(self, text: str, events: list[Event], finish: str | None) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def part(self, text: str, events: list[Event], finish: str | None, *, first: bool) -> dict[str, Any]:
        """A part of a streamed answer."""
        raise NotImplementedError


class ChatForm(Form):
    """chat.completion."""

    prefix, object_whole, object_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def logprobs(self, events: list[Event]) -> dict[str, Any] | None:
        """See Form."""
        if self.top is None:
            return None
        content = []
        for token in (event.token for event in events if event.token is not None):
            top = [self._one(i, value) for i, value in token.top]
            content.append(self._one(token.token, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = spelled(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def choice(self, text: str, events: list[Event], finish: str | None) -> dict[str, Any]:
        """See Form."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self.logprobs(events), "finish_reason": finish}

    def part(self, text: str, events: list[Event], finish: str | None, *, first: bool) -> dict[str, Any]:
        """See Form."""
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": self.logprobs(events), "finish_reason": finish}


class CompletionForm(Form):
    """text_completion."""

    prefix, object_whole, object_chunk = "cmpl", "text_completion", "text_completion"

    def logprobs(self, events: list[Event]) -> dict[str, Any] | None:
        """See Form."""
        if self.top is None:
            return None
        tokens: list[TokenOut] = [event.token for event in events if event.token is not None]
        return {
            "tokens": [self.spelled(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [self.advance(token.token) for token in tokens],
        }

    def _likeliest(self, chosen: TokenOut) -> dict[str, float | None]:
        """By their text; the chosen one is always among them."""
        return {self.spelled(i): value for i, value in (*chosen.top, (chosen.token, chosen.logprob))}

    def choice(self, text: str, events: list[Event], finish: str | None) -> dict[str, Any]:
        """See Form."""
        return {"index": 0, "text": text, "logprobs": self.logprobs(events), "finish_reason": finish}

    def part(self, text: str, events: list[Event], finish: str | None, *, first: bool) -> dict[str, Any]:
        """See Form."""
        return self.choice(text, events, finish)


async def whole(form: Form, answer: Answer) -> dict[str, Any]:
    """The answer as one object."""
    events = [event async for event in answer]
    text = "".join(event.text for event in events)
    choice = form.choice(text, events, events[-1].finish)
    return form.head | {"object": form.object_whole, "choices": [choice], "usage": answer.usage}


async def stream(form: Form, answer: Answer, *, usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events, one for each piece of text, then `[DONE]`."""
    head = form.head | {"object": form.object_chunk} | ({"usage": None} if usage else {})
    begin = _JSON.encode(head | {"choices": []})[:-2]  # the same for every piece
    held: list[Event] = []  # tokens whose text is still to come
    first = True
    try:
        async for event in answer:
            held.append(event)
            if event.text or event.finish:
                part = form.part(event.text, held, event.finish, first=first)
                yield f"data: {begin}{_JSON.encode(part)}]}}\n\n".encode()
                held, first = [], False
    except ApiError as error:
        yield _line(error.body())
        return
    if usage:
        yield _line(head | {"choices": [], "usage": answer.usage})
    yield b"data: [DONE]\n\n"


def _line(document: dict[str, Any]) -> bytes:
    return f"data: {_JSON.encode(document)}\n\n".encode()

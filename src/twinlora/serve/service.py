"""From a request to its events: limits, the lease on an adapter, its weights in memory, the engine, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from twinlora.config import ServeOptions
from twinlora.data.template import encode_chat, encode_text
from twinlora.errors import AdapterError, DataError
from twinlora.serve.engine import Engine, Event, Ticket
from twinlora.serve.metrics import Metrics
from twinlora.serve.registry import Busy, Lease, Registry, Unblendable, UnknownModel
from twinlora.serve.state import Sampling

__all__ = ["Answer", "ApiError", "Mailbox", "Service"]


class ApiError(Exception):
    """What the client is told: an HTTP status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 retry_after: int | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Answer:
    """A request in the engine, seen from the event loop. Iterate it once, in `async with`."""

    service: Service
    lease: Lease
    label: str
    prompt_tokens: int
    ticket: Ticket
    events: asyncio.Queue[Event]
    begun: float
    produced: int = 0
    ended: bool = False

    @property
    def identity(self) -> str | None:
        """`name@sha256` of the version that answers; None for the base."""
        return self.lease.version.identity if self.lease.version else None

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, so far."""
        total = self.prompt_tokens + self.produced
        cached = {"cached_tokens": self.ticket.sequence.reused}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.produced,
            "total_tokens": total,
            "prompt_tokens_details": cached,
        }

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whatever happened: the slot is free and the lease is given back."""
        await asyncio.shield(self.service.finish(self))

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not self.ended:
            event = await self.events.get()
            if event.token is not None:
                if not self.produced:
                    waited = time.monotonic() - self.begun
                    self.service.metrics.first_token.labels(self.label).observe(waited)
                self.produced += 1
            self.ended = event.finish is not None
            if self.ended:
                self.service.count(self, str(event.finish))
            if event.finish == "error" and self.service.engine.cut:
                raise ApiError(503, str(event.error), code="shutting_down")
            if event.finish == "error":
                raise ApiError(500, f"the model failed: {event.error}", code="engine_error")
            yield event


class Mailbox:
    """From the engine's thread to the loop: as `call_soon_threadsafe`, but one wake-up serves all that a pass gave."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[Callable[[], object]] = deque()
        self._woken = False

    def post(self, callback: Callable[[], object]) -> None:
        """Have the loop call it, in the order of posts. For the engine's thread alone."""
        self._waiting.append(callback)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is gone: so is the client
                self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False  # before it is emptied: what comes from now on wakes the loop again
        while self._waiting:
            self._waiting.popleft()()


class Service:
    """One base, its engine and its adapters."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        metrics: Metrics,
        options: ServeOptions,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.engine, self.registry, self.metrics, self.options, self.note = engine, registry, metrics, options, note
        self.tokenizer = engine.tokenizer
        self.draining = False
        self._active = 0
        self._mailbox: Mailbox | None = None
        self._encoder = ThreadPoolExecutor(1, "encoder")

    @property
    def active(self) -> int:
        """Requests in work."""
        return self._active

    async def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a chat. Raises ApiError."""
        if not self.tokenizer.chat_template:
            raise ApiError(400, "this base has no chat template: use /v1/completions", param="messages")
        return await self._encoded(lambda: encode_chat(self.tokenizer, messages), "messages")

    async def encode_prompt(self, prompt: str | list[int] | list[str]) -> list[int]:
        """Token ids of a text to go on from. Raises ApiError."""
        text = prompt if isinstance(prompt, str) else prompt[0]
        if isinstance(text, str):
            return await self._encoded(lambda: encode_text(self.tokenizer, text), "prompt")
        tokens = cast(list[int], prompt)
        size = self.engine.model.get_input_embeddings().weight.shape[0]
        wrong = [token for token in tokens if token >= size]
        if wrong:
            raise ApiError(400, f"{len(wrong)} token id(s) are not below {size:,}, such as {wrong[0]}", param="prompt")
        return tokens

    async def _encoded(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            tokens = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except DataError as error:
            raise ApiError(400, str(error), param=param) from None
        if not tokens:
            raise ApiError(400, "nothing to answer: the prompt has no tokens", param=param)
        return tokens

    def room(self, tokens: list[int], wanted: int | None, param: str) -> int:
        """How many tokens the answer may have; the context may leave fewer than `wanted`, and then it ends by "length".

        Raises ApiError if the prompt leaves none.
        """
        context = self.engine.scheduler.capacity
        if len(tokens) >= context:
            message = f"a prompt of {len(tokens):,} tokens is more than the context of {context:,}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return min(context - len(tokens), wanted or self.options.max_new_tokens)

    async def begin(self, model: str, prepare: Callable[[], Awaitable[tuple[list[int], Sampling]]]) -> Answer:
        """Admit a request, and only then `prepare` its prompt. Raises ApiError; nothing is held then."""
        begun = time.monotonic()
        if self.draining or not self.engine.alive:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self._active >= self.options.slots + self.options.queue:
            raise ApiError(429, f"{self._active} requests are in work: try again", code="overloaded", retry_after=1)
        try:
            lease = self.registry.lease(model)
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        self._active += 1
        try:
            tokens, sampling = await prepare()
            await self._resident(lease)
            mailbox, events = self._mailbox_here(), asyncio.Queue[Event]()

            def on_event(event: Event) -> None:
                mailbox.post(partial(events.put_nowait, event))

            ticket = self.engine.submit(tokens, lease.key, sampling, on_event)
        except BaseException:
            self._give_back(lease)
            raise
        label = self.registry.base if lease.version is None else lease.version.name
        label = "blend" if ":" in label else label
        return Answer(self, lease, label, len(tokens), ticket, events, begun)

    def _mailbox_here(self) -> Mailbox:
        """Of the running loop; a server has one."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    async def _resident(self, lease: Lease) -> None:
        loading = self.registry.load(lease)
        if loading is None:
            return
        try:
            await asyncio.wrap_future(loading)
        except Busy as error:
            raise ApiError(429, str(error), code="adapter_memory_full", retry_after=1) from None
        except Unblendable as error:
            raise ApiError(400, str(error), param="model") from None
        except (AdapterError, OSError) as error:
            self.note(str(error))  # it names paths of this machine
            message = "this adapter cannot be read from disk now; the server's log says why"
            raise ApiError(503, message, param="model", code="adapter_unavailable") from None

    def _give_back(self, lease: Lease) -> None:
        self._active -= 1
        self.registry.release(lease)

    def count(self, answer: Answer, finish: str) -> None:
        """A request has ended."""
        self.metrics.requests.labels(answer.label, finish).inc()
        self.metrics.prompt_tokens.labels(answer.label).inc(answer.prompt_tokens)
        self.metrics.reused_tokens.labels(answer.label).inc(answer.ticket.sequence.reused)
        self.metrics.answer_tokens.labels(answer.label).inc(answer.produced)

    async def finish(self, answer: Answer) -> None:
        """Give back what a request held, once the engine has let go of it."""
        if not answer.ended:
            self.count(answer, "cancelled")
        if not answer.ended and self.engine.alive:
            mailbox, gone = self._mailbox_here(), asyncio.Event()
            self.engine.cancel(answer.ticket, lambda: mailbox.post(gone.set))
            await gone.wait()
        self._give_back(answer.lease)

    def close(self) -> None:
        """Finish what runs, then end every thread."""
        self.draining = True
        self.registry.close()
        self.engine.stop()
        self._encoder.shutdown()

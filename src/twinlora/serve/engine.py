"""The thread that owns the model: it takes requests, runs one pass after another, and says what came of each.

Everything that touches the model or the bank happens here, between or in passes; other threads hand it work through
one queue. A request brings a callback that gets its `Event`s, called on this thread.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinlora.adapters.bank import AdapterBank
from twinlora.errors import ModelError, OutOfMemory
from twinlora.model.attention import NO_MASK_SHAPE
from twinlora.model.forward import packing_refusal
from twinlora.model.generate import end_tokens, is_ragged
from twinlora.serve.kvcache import Pass, SlotCache
from twinlora.serve.sampler import choose, generator
from twinlora.serve.scheduler import Scheduler
from twinlora.serve.state import Chunk, Plan, Sampling, Sequence, TokenOut
from twinlora.serve.text import TextStream

__all__ = ["Engine", "Event", "PassReport", "Ticket", "require_servable"]

T = TypeVar("T")
_CUT = "the server was stopped"


@dataclass(frozen=True)
class Event:
    """What a pass gave to a request: a token and new text; `finish` is "stop", "length" or "error" at the end."""

    text: str
    token: TokenOut | None
    finish: str | None = None
    error: str | None = None


@dataclass
class Ticket:
    """A request in the engine."""

    sequence: Sequence
    sampling: Sampling
    on_event: Callable[[Event], None]
    text: TextStream
    source: torch.Generator | None
    ends: frozenset[int]  # tokens that end its answer
    produced: int = 0


@dataclass(frozen=True)
class PassReport:
    """What one pass did, for the metrics."""

    seconds: float
    tokens: int
    adapters: int


def require_servable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if requests of this model could not be batched without one seeing another."""
    reason = None
    if not tokenizer.is_fast:
        reason = "its tokenizer has no fast version"
    elif not is_ragged(model):
        reason = "its attention blocks are not replaced by ours"
    elif getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "default") in ("dynamic", "longrope"):
        reason = "its positions depend on the longest sequence of a batch"
    else:
        reason = packing_refusal(model, len(tokenizer))
    if reason:
        raise ModelError(f"this model cannot be served: {reason}; `twinlora chat` can run it")


class Engine:
    """Requests in, events out. `start` before, `stop` after."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: AdapterBank,
        *,
        slots: int,
        capacity: int,
        budget: int,
        on_pass: Callable[[PassReport], None] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.bank = model, tokenizer, bank
        self.device = model.get_input_embeddings().weight.device
        self.scheduler = Scheduler(slots, capacity, budget)
        self._cache = SlotCache(slots, capacity)
        self._ends = frozenset(end_tokens(model, tokenizer))
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self._on_pass = on_pass
        self._tickets: dict[Sequence, Ticket] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._stopping = False
        self.cut = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Any thread.

    def start(self) -> None:
        """Begin to take work."""
        self._thread.start()

    def cut_off(self) -> None:
        """End what runs and what waits with an error, now and from now on. A signal handler may call it."""
        self._inbox.put(self._cut_off)

    def stop(self) -> None:
        """Finish what is running and end."""
        self._inbox.put(self._end)
        self._thread.join()

    def rehearse(self) -> None:
        """One pass of the largest size, so that memory runs out now or never. Raises OutOfMemory."""
        count = min(self.scheduler.budget, self.scheduler.capacity - 1)
        ends: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit([0] * count, None, Sampling(1), ends.put)
        if error := ends.get().error:
            raise OutOfMemory(f"a pass of {count} tokens failed ({error}); lower --batch-tokens, --slots or --context")

    @property
    def alive(self) -> bool:
        """Whether passes can run."""
        return self._thread.is_alive()

    def submit(
        self, tokens: list[int], key: str | None, sampling: Sampling, on_event: Callable[[Event], None]
    ) -> Ticket:
        """Queue a prompt for the adapter content `key`, which must stay resident until the last event."""
        sequence = Sequence(next(self._numbers), key, list(tokens))
        text = TextStream(self.tokenizer, sampling.stop, after=tokens if sampling.continues else ())
        # Special tokens have no text: as a stop string such a one is looked for by its number.
        ends = self._ends | {self._special[stop] for stop in sampling.stop if stop in self._special}
        ticket = Ticket(sequence, sampling, on_event, text, generator(sampling, self.device), ends)
        self._inbox.put(lambda: self._add(ticket))
        return ticket

    def cancel(self, ticket: Ticket, then: Callable[[], object] | None = None) -> None:
        """Nobody wants the rest: free its slot; no event comes after `then` was called."""

        def work() -> None:
            if self._tickets.pop(ticket.sequence, None):
                self.scheduler.remove(ticket.sequence)
            if then is not None:
                then()

        self._inbox.put(work)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the engine's thread, between two passes."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(work)
        return future

    # The engine's thread.

    def _end(self) -> None:
        self._stopping = True

    def _cut_off(self) -> None:
        self.cut = True
        for ticket in self._tickets.values():
            self.scheduler.remove(ticket.sequence)
            ticket.on_event(Event("", None, "error", _CUT))
        self._tickets.clear()

    def _add(self, ticket: Ticket) -> None:
        if self.cut:
            ticket.on_event(Event("", None, "error", _CUT))
            return
        self._tickets[ticket.sequence] = ticket
        self.scheduler.add(ticket.sequence)

    def _run(self) -> None:
        try:
            self._passes()
        finally:  # nobody waits for an engine that has ended
            self._stopping = True
            self._take()
            for ticket in self._tickets.values():
                ticket.on_event(Event("", None, "error", "the engine has stopped"))

    @torch.inference_mode()
    def _passes(self) -> None:
        while not self._stopping or self.scheduler.busy:
            self._take()
            plan = self.scheduler.plan()
            if not plan.chunks:
                continue
            begun = time.perf_counter()
            try:
                picked = self._pass(plan)
            except Exception as error:  # one bad pass must not end the others; its sequences are told
                for chunk in plan.chunks:
                    self._fail(chunk, f"{type(error).__name__}: {error}")
                continue
            self.scheduler.done(plan)
            for chunk, token in picked:
                if token is None:
                    self._fail(chunk, "its outputs are not finite")
                else:
                    self._advance(self._tickets[chunk.sequence], token)
            self._report(plan, time.perf_counter() - begun)

    def _take(self) -> None:
        """Do what came in; wait for it if there is nothing else to do."""
        if not self.scheduler.busy and not self._stopping:
            self._inbox.get()()
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _pass(self, plan: Plan) -> list[tuple[Chunk, TokenOut | None]]:
        """Run the model; the tokens that follow the chunks that end."""
        for copy in plan.copies:
            self._cache.copy(copy.source, copy.target, copy.count)
        chunks = sorted(plan.chunks, key=lambda c: (c.sequence.key or "", c.sequence.number))
        ending = [chunk for chunk in chunks if chunk.ends]
        keys, starts, head_starts = _by_adapter(chunks)
        where = [(c.sequence.slot, c.start, c.count) for c in chunks if c.sequence.slot is not None]
        layout = Pass(self._cache, where, self.device)
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.start + c.count]]
        last = [stop - 1 for chunk, stop in zip(chunks, layout.starts[1:], strict=True) if chunk.ends]
        with self.bank.rows(keys, starts, head_starts):
            logits: Tensor = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=layout.positions(),
                attention_mask=torch.empty(NO_MASK_SHAPE, device=self.device),
                layout=layout,
                use_cache=False,
                logits_to_keep=torch.tensor(last, dtype=torch.long, device=self.device),
            ).logits[0]
        tickets = [self._tickets[chunk.sequence] for chunk in ending]
        chosen = choose(logits, [t.sampling for t in tickets], [t.source for t in tickets]) if ending else []
        return list(zip(ending, chosen, strict=True))

    def _advance(self, ticket: Ticket, token: TokenOut) -> None:
        """Give a token to its request, and end it if that was the last one."""
        ticket.produced += 1
        sequence, text, finish = ticket.sequence, "", None
        if token.token in ticket.ends:
            finish = "stop"
        else:
            sequence.tokens.append(token.token)
            text = ticket.text.push(token.token)
            full = ticket.produced == ticket.sampling.max_tokens or len(sequence.tokens) == self.scheduler.capacity
            finish = "stop" if ticket.text.stopped else "length" if full else None
        if finish:
            text += ticket.text.finish()
            finish = "stop" if ticket.text.stopped else finish
            del self._tickets[sequence]
            self.scheduler.remove(sequence)
        ticket.on_event(Event(text, token, finish))

    def _fail(self, chunk: Chunk, error: str) -> None:
        ticket = self._tickets.pop(chunk.sequence)
        self.scheduler.remove(chunk.sequence, keep=False)
        ticket.on_event(Event("", None, "error", error))

    def _report(self, plan: Plan, seconds: float) -> None:
        if self._on_pass is not None:
            adapters = len({chunk.sequence.key for chunk in plan.chunks} - {None})
            tokens = sum(chunk.count for chunk in plan.chunks)
            self._on_pass(PassReport(seconds, tokens, adapters))


def _by_adapter(chunks: list[Chunk]) -> tuple[list[str | None], list[int], list[int]]:
    """Adapter keys in the order of sorted chunks, and where their rows start, in the pass and in the head."""
    keys: list[str | None] = []
    starts, head_starts = [0], [0]
    for key, group in itertools.groupby(chunks, key=lambda chunk: chunk.sequence.key):
        members: list[Any] = list(group)
        keys.append(key)
        starts.append(starts[-1] + sum(chunk.count for chunk in members))
        head_starts.append(head_starts[-1] + sum(chunk.ends for chunk in members))
    return keys, starts, head_starts

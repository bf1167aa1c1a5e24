"""What is served: sequences, what a pass does with them, and how an answer is chosen. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Chunk", "Copy", "Plan", "Sampling", "Sequence", "TokenOut"]


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer so far. `key` is the content of the adapter that answers, None the bare base."""

    number: int
    key: str | None
    tokens: list[int]
    slot: int | None = None
    computed: int = 0  # tokens whose keys and values lie in the slot
    reused: int = 0  # of them, those that came from another sequence

    @property
    def remaining(self) -> int:
        """Tokens that must pass through the model before the next one is known."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence, from token `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def ends(self) -> bool:
        """Whether the next token is known after this chunk."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True)
class Copy:
    """The first `count` tokens of slot `source` are those of slot `target`, too."""

    source: int
    target: int
    count: int


@dataclass
class Plan:
    """One pass: copies first, then the chunks."""

    copies: list[Copy] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and what ends an answer."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no log-probabilities at all
    continues: bool = False  # the answer's text goes on from the prompt's, as that of a chat does not


@dataclass(frozen=True)
class TokenOut:
    """A chosen token; its log-probability in nats, and the likeliest ones, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

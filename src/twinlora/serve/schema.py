"""The requests that are understood, in the words of OpenAI's API; what would change an answer otherwise is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from twinlora.serve.registry import NAME

__all__ = ["ChatRequest", "CompletionRequest", "PinRequest", "RegisterRequest", "ReplaceRequest"]


def _is_text(given: str) -> str:
    """JSON can spell half of a character, which no encoding has."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError("not text: it holds a lone surrogate") from None
    return given


def _of_one_kind(given: Any) -> Any:
    """The first wrong item of a long list ends its check; pydantic would make an error of each."""
    if isinstance(given, list) and given:
        kind = str if isinstance(given[0], str) else int
        wrong = next((i for i, item in enumerate(given) if type(item) is not kind or item == "" or item < kind()), None)
        if wrong is not None:
            raise ValueError(f"item {wrong}: expected token ids from 0, or one text")
    return given


_TEXT = AfterValidator(_is_text)  # stands behind limits of length, which are then told in characters
Text = Annotated[str, _TEXT]
Prompt = Annotated[str, Field(min_length=1), _TEXT]
Model = Annotated[
    str, Field(min_length=1, max_length=500, description="The base, an adapter, name@sha256, or a blend."), _TEXT
]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200), _TEXT]
Nothing = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; images and sounds are not understood."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """A message of a chat. Clients send our own answers back with all their fields, those that hold nothing, too."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000)]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_Strict):
    """What an answer looks like: text."""

    type: Literal["text"]


class _Generation(_Strict):
    """What both kinds of request share."""

    model: Model
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    user: str | None = None  # said by many clients; changes nothing
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams alone: give stream true")
        return self

    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000), FailFast()]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self


class CompletionRequest(_Generation):
    """POST /v1/completions. A list of integers is a prompt of token ids; of texts there may be one."""

    prompt: Annotated[
        Prompt
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
        | Annotated[list[Prompt], Field(min_length=1, max_length=1)],
        BeforeValidator(_of_one_kind),
    ]
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class RegisterRequest(_Strict):
    """POST /admin/adapters: `path` is a directory inside of --adapters-dir."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    path: Annotated[str, Field(min_length=1, max_length=1000), _TEXT]


class ReplaceRequest(_Strict):
    """PUT /admin/adapters/{name}."""

    path: Annotated[str, Field(min_length=1, max_length=1000), _TEXT]


class PinRequest(_Strict):
    """POST /admin/adapters/{name}/pin."""

    pinned: bool

"""What a record means. Five forms are known by their columns:

chat           {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}
ShareGPT       {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}
Alpaca         {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["…", "…"]]}
completion     {"prompt": "…", "completion": "…"}
text           {"text": "…"}

The first three become chats, so that the model's own template writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from twinlora import atomic
from twinlora.errors import DataError

__all__ = ["FORMS", "Form", "Row", "file_digest", "form_of", "write_rows"]

_ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row: a chat, a prompt with its completion, or a text. `where` names its place for messages.

    A chat ends with the assistant's last answer; `unanswered` messages after it were left out. `weight` is how often
    the row is seen in an epoch.
    """

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    unanswered: int = 0
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in a file."""
        if self.messages:
            return {"messages": list(self.messages)} | ({"tools": list(self.tools)} if self.tools else {})
        return {"text": self.text} if self.text else {"prompt": self.prompt, "completion": self.completion}

    @property
    def answer(self) -> str:
        """What a model should say last; a text has no answer."""
        return str(self.messages[-1]["content"]) if self.messages else self.completion

    @property
    def question(self) -> str:
        """The last thing said to the model, for people to read."""
        if not self.messages:
            return self.prompt
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it that a model could learn to say."""
        return not any(map(says_something, self.messages)) and not self.completion.strip() and not self.text.strip()


def says_something(message: dict[str, Any]) -> bool:
    """Whether `message` is an answer of the assistant with words or a tool call."""
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


@dataclass(frozen=True)
class Form:
    """One way to write a row: the columns it must have, those it may have, and how to read it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Row]

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is used."""
        return self.required + self.optional


def form_of(record: dict[str, Any]) -> Form:
    """The form of `record`, by its columns. Raises DataError that names what was expected and what is there."""
    for form in FORMS:
        if all(column in record for column in form.required):
            return form
    found = ", ".join(f"`{column}`" for column in record) or "no columns"
    known = "; ".join(" and ".join(f"`{column}`" for column in form.required) for form in FORMS)
    raise DataError(
        f"unknown form: found {found}; expected {known}; map others: --columns prompt=COLUMN,completion=COLUMN"
    )


def _chat_row(column: str, record: dict[str, Any], where: str) -> Row:
    messages = _messages(record[column], column)
    system = _text(record, "system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _chat(messages, where, _tools(record.get("tools")))


def _alpaca_row(record: dict[str, Any], where: str) -> Row:
    pairs = _json_value(record.get("history") or [], "history")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in pairs
    ):
        raise DataError("`history`: expected pairs of question and answer")
    asked = "\n\n".join(part for part in (_text(record, "instruction"), _text(record, "input")) if part)
    said = [*(part for pair in pairs for part in pair), asked, _text(record, "output")]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]
    if system := _text(record, "system"):
        messages.insert(0, {"role": "system", "content": system})
    return _chat(messages, where, ())


def _completion_row(record: dict[str, Any], where: str) -> Row:
    return Row(where, prompt=_text(record, "prompt"), completion=_text(record, "completion"))


def _text_row(record: dict[str, Any], where: str) -> Row:
    return Row(where, text=_text(record, "text"))


FORMS = (
    Form("chats (messages)", ("messages",), ("system", "tools"), partial(_chat_row, "messages")),
    Form("chats (ShareGPT)", ("conversations",), ("system", "tools"), partial(_chat_row, "conversations")),
    Form("instructions (Alpaca)", ("instruction", "output"), ("input", "system", "history"), _alpaca_row),
    Form("prompts with completions", ("prompt", "completion"), (), _completion_row),
    Form("texts", ("text",), (), _text_row),
)


def _chat(messages: list[dict[str, Any]], where: str, tools: tuple[dict[str, Any], ...]) -> Row:
    last = max((i for i, message in enumerate(messages) if says_something(message)), default=len(messages) - 1)
    return Row(where, tuple(messages[: last + 1]), tools=tools, unanswered=len(messages) - 1 - last)


def _text(record: dict[str, Any], column: str) -> str:
    """The text in `column`; nothing and null are the empty text."""
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"`{column}` is {type(value).__name__}, expected text")
    return _sound(value or "", f"`{column}`")


def _sound(text: str, what: str) -> str:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has half of a character at {error.start} (a torn \\u escape)") from None
    return text


def _json_value(value: Any, what: str) -> Any:
    """`value`, read as JSON if it is text (tables have no lists)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"`{what}` is text but not JSON: {error}") from None


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    tools = _json_value(value or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("`tools` is not a list of objects")
    return tuple(tools)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    value = _json_value(value, column)
    if not isinstance(value, list) or not value:
        raise DataError(f"`{column}` is not a list with at least one message")
    return [_message(message, index) for index, message in enumerate(value)]


def _message(given: Any, index: int) -> dict[str, Any]:
    message = dict(given) if isinstance(given, dict) else {}
    speaker = message.pop("role", None) or message.pop("from", None)
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
    if role not in _ROLES:
        known = ", ".join((*_ROLES, *_SPEAKERS))
        raise DataError(f"message {index}: expected a `role` (or `from`) of {known}; found {speaker!r}")
    content, value = message.pop("content", None), message.pop("value", None)
    content = value if content is None else content
    calls = message.pop("tool_calls", None)
    if speaker == "function_call":
        calls, content = _json_value(content, f"message {index}"), ""
    if calls:
        message["tool_calls"] = _tool_calls(calls, index)
    if isinstance(content, list):  # parts, as in the OpenAI form
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise DataError(f"message {index} ({role}): `content` has parts that are not text")
        content = "".join(part["text"] for part in content)
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise DataError(f"message {index} ({role}): `content` is not text but {type(content).__name__}")
    return {"role": role, "content": _sound(content, f"message {index} ({role})"), **message}


def _tool_calls(value: Any, index: int) -> list[dict[str, Any]]:
    """Calls as templates take them: `{"type": "function", "function": {"name": …, "arguments": {…}}}`."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"message {index}: a tool call has no `name`")
        arguments = _json_value(function.get("arguments") or {}, f"message {index}: arguments")
        extra = {key: inner for key, inner in call.items() if key == "id"}
        calls.append({"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSONL; returns `path`."""
    atomic.write_text(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Rows of a data file. Two forms are read from JSONL, one object a line:

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
{"prompt": "…", "completion": "…"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinlora import atomic
from twinlora.errors import DataError

__all__ = ["Row", "file_digest", "read_rows", "write_rows"]

_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 10  # bad rows listed in an error


@dataclass(frozen=True)
class Row:
    """One training or test row: a chat, or a prompt with its completion. `where` is `file:line` for messages."""

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in a file."""
        return (
            {"messages": list(self.messages)}
            if self.messages
            else {"prompt": self.prompt, "completion": self.completion}
        )

    @property
    def answer(self) -> str:
        """What a model should say last."""
        return str(self.messages[-1]["content"]) if self.messages else self.completion

    @property
    def question(self) -> str:
        """The last thing said to the model, for people to read."""
        if not self.messages:
            return self.prompt
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """All rows of a JSONL file, or the first `limit`. Raises DataError that lists every bad line."""
    if path.is_dir():
        raise DataError(f"data {path}: is a directory; expected a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(
            f"data {path}: no such file; expected JSONL with `messages` or `prompt` and `completion`"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"data {path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"data {path}: cannot be read: {error.strerror}") from None
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), f"{path}:{number}"))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
        except DataError as error:
            problems.append(f"line {number}: {error}")
        if limit is not None and len(rows) >= limit:
            break
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise DataError(f"data {path}: {len(problems)} bad line(s), expected one JSON object a line\n  {listed}{more}")
    if not rows:
        raise DataError(f"data {path}: no rows; expected JSONL with `messages` or `prompt` and `completion`")
    return rows


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"expected an object, found {type(value).__name__}")
    if "messages" in value:
        return Row(where, messages=_messages(value["messages"]))
    if "prompt" in value and "completion" in value:
        for key in ("prompt", "completion"):
            if not isinstance(value[key], str):
                raise DataError(f"`{key}` is {type(value[key]).__name__}, expected text")
        if not value["completion"].strip():
            raise DataError("`completion` is empty: nothing to train on")
        return Row(where, prompt=value["prompt"], completion=value["completion"])
    raise DataError(
        f"expected `messages`, or `prompt` and `completion`; found {', '.join(map(str, value)) or 'no keys'}"
    )


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError("`messages` is not a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"message {index}: expected a `role` of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"message {index} ({message['role']}): `content` is not text")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last message is from {messages[-1]['role']!r}; expected the assistant's answer")
    if not messages[-1]["content"].strip():
        raise DataError("the last answer is empty: nothing to train on")
    return tuple(messages)


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSONL; returns `path`."""
    atomic.write_text(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

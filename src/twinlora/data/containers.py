"""Files to records: JSON Lines, JSON, CSV, TSV and Parquet, told apart by content first, then by name.

Every reader yields `(number, record)`: the number of its line (JSON Lines, CSV) or of its row (JSON, Parquet), from 1,
and the object that stands there, or the DataError that says why none does. So one bad line does not hide the others.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinlora.errors import DataError

__all__ = ["SUFFIXES", "Container", "json_lines", "open_container"]

Records = Iterator[tuple[int, dict[str, Any] | DataError]]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_LISTS_OF_A_ROW = ("messages", "conversations", "tools", "history")  # an object with these is one row


@dataclass(frozen=True)
class Container:
    """What kind of file it is, what its numbers count, and its records."""

    kind: str
    unit: str  # line or row
    records: Records

    def where(self, name: str, number: int) -> str:
        """A place for people: `name:7` is a line, `name row 7` the seventh row."""
        return f"{name}:{number}" if self.unit == "line" else f"{name} row {number}"


def open_container(path: Path) -> Container:
    """Recognise the file at `path`. Raises DataError if it is none of these or cannot be read at all."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise DataError(f"no such file; expected {', '.join(SUFFIXES)}, or a hub data set owner/name") from None
    except IsADirectoryError:
        raise DataError("is a directory; name the files in it") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return Container("Parquet", "row", _parquet(path))
    if head.startswith(_UTF16) or b"\0" in head:
        raise DataError(
            f"not UTF-8 text; save it as UTF-8, for example: iconv -f UTF-16 -t UTF-8 {path} > utf8{suffix}"
        )
    if suffix in (".csv", ".tsv"):
        return Container(suffix[1:].upper(), "line", _csv(path, "\t" if suffix == ".tsv" else ","))
    if suffix == ".json" and not _is_lines(path):
        return Container("JSON", "row", _json(path))
    return Container("JSON Lines", "line", _lines_of(path))


def _is_lines(path: Path) -> bool:
    """Whether a .json file holds an object a line: its first line is one and something follows."""
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(_BOM).strip()), b"").removeprefix(_BOM)
        try:
            return first.lstrip().startswith(b"{") and bool(json.loads(first)) and bool(file.read(4096).strip())
        except ValueError:
            return False


def _lines_of(path: Path) -> Records:
    with path.open("rb") as file:
        yield from json_lines(file)


def json_lines(lines: Iterable[bytes]) -> Records:
    """One object a line; empty lines are passed over."""
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.strip():
            yield number, _loads(content)


def _loads(content: bytes) -> dict[str, Any] | DataError:
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON ({error.msg} at column {error.colno})")
    except DataError as error:
        return error
    except (ValueError, RecursionError) as error:  # an endless number, or brackets without end
        return DataError(f"not JSON ({error})")
    return value if isinstance(value, dict) else DataError(f"expected an object, found {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise DataError(f"{_repeated([key for key, _ in pairs])} stands in it twice")
    return value


def _repeated(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names) if names.count(name) > 1)


def _json(path: Path) -> Records:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if not text.strip():
            return
        ends = (
            "; it ends early: was it cut off?" if error.pos >= len(text.rstrip()) - 1 or "Unterm" in error.msg else ""
        )
        raise DataError(f"not JSON ({error.msg} at line {error.lineno}, column {error.colno}){ends}") from None
    except RecursionError as error:
        raise DataError(f"not JSON ({error})") from None
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list) and key not in _LISTS_OF_A_ROW]
        if len(lists) > 1:
            raise DataError(f"expected a list of rows, or an object with one list; found {', '.join(lists)}")
        value = value[lists[0]] if lists else [value]
    if not isinstance(value, list):
        raise DataError(f"expected a list of rows, found {type(value).__name__}")
    for number, row in enumerate(value, 1):
        yield number, row if isinstance(row, dict) else DataError(f"expected an object, found {type(row).__name__}")


def _csv(path: Path, delimiter: str) -> Records:
    csv.field_size_limit(sys.maxsize)  # its default refuses texts above 128 KiB
    with path.open("rb") as file:
        reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"not UTF-8 text ({error.reason} after line {start}); save it as UTF-8") from None
            except csv.Error as error:
                yield start, DataError(f"not {path.suffix[1:].upper()} ({error}): is a quote left open?")
                return
            if not header:
                header = _header(cells)
            elif len(cells) == len(header):
                yield start, dict(zip(header, cells, strict=True))
            elif cells:
                yield start, DataError(f"{len(cells)} cells, but the first line names {len(header)} columns")


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise DataError(f"the first line names a column twice: {_repeated(names)}")
    return names


def _parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise DataError(f"a column is there twice: {_repeated(file.schema_arrow.names)}")
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        for number, row in enumerate(rows, 1):
            yield number, {column: _without_nulls(value) for column, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not readable as Parquet: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Parquet fills every field that an object lacks with null; templates take what is there for meant."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value

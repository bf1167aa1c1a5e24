"""Where rows come from: files of any container, hub data sets, standard input; several of them, each with a weight.

`PATH@0.5` shows a random half of the rows of PATH in each epoch, `PATH@2` every row twice.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from twinlora.data import hub
from twinlora.data.containers import Container, json_lines, open_container
from twinlora.data.formats import Form, Row, file_digest, form_of
from twinlora.errors import DataError

__all__ = ["Data", "Loaded", "Note", "first_of", "is_stream", "listed", "read", "read_rows", "split_weight"]

Note = Callable[[str], None]

_SHOWN = 10  # bad rows listed in an error
_WEIGHT = re.compile(r"(.+)@(\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Loaded:
    """What one source gave."""

    source: str
    form: str
    container: str
    rows: list[Row]
    sha256: str
    weight: float = 1.0
    unused: tuple[str, ...] = ()  # columns that nothing reads
    unmapped: bool = False  # --columns named none of its columns

    def __str__(self) -> str:
        """The line that says what was recognised."""
        parts = [f"{len(self.rows):,} {self.form}, {self.container}"]
        if self.weight != 1:
            parts.append(f"each seen {self.weight:g} times an epoch")
        if unanswered := sum(row.unanswered > 0 for row in self.rows):
            parts.append(f"{unanswered:,} end with messages after the last answer, which are left out")
        if self.unmapped:
            parts.append("--columns does not concern it")
        if self.unused:
            parts.append(f"columns not used: {', '.join(self.unused)}")
        return f"data {self.source}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Data:
    """All sources of one option, in their order."""

    sources: list[Loaded]

    @property
    def rows(self) -> list[Row]:
        """Every row."""
        return [row for source in self.sources for row in source.rows]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each source by its name; by its whole path where another one has that name."""
        digests: dict[str, str] = {}
        for source in self.sources:
            name = Path(source.source).name if Path(source.source).is_file() else source.source
            name = name if digests.get(name, source.sha256) == source.sha256 else source.source
            digests[name] = source.sha256
        return digests

    @property
    def identity(self) -> str:
        """What makes two runs see the same rows: contents and weights, in order."""
        return ", ".join(s.sha256 + (f"@{s.weight:g}" if s.weight != 1 else "") for s in self.sources)


def split_weight(source: str) -> tuple[str, float]:
    """`data.jsonl@0.5` -> ("data.jsonl", 0.5). Raises DataError for a weight of 0."""
    match = _WEIGHT.fullmatch(source)
    if not match or Path(source).exists():
        return source, 1.0
    if float(match[2]) == 0:
        raise DataError(f"data {source}: a weight of 0 shows no row; leave the source out, or give a weight above 0")
    return match[1], float(match[2])


def is_stream(source: str) -> bool:
    """Whether `source` can be read only once: standard input or a named pipe."""
    path = Path(source)
    return source == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def read_rows(sources: str | Path | Sequence[str], limit: int | None = None, columns: Sequence[str] = ()) -> list[Row]:
    """All rows of `sources`, or the first `limit`. Raises DataError that lists every bad row."""
    return read(sources, limit=limit, columns=columns).rows


def read(
    sources: str | Path | Sequence[str],
    *,
    columns: Sequence[str] = (),
    limit: int | None = None,
    note: Note = lambda text: None,
) -> Data:
    """Read every source and say through `note` what it is. `columns` are FIELD=COLUMN for columns of other names.

    Raises DataError that names the source, every bad row of it, and what was expected.
    """
    loaded: list[Loaded] = []
    mapping = {column: name for name, _, column in (entry.partition("=") for entry in columns)}
    for given in [str(sources)] if isinstance(sources, (str, Path)) else sources:
        left = None if limit is None else limit - sum(len(source.rows) for source in loaded)
        if left == 0:
            break
        source, weight = split_weight(given)
        one = _Reader(source, weight, mapping, left).load()
        note(str(one))
        loaded.append(one)
    return Data(loaded)


class _Unrecognised(DataError):
    """The form of a source is unknown: what is wrong with its first row is wrong with all."""


class _Reader:
    """One source on its way from records to rows; all its problems are collected."""

    def __init__(self, source: str, weight: float, mapping: dict[str, str], limit: int | None) -> None:
        self.source, self.weight, self.mapping, self.limit = source, weight, mapping, limit
        self.form: Form | None = None
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.unused: dict[str, None] = {}  # an ordered set
        self.unmapped = False

    def load(self) -> Loaded:
        kinds: list[str] = []
        hashes: list[str] = []
        try:
            for name, container, digest in self._containers():
                self._take(name, container)
                kinds.append(container.kind)
                hashes.append(digest())
        except DataError as error:
            raise DataError(f"data {self.source}: {error}") from None
        if self.problems:
            raise DataError(f"data {self.source}: {listed(self.problems, 'cannot be read')}")
        if not self.rows or self.form is None:
            raise DataError(f"data {self.source}: no rows; twinlora data check --help names the forms that are read")
        sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        kind = kinds[0] if len(kinds) == 1 else f"{len(kinds)} files of {kinds[0]}"
        unused = tuple(self.unused)
        return Loaded(self.source, self.form.name, kind, self.rows, sha256, self.weight, unused, self.unmapped)

    def _containers(self) -> Iterator[tuple[str, Container, Callable[[], str]]]:
        """Each file with the name for messages, and the SHA-256 of what was read."""
        if is_stream(self.source):
            stream = _Stream(sys.stdin.buffer if self.source == "-" else Path(self.source).open("rb"))  # noqa: SIM115
            yield self.source, Container("JSON Lines", "line", json_lines(stream)), stream.digest
        elif not Path(self.source).exists() and hub.is_hub_name(self.source):
            repo = self.source.partition(":")[0]
            for name, path in hub.fetch(self.source):
                yield f"{repo}:{name}", open_container(path), partial(file_digest, path)
        else:
            path = Path(self.source)
            yield self.source, open_container(path), partial(file_digest, path)

    def _take(self, name: str, container: Container) -> None:
        for number, record in container.records:
            if self.limit is not None and len(self.rows) >= self.limit:
                return
            place = f"{'' if name == self.source else f'{name} '}{container.unit} {number}"
            try:
                if isinstance(record, DataError):
                    raise record
                record = self._mapped(record)
                self.form = self.form or self._recognise(record, place)
                self.rows.append(self._row(self.form, record, container.where(name, number)))
            except _Unrecognised:
                raise
            except DataError as error:
                self.problems.append(f"{place}: {error}")

    def _recognise(self, record: dict[str, Any], place: str) -> Form:
        try:
            return form_of(record)
        except DataError as error:
            raise _Unrecognised(f"{place}: {error}") from None

    def _row(self, form: Form, record: dict[str, Any], where: str) -> Row:
        if not all(column in record for column in form.required):
            other = form_of(record).name
            raise DataError(f"{other}, but the rows before are {form.name}; give each form a file of its own")
        self.unused |= dict.fromkeys(column for column in record if column not in form.columns)
        return replace(form.read(record, where), weight=self.weight)

    def _mapped(self, record: dict[str, Any]) -> dict[str, Any]:
        missing = [column for column in self.mapping if column not in record]
        if missing and len(missing) < len(self.mapping):  # a source with none of them needs no mapping
            found = ", ".join(f"`{column}`" for column in record)
            raise DataError(f"--columns names `{', '.join(missing)}`, which is not here; found {found}")
        if missing:
            self.unmapped = True
            return record
        taken = set(self.mapping.values())
        kept = {column: value for column, value in record.items() if column not in taken or column in self.mapping}
        return {self.mapping.get(column, column): value for column, value in kept.items()}


class _Stream:
    """Lines of a stream, hashed as they pass."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self._hash.update(line)
            yield line

    def digest(self) -> str:
        """SHA-256 of the lines so far, in hex."""
        return self._hash.hexdigest()


def listed(places: Sequence[str], what: str) -> str:
    """`12 rows {what}`, the first ten, and how many more."""
    rows = "row" if len(places) == 1 else "rows"
    return f"{len(places):,} {rows} {what}\n  {first_of(places)}"


def first_of(places: Sequence[str]) -> str:
    """The first ten, a line each, and how many more."""
    more = f"\n  and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
    return "\n  ".join(places[:_SHOWN]) + more

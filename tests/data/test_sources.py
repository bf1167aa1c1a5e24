import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.conftest import chat, write_jsonl
from twinlora.data.formats import write_rows
from twinlora.data.sources import is_stream, read, read_rows, split_weight
from twinlora.errors import DataError

PAIRS = [{"prompt": 'say "hi",\nplease', "completion": "你好 🙂"}, {"prompt": "b", "completion": "c\n\nd"}]
CSV = '\ufeffprompt,completion\r\n"say ""hi"",\nplease",你好 🙂\r\n\r\nb,"c\n\nd"\r\n'


def _write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_bytes(CSV.encode())
    elif path.suffix == ".tsv":
        path.write_text(CSV.replace(",", "\t").replace('""hi""\t', '""hi"",'), encoding="utf-8", newline="")
    elif path.stem == "wrapped":
        path.write_text(json.dumps({"version": 1, "data": rows}, indent=1), encoding="utf-8")
    elif path.suffix == ".json" and path.stem == "list":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.stem == "windows":
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n")
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.jsonl", "JSON Lines"), ("windows.jsonl", "JSON Lines"), ("lines.json", "JSON Lines"), ("list.json", "JSON"),
        ("wrapped.json", "JSON"), ("a.csv", "CSV"), ("a.tsv", "TSV"), ("a.parquet", "Parquet"),
    ],
)  # fmt: skip
def test_every_container_gives_the_same_rows(tmp_path, name, kind):
    notes = []
    path = _write(tmp_path / name, PAIRS)
    data = read(path, note=notes.append)
    assert [(row.prompt, row.completion) for row in data.rows] == [(p["prompt"], p["completion"]) for p in PAIRS]
    assert notes == [f"data {path}: 2 prompts with completions, {kind}"]
    assert data.rows[1].where.startswith(str(path))
    assert read_rows(path, 1) == data.rows[:1]


def test_places_are_lines_of_the_file_where_it_has_lines(tmp_path):
    path = _write(tmp_path / "a.csv", PAIRS)
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"], "quoted newlines are lines, too"
    path = _write(tmp_path / "list.json", PAIRS)
    assert [row.where for row in read_rows(path)] == [f"{path} row 1", f"{path} row 2"]


def test_bad_lines_are_all_named(tmp_path):
    lines = [
        json.dumps(chat("a", "b")).encode(),
        b"{not json",
        b'{"messages": []}',
        b'{"text": "x"}',
        b'{"messages": [{"role": "wizard", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": 3}]}',
        b'{"messages": [], "messages": []}',
        b"[1]",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b"[" * 100_000,
        b'{"messages": [{"role": "user"}]}',
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "bad.jsonl")
    message = str(caught.value)
    for part in (
        "11 rows cannot be read",
        "line 2: not JSON",
        "line 3: `messages` is not a list",
        "line 4: texts, but the rows before are chats (messages)",
        "line 5: message 0: expected a `role`",
        "line 6: message 0 (user): `content` is not text but int",
        "line 7: `messages` stands in it twice",
        "line 8: expected an object, found list",
        "line 9: not UTF-8 text",
        "line 10: message 0 (user) has half of a character",
        "line 11: not JSON",
        "and 1 more",
    ):
        assert part in message


def test_ten_thousand_bad_lines_are_a_short_message(tmp_path):
    for name, text in (("a.jsonl", "nonsense\n" * 10_000), ("b.jsonl", '{"question": "x"}\n' * 10_000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as caught:
            read_rows(tmp_path / name)
        assert len(str(caught.value)) < 1200
    assert "line 1: unknown form: found `question`; expected `messages`" in str(caught.value)
    assert "--columns prompt=COLUMN" in str(caught.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \r\n", "no rows"),
        ("a.json", b" ", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"prompt,completion\n", "no rows"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "not UTF-8 text; save it as UTF-8, for example: iconv"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "not UTF-8 text"),
        ("a.csv", "prompt,completion\nä,ö\n".encode("latin-1"), r"not UTF-8 text \(.* after line 1\)"),
        ("a.json", b'[{"text": "whole"}, {"text": "to', r"line 1, column \d+\); it ends early"),
        ("a.json", b'[{"text": "whole"},\n', r"it ends early"),
        ("a.json", b'{"a": [1], "b": [2]}', "an object with one list; found a, b"),
        ("a.json", b"3", "expected a list of rows, found int"),
        ("a.json", b'[{"text": "x"}, 4]', "row 2: expected an object, found int"),
        ("a.csv", b"prompt,completion,prompt\n1,2,3\n", "names a column twice: `prompt`"),
        (
            "a.csv",
            b"prompt,completion\n1,2,3\nx,y\n4\n",
            r"2 rows cannot be read\s+line 2: 3 cells.*2 columns\s+line 4: 1 cells",
        ),
        ("a.csv", b'prompt,completion\n1,2\n3,"open\n', "line 3: not CSV .*is a quote left open"),
        ("a.csv", b"prompt;completion\n1;2\n", "unknown form: found `prompt;completion`"),
        ("a.parquet", b"nothing of the kind", "not readable as Parquet"),
        ("a.parquet", b"PAR1 cut off", "not readable as Parquet"),
    ],
)
def test_files_that_are_wrong_as_a_whole(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)data {tmp_path / name}: .*{message}"):
        read_rows(tmp_path / name)


def test_no_file_and_a_directory(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_rows("train/none.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        read_rows(tmp_path)


def test_parquet_of_another_schema_and_with_a_column_twice(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": [b"x"], "label": [1]}), path)
    with pytest.raises(DataError, match="unknown form: found `image`, `label`"):
        read_rows(path)
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), path)
    with pytest.raises(DataError, match="a column is there twice: `text`"):
        read_rows(path)


def test_parquet_chats_lose_the_nulls_that_parquet_adds(tmp_path):
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "name": "f"},
        {"role": "assistant", "content": "a"},
    ]
    (row,) = read_rows(_write(tmp_path / "a.parquet", [{"messages": messages}]))
    assert row.messages[0] == {"role": "user", "content": "q"}
    assert row.messages[1]["content"] == ""
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert row.messages[2] == {"role": "tool", "content": "r", "name": "f"}


def test_columns_of_other_names(tmp_path):
    mine = _write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "prompt": "not this one", "id": 3}])
    theirs = _write(tmp_path / "b.jsonl", PAIRS)
    notes = []
    data = read([str(mine), str(theirs)], columns=["prompt=question", "completion=answer"], note=notes.append)
    assert (data.rows[0].prompt, data.rows[0].completion) == ("q", "a")
    assert notes[0].endswith("JSON Lines; columns not used: id")
    assert notes[1].endswith("; --columns does not concern it")
    with pytest.raises(DataError, match=r"line 1: --columns names `reply`, which is not here; found `question`"):
        read(mine, columns=["prompt=question", "completion=reply"])


def test_several_sources_with_weights(tmp_path):
    one = _write(tmp_path / "a.jsonl", PAIRS)
    two = _write(tmp_path / "b.parquet", [{"text": "t"}])
    odd = _write(tmp_path / "c@2", PAIRS)
    notes = []
    data = read([str(one), f"{two}@0.5", str(odd)], note=notes.append)
    assert [row.weight for row in data.rows] == [1, 1, 0.5, 1, 1]
    assert notes[1] == f"data {two}: 1 texts, Parquet; each seen 0.5 times an epoch"
    assert set(data.digests) == {"a.jsonl", "b.parquet", "c@2"}
    assert data.identity != read([str(one), str(two), str(odd)]).identity
    assert len(read([str(one), str(two)], limit=2).sources) == 1
    assert split_weight("owner/name:part@3") == ("owner/name:part", 3.0)
    with pytest.raises(DataError, match="a weight of 0 shows no row"):
        split_weight("a.jsonl@0")


def test_digests_tell_files_of_one_name_apart(tmp_path):
    (tmp_path / "x").mkdir()
    a = _write(tmp_path / "a.jsonl", PAIRS)
    b = _write(tmp_path / "x" / "a.jsonl", PAIRS[:1])
    assert list(read([str(a), str(b)]).digests) == ["a.jsonl", str(b)]
    assert list(read([str(a), str(a)]).digests) == ["a.jsonl"]


def test_a_named_pipe_is_read_as_a_stream_and_hashed(tmp_path):
    file = _write(tmp_path / "a.jsonl", PAIRS)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_stream(str(pipe))
    assert is_stream("-")
    assert not is_stream(str(file))
    writer = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()))
    writer.start()
    data = read(pipe)
    writer.join()
    assert [row.completion for row in data.rows] == [p["completion"] for p in PAIRS]
    assert list(data.digests.values()) == list(read(file).digests.values())


def test_rows_survive_being_written(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [chat("a", "b") | {"tools": tools}, chat("c", "d")]
    before = read_rows(write_jsonl(tmp_path / "a.jsonl", rows))
    after = read_rows(write_rows(tmp_path / "b.jsonl", before))
    assert [(row.messages, row.tools) for row in after] == [(row.messages, row.tools) for row in before]
    assert before[0].tools == tuple(tools)
    texts = read_rows(write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}]))
    assert read_rows(write_rows(tmp_path / "u.jsonl", texts))[0].text == "x"

import copy
import io
import json

import pytest

from tests.conftest import chat, write_jsonl
from twinlora.cli.main import main, parse_options


@pytest.fixture
def files(tmp_path):
    """Training rows with a finding of each kind, and held-out rows of which one is a training row."""
    rows = [
        *(chat(f"question {i}", "answer " * (i + 1)) for i in range(20)),
        chat("question 3", "answer " * 4),
        chat("question 4", "otherwise"),
        chat("zero\u200bwidth", "a <|im_end|> in words"),
        chat("nothing", ""),
        chat("x" * 3000, "y"),
    ]
    return write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", [rows[7], chat("new", "z")])


def test_every_finding_in_words_and_as_json(tiny, files, capsys):
    train, test = map(str, files)
    assert main(["data", "check", train, "--model", str(tiny), "--eval", test, "--samples", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"data {train}: 25 chats (messages), JSON Lines",
        f"data {test}: 2 chats (messages), JSON Lines",
    ]
    for line in (
        "25 rows, 24 examples, ",
        "          ⋮\n  2048–3071 tokens  ███▌                             1",
        f"longest 3,040 at {train}:25",
        "! 1 example is longer than max_length 2,048",
        "! 1 row has nothing to train on",
        f"    {train}:24",
        "✓ the end of turn <|im_end|> is trained in all 24 examples",
        "! 1 row is a copy of an earlier one",
        f"    {train}:21 = {train}:4",
        "! 1 row asks what an earlier one asks and answers otherwise",
        f"    {train}:22 ≠ {train}:5",
        "! 1 row with unusual characters: ",
        "! 1 of 2 held-out rows asks what a training row asks",
        f"    {test}:1",
        "⟦answer <|im_end|>⟧",
    ):
        assert line in captured.out, line
    assert main(["data", "check", train, "--model", str(tiny), "--eval", test, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"][0]["form"] == "chats (messages)"
    assert sum(one["examples"] for one in found["histogram"]) == found["examples"] == 24
    assert all(one["low"] <= found["median"] for one in found["histogram"][:1])
    assert (found["overlong"], found["untrained"], found["duplicates"], found["contradictions"]) == (1, 1, 1, 1)
    assert found["odd"] == {"ZERO WIDTH SPACE": 1, "<|im_end|>": 1}
    assert (found["eval_rows"], found["eval_overlap"]) == (2, 1)
    assert "".join(piece["text"] for piece in found["samples"][0]["pieces"] if piece["trained"]) == "answer <|im_end|>"


def test_clean_rows_are_called_clean(tiny, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "a.jsonl", [{"text": f"line {i}\n<|im_start|>"} for i in range(5)])
    assert main(["data", "check", "--data", str(rows), "--model", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "!" not in out
    assert "5 rows, 5 examples" in out
    assert "no row stands there twice" in out


def test_two_words_are_a_verb_and_sources_stand_first(capsys):
    options = parse_options("data check", ["a.jsonl", "b@2", "--model", "m", "--max-length", "9"])
    assert (options.data, options.max_length) == (["a.jsonl", "b@2"], 9)
    assert main(["data"]) == 2
    assert "unknown verb 'data'; did you mean data check?" in capsys.readouterr().err
    assert main(["data", "chekc"]) == 2
    assert main(["data", "check", "none.jsonl", "--model", "m"]) == 2
    assert "error: model m" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "-h"])
    assert stop.value.code == 0
    assert "--columns" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (["--columns", "question=prompt"], "columns: 'question=prompt' is not FIELD=COLUMN with a field of messages"),
        (["--columns", "prompt=a,completion=a"], "columns: a column is named twice"),
        (["--eval", "b.jsonl@2"], "eval: 'b.jsonl@2' has a weight; held-out rows are read once each"),
    ],
)
def test_wrong_options(given, message, capsys):
    assert main(["data", "check", "a.jsonl", "--model", "m", *given]) == 2
    assert message in capsys.readouterr().err


def test_rows_that_the_template_refuses_are_a_finding(tiny, tmp_path, tokenizer, capsys):
    bare = tmp_path / "bare"
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = None
    changed.save_pretrained(bare)
    (bare / "config.json").write_text((tiny / "config.json").read_text())
    rows = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")] * 2)
    assert main(["data", "check", str(rows), "--model", str(bare)]) == 0
    out = capsys.readouterr().out
    assert "! 2 rows cannot be trained" in out
    assert "this model has no chat template" in out
    assert "✓ the end" not in out


def test_what_is_trained_is_marked_on_a_terminal_without_styles(monkeypatch):
    from rich.console import Console

    from twinlora.cli import data_check
    from twinlora.data.check import Piece, Sample

    for system, shown in ((None, "ask⟦say⟧"), ("standard", "ask")):
        console = Console(file=io.StringIO(), force_terminal=True, color_system=system, soft_wrap=True)
        monkeypatch.setattr(data_check, "out", console)
        data_check._show_sample(Sample("here", [Piece("ask", False), Piece("say", True)]))
        assert shown in console.file.getvalue()
        assert ("⟦" in console.file.getvalue()) == (system is None)

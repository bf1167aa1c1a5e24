"""How the options of the data reach a run: sources, weights, long rows, streams."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import chat, write_jsonl
from tests.train.test_loop import Notes, metrics, options, same, weights
from twinlora.errors import CheckpointError, ConfigError, DataError
from twinlora.train.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def second(tmp_path):
    return write_jsonl(tmp_path / "second.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(12)])


def test_a_run_over_weighted_sources_resumes_bit_identical(tiny, data_file, second, tmp_path):
    mixed = [str(data_file), f"{second}@0.5"]
    arguments = {"epochs": 2, "checkpoint_every": 5, "keep_checkpoints": 9}
    notes = Notes()
    whole = train(options(tiny, mixed, tmp_path / "whole", **arguments), notes)
    assert whole.record["steps"] == 2 * 8, "24 rows and 6 of 12, in batches of 4, twice"
    assert notes.lines[1] == f"data {second}: 12 prompts with completions, JSON Lines; each seen 0.5 times an epoch"
    document = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert set(document["data_sha256"]) == {"train.jsonl", "second.jsonl"}
    assert notes.lines[1] in document["notes"]
    cut = options(tiny, mixed, tmp_path / "whole", resume=True, **arguments)
    for directory in (tmp_path / "whole" / "checkpoints").iterdir():
        if int(directory.name.removeprefix("step-")) > 5:
            subprocess.run(["rm", "-r", str(directory)], check=True)
    before = weights(tmp_path / "whole")
    train(cut)
    assert same(weights(tmp_path / "whole"), before)
    changed = options(tiny, [str(data_file), f"{second}@2"], tmp_path / "whole", resume=True, **arguments)
    with pytest.raises(CheckpointError, match=r"second.jsonl@2: was \w+, \w+@0.5, now \w+, \w+@2"):
        train(changed)


def test_two_copies_are_a_weight_of_two(tiny, data_file, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [chat("a", "b")])
    twice = write_jsonl(tmp_path / "two.jsonl", [chat("a", "b")] * 2)
    a = train(options(tiny, f"{one}@2", tmp_path / "a"))
    b = train(options(tiny, twice, tmp_path / "b"))
    assert a.record["tokens"] == b.record["tokens"]
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_long_rows_by_option(tiny, tmp_path):
    rows = [chat("a" * 400, "kept"), *(chat(f"q{i}", "b") for i in range(7))]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"1 row longer .*\n.*a\.jsonl:1: 4"):
        train(options(tiny, data, tmp_path / "r", max_length=128))
    assert not (tmp_path / "r").exists()
    for overlong, examples in (("truncate", 8), ("drop", 7)):
        notes = Notes()
        train(options(tiny, data, tmp_path / overlong, max_length=128, overlong=overlong, batch_size=1), notes)
        assert len(metrics(tmp_path / overlong)) == examples
        assert any("128 tokens: 1 examples" in line for line in notes.lines)


def _run(command, rows, **environment):
    values = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]} | environment
    command = [sys.executable, "-m", "twinlora.cli.main", *command]
    return subprocess.run(command, input=rows, env=values, capture_output=True, text=True)


def test_standard_input_trains_once_and_cannot_be_resumed(tiny, data_file, tmp_path):
    command = ["train", "--model", str(tiny), "--method", "lora", "--data", "-", "--output", str(tmp_path / "r")]
    done = _run([*command, "--max-steps", "1"], data_file.read_text())
    assert done.returncode == 0, done.stderr
    assert "data -: 24 chats (messages), JSON Lines" in done.stderr
    document = json.loads((tmp_path / "r" / "run.json").read_text())
    assert list(document["data_sha256"]) == ["-"]
    again = _run([*command, "--resume"], data_file.read_text())
    assert again.returncode == 2
    assert "error: resume: - is a stream" in again.stderr
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="pipe is a stream"):
        train(options(tiny, pipe, tmp_path / "r", resume=True))

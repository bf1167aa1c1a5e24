"""A run dies, is torn, loses power, or finds the disk full: resumed, it ends as the undisturbed run, bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import chat, write_jsonl
from tests.train import faults
from tests.train.test_loop import Notes, options, same, weights
from twinlora.adapters.files import WEIGHTS
from twinlora.errors import CheckpointError, StorageError
from twinlora.train import checkpoint
from twinlora.train.loop import train

needs_preload = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="faults are injected by a C library (Linux, gcc)"
)


def _try_all(tiny, directory, kinds, every):
    shutil.copytree(tiny, directory, dirs_exist_ok=True)
    write_jsonl(directory / "train.jsonl", [chat("say " + "ab" * (i % 7), f"word {i}") for i in range(8)])
    process = faults.start(directory, kinds, every)
    outcomes = [json.loads(line) for line in process.stdout]
    assert process.wait() == 0
    for o in outcomes:
        print(o["fault"], o["number"], o["operation"], o["path"], "→", "; ".join(o["wrong"]) or "bit-identical")
    return outcomes


@needs_preload
def test_killed_at_every_operation(tiny, tmp_path):
    """`TWINLORA_ALL_FAULTS=1` adds torn writes, lost power and the full disk at every operation, not at each 9th."""
    every = 1 if os.environ.get("TWINLORA_ALL_FAULTS") else 9
    outcomes = _try_all(tiny, tmp_path / "all", ["die"], 1)
    outcomes += _try_all(tiny, tmp_path / "some", ["tear", "power", "full"], every)
    touched = {(o["operation"], o["path"].split("/")[1]) for o in outcomes if o["path"]}
    assert {("write", "run"), ("rename", "run"), ("fsync", "run"), ("rename", "cache")} <= touched
    assert any("metrics.jsonl" in o["path"] for o in outcomes)
    assert [o for o in outcomes if o["wrong"]] == []


@pytest.fixture
def done(tiny, data_file, tmp_path):
    """A finished run with checkpoints of steps 2, 4 and 6."""
    run = tmp_path / "r"
    train(options(tiny, data_file, run, checkpoint_every=2, keep_checkpoints=3))
    return run


def test_a_full_disk_is_one_error(tiny, data_file, tmp_path):
    """A real one: a small file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs the right to")
    try:
        with pytest.raises(StorageError, match=r"cannot be written: .*No space left[\s\S]*--resume"):
            train(options(tiny, data_file, disk / "r", checkpoint_every=2, rank=2, keep_checkpoints=9))
        found, skipped = checkpoint.newest(disk / "r")
        assert found is not None
        assert not skipped
        assert not list((disk / "r" / "checkpoints").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        train(options(tiny, data_file, disk / "r", checkpoint_every=2, rank=2, keep_checkpoints=9, resume=True))
        train(options(tiny, data_file, tmp_path / "whole", rank=2))
        assert same(weights(disk / "r"), weights(tmp_path / "whole"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_damaged_newest_checkpoint_does_not_crowd_out_good_ones(tiny, data_file, done):
    """With room for one checkpoint the damaged one of a later step goes, not the one just saved."""
    reference = weights(done)
    (done / "checkpoints" / "step-000006" / "state.json").write_text("{")
    (done / "checkpoints" / "step-000004" / "state.safetensors").write_bytes(b"")
    kept = []

    class Watching(Notes):
        def progress(self, stage, number, total, text=""):
            kept.append(sorted(path.name for path in (done / "checkpoints").iterdir()))

    notes = Watching()
    train(options(tiny, data_file, done, checkpoint_every=1, keep_checkpoints=1, resume=True), notes)
    assert [line.split(":")[0] for line in notes.lines if "skipped" in line] == [
        "skipped step-000006",
        "skipped step-000004",
    ]
    assert kept[1:] == [[f"step-{n:06d}"] for n in (3, 4, 5)]
    assert same(weights(done), reference)


@pytest.mark.parametrize("when", [0, 10**11])
def test_clocks_that_jump_change_nothing(tiny, data_file, done, when):
    """The newest checkpoint is that of the highest step, whatever the times of the files."""
    reference = weights(done)
    for number, path in enumerate(sorted(done.rglob("*"))):
        os.utime(path, (when - number, when - number) if when else (number, number))
    shutil.rmtree(done / "adapter")
    notes = Notes()
    train(options(tiny, data_file, done, checkpoint_every=2, keep_checkpoints=3, resume=True), notes)
    assert "resume: continuing after step 6 of 6" in notes.lines
    assert same(weights(done), reference)


@pytest.mark.parametrize("restore_times", [False, True])
def test_a_changed_base_is_refused_by_name(tiny, data_file, tmp_path, restore_times):
    """Also if the file has the size and the times that the cached fingerprint saw."""
    base = shutil.copytree(tiny, tmp_path / "base")
    train(options(base, data_file, tmp_path / "r"))
    file = base / "model.safetensors"
    before = file.stat()
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    if restore_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match=f"the weights of base model {base}: was"):
        train(options(base, data_file, tmp_path / "r", resume=True))


def test_changed_evaluation_rows_and_threads_are_refused_by_name(tiny, data_file, tmp_path):
    import torch

    rows = write_jsonl(tmp_path / "eval.jsonl", [chat("a", "b")])
    train(options(tiny, data_file, tmp_path / "r", eval=rows))
    write_jsonl(rows, [chat("a", "c")])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(CheckpointError, match=r"the content of eval [\s\S]*threads"):
            train(options(tiny, data_file, tmp_path / "r", eval=rows, resume=True))
    finally:
        torch.set_num_threads(threads)


def test_a_measured_type_is_kept_on_resume(tiny, data_file, tmp_path, monkeypatch):
    """`--dtype auto` measures: a resumed run takes what the first one found."""
    import torch

    from twinlora.train import choices

    arguments = {"checkpoint_every": 2, "dtype": "auto"}
    monkeypatch.setattr(choices, "pick_dtype", lambda *_: (torch.bfloat16, None))
    train(options(tiny, data_file, tmp_path / "r", **arguments))
    reference = weights(tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-000006")
    monkeypatch.setattr(choices, "pick_dtype", lambda *_: (torch.float32, "float32: slow today"))
    train(options(tiny, data_file, tmp_path / "r", resume=True, **arguments))
    assert same(weights(tmp_path / "r"), reference)


def test_a_replaced_directory_is_never_lost(tmp_path):
    """What a death between the two renames leaves is put back; other remains go."""
    from twinlora import atomic

    with atomic.write_directory(tmp_path / "adapter") as temporary:
        (temporary / WEIGHTS).write_text("old")
    (tmp_path / "adapter").rename(tmp_path / ".adapter.abcdefgh.old")
    (tmp_path / ".adapter.abcdefgh.partial").mkdir()
    (tmp_path / ".adapter.stuvwxyz.removed").mkdir()
    (tmp_path / ".adapter.mine").mkdir()
    atomic.sweep(tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adapter.mine", "adapter"]

"""Where an artefact goes: over nothing but an artefact, from one process at a time, and nothing half written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.conftest import run
from twinlora.adapters.files import read_adapter
from twinlora.cli.main import main
from twinlora.errors import ConfigError, Interrupted
from twinlora.export import ship
from twinlora.export.output import ADAPTER, ARTEFACT, claimed, require_apart, require_free, scratch

ODD = "合并 [v1] 🤖"


def made(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text("{}")
    return path


def test_only_earlier_results_are_replaced(tmp_path):
    require_free(tmp_path / "new", False, ARTEFACT)
    for kind, marks in ((ARTEFACT, "parity.json"), (ARTEFACT, "export.json"), (ADAPTER, "adapter_config.json")):
        old = made(tmp_path / marks, marks)
        require_free(old, True, kind)
        with pytest.raises(ConfigError, match="exists; give --overwrite"):
            require_free(old, False, kind)
    require_free(made(tmp_path / "empty"), True, ARTEFACT)
    run_directory = made(tmp_path / "run", "run.json")
    trained = made(run_directory / "adapter", "adapter_config.json")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "parity.json")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, kind in (
        (run_directory, ARTEFACT), (trained, ADAPTER), (tmp_path / "file", ARTEFACT), (tmp_path / "link", ARTEFACT),
        (tmp_path / "dangling", ARTEFACT), (tmp_path, ARTEFACT),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"is no earlier result .*never replaced; give another --output"):
            require_free(path, True, kind)


def test_what_is_read_is_not_replaced(tmp_path):
    made(tmp_path / "a" / "b")
    require_apart(tmp_path / "a" / "b", [tmp_path / "a"])
    for output in (tmp_path / "a" / "b", tmp_path / "a"):
        with pytest.raises(ConfigError, match="which is read here; give another --output"):
            require_apart(output, [tmp_path / "a" / "b"])


def test_one_process_writes_an_output_at_a_time(tmp_path):
    out = tmp_path / ODD
    with (
        claimed(out, False, ARTEFACT),
        claimed(tmp_path / "another", False, ARTEFACT),
        pytest.raises(ConfigError, match="another process is writing it; wait for it, or give another"),
        claimed(out, False, ARTEFACT),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with claimed(out, False, ARTEFACT):
        made(out, "parity.json")
    with pytest.raises(ConfigError, match="exists"), claimed(out, False, ARTEFACT):
        pass  # written meanwhile by another
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_killed_process_left_is_removed(tmp_path):
    out, other = tmp_path / ODD, tmp_path / f"{ODD}.12345678"
    left = made(tmp_path / f".{ODD}.abcdefgh.partial", "half.safetensors")
    candidate = made(tmp_path / f".{ODD}.ijklmnop.partial", "half.safetensors")
    kept = made(tmp_path / f".{other.name}.abcdefgh.partial", "of another output")
    with claimed(out, False, ARTEFACT):
        assert not left.exists()
        assert not candidate.exists()
    assert kept.exists()
    with claimed(out, False, ARTEFACT), scratch(out) as directory:
        assert directory.match(f".{glob_free(ODD)}.*.partial"), "sweep must find it"
    assert list(tmp_path.iterdir()) == [kept]


def glob_free(name: str) -> str:
    return name.replace("[", "?").replace("]", "?")


def test_sigterm_ends_in_order(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(Interrupted, match="stopped by SIGTERM; nothing was written") as caught,
        claimed(tmp_path / "out", False, ARTEFACT),
        scratch(tmp_path / "out"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_status == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_killed_export_leaves_no_artefact_and_the_next_one_cleans_up(lora, tmp_path):
    """Killed while it compares: everything is written, under a name that is not yet the artefact's."""
    out = tmp_path / ODD
    code = "import os, signal\nfrom twinlora.export import ship\n"
    code += "ship._gate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "from twinlora.cli.main import main\nimport sys\nsys.exit(main(sys.argv[1:]))"
    command = ["merge", str(lora), "--output", str(out), "--rows", "2"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]
    assert main(command) == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_one_message_and_leaves_nothing(lora, tmp_path, capsys):
    """Files may not pass 20 kB, which numpy reports without a reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for verb in (["merge"], ["export", "--to", "gguf"], ["export", "--to", "bnb"], ["export", "--to", "gguf-lora"]):
        command = [verb[0], str(lora), *verb[1:], "--output", str(tmp_path / "out"), "--rows", "2"]
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            assert main(command) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'out'}: cannot be written: ")
        assert "too large" in error or "may not be so large" in error
        assert list(tmp_path.iterdir()) == []


def test_neither_run_nor_base_is_ever_replaced(base, rows, tmp_path, capsys):
    """Not even an adapter's base that is itself an artefact."""
    first = tmp_path / "first"
    ship.merge(ship.MergeOptions(run=run(base, rows, tmp_path / "a", method="lora"), output=first, rows=2))
    second = run(first, rows, tmp_path / "b", method="lora", max_steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for adapter, output in (
        (second, second), (second, second / "adapter"), (second, second / "checkpoints"), (second, first),
        (second, tmp_path), (first, first),
    ):  # fmt: skip
        command = ["merge", str(adapter), "--output", str(output), "--overwrite", "--data", str(rows)]
        assert main(command) == 2, command
        assert "give another --output" in capsys.readouterr().err
    trained = read_adapter(second).directory
    for output in (trained, second, tmp_path):
        command = ["adapter", "compress", str(second), "--rank", "1", "--output", str(output), "--overwrite"]
        assert main(command) == 2, command
        assert "give another --output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    inside = second / "merged"
    assert main(["merge", str(second), "--output", str(inside), "--data", str(rows), "--rows", "2"]) == 0
    shutil.rmtree(inside)

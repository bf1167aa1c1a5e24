"""What `merge` and `export` leave behind when they are killed, refused, or out of disk: nothing half written."""

import resource
import shutil
import signal
import subprocess
import sys

from tests.export.conftest import run
from twinlora.adapters.files import read_adapter
from twinlora.cli.main import main
from twinlora.export import ship

ODD = "合并 [v1] 🤖"


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

"""Where results go: over nothing but an earlier result, from one process at a time, and nothing half written."""

import os
import signal
from pathlib import Path

import pytest

from twinlora.errors import ConfigError, Interrupted
from twinlora.output import ADAPTER, ARTEFACT, claimed, require_apart, require_free, scratch

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
        with pytest.raises(ConfigError, match="is read here, and lies where this output is written; give another"):
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

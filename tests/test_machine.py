"""Memory of a process, and who gives it back."""

import platform
import threading

import pytest
import torch

from tests.conftest import printed
from twinlora import machine

MIB = 1 << 20


def test_a_mapping_holds_zeros_and_lives_as_long_as_a_view():
    before = machine.rss_bytes()
    view = machine.mapped(64 * MIB)[-8:].view(torch.float32)
    assert torch.equal(view, torch.zeros(2))
    view[1] = 3.0
    assert machine.rss_bytes() - before > 60 * MIB
    assert view.tolist() == [0.0, 3.0]
    del view
    assert machine.rss_bytes() - before < 8 * MIB


@pytest.mark.parametrize(
    "names, key",
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"), "total_inactive_file"),
    ],
)
def test_files_that_a_container_has_read_are_no_loss(tmp_path, monkeypatch, names, key):
    monkeypatch.setattr(machine, "_CONTROL_GROUP", str(tmp_path))
    everything = machine.available_bytes()
    for name, text in zip(
        names, (f"{64 * MIB}", f"{60 * MIB}", f"anon 5\n{key} {40 * MIB}\nactive_file 7"), strict=True
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.available_bytes() == 44 * MIB < everything
    (tmp_path / names[0]).write_text("max\n")
    assert machine.available_bytes() > 44 * MIB, "no limit"


def test_nothing_can_be_mapped():
    assert machine.mapped(0).shape == (0,)


def test_what_cannot_be_mapped_is_an_oserror():
    with pytest.raises(OSError, match="memory"):
        machine.mapped(1 << 50)


def test_work_apart_leaves_no_thread():
    threads = threading.active_count()
    assert machine.apart(lambda: threading.current_thread() is not threading.main_thread())
    assert threading.active_count() == threads


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_what_a_run_has_left_free_is_not_held():
    """A second run in one process was predicted to need half as much again. In the pool and in the heap."""
    code = (
        "import torch; from twinlora import machine; machine.keep_freed_memory(); "
        "before = machine.held_bytes(); x = torch.ones(1 << 26), [torch.ones(8000) for _ in range(2000)]; "
        "full = machine.held_bytes(); del x; resident = machine.rss_bytes(); "
        "print(full - before, resident - before, machine.held_bytes() - before)"
    )
    full, resident, held = (int(size) / (1 << 28) for size in printed(code).split())
    assert full > 1.2
    assert resident > 1.2
    assert abs(held) < 0.05

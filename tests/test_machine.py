"""Memory of a process, and who gives it back."""

import threading

import pytest
import torch

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


def test_nothing_can_be_mapped():
    assert machine.mapped(0).shape == (0,)


def test_what_cannot_be_mapped_is_an_oserror():
    with pytest.raises(OSError, match="memory"):
        machine.mapped(1 << 50)


def test_work_apart_leaves_no_thread():
    threads = threading.active_count()
    assert machine.apart(lambda: threading.current_thread() is not threading.main_thread())
    assert threading.active_count() == threads

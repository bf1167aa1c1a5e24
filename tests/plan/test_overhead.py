"""What a process takes beside the step, measured once."""

import json
import subprocess

from twinlora.plan import overhead
from twinlora.plan.overhead import Overhead

MIB = 1 << 20


def test_products_of_what_is_tried_before_the_step_count_as_well():
    assert Overhead(100, 7).compiled(3) == 42
    assert Overhead(100, 7).total(3) == 142


def test_each_number_of_rows_has_products_of_its_own_as_many_as_are_kept():
    assert Overhead(100, 7).compiled(3, sizes=5) == 7 * 3 * 6
    assert Overhead(100, 7).total(300, sizes=5) == 100 + 7 * 1024


def test_it_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = overhead.overhead()
    assert 100 * MIB < found.libraries < 2000 * MIB
    assert found.product < 4 * MIB
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: 1 / 0)
        assert overhead.overhead() == found
    file = tmp_path / "twinlora" / "overhead.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({"another version": {"libraries": 1, "product": 2}}))
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps({"libraries": 3, "product": 4}))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert overhead.overhead() == Overhead(3, 4)
    assert json.loads(file.read_text()).keys() == {"another version", *kept}, "one does not push out the other"

"""Pages are what the results and the code say."""

import subprocess
import sys
from pathlib import Path

from twinlora.cli.main import _VERBS

ROOT = Path(__file__).parents[1]


def test_tables_are_rendered_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_names_every_verb_and_every_room():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `twinlora {verb}` |" in page for verb in _VERBS)
    rooms = {p.name for p in (ROOT / "src" / "twinlora").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert all(f"](src/twinlora/{room})" in page for room in rooms), rooms

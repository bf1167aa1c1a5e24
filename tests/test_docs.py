"""Pages are what the results and the code say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import chat, write_jsonl
from twinlora.cli.main import _VERBS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "README.zh-CN.md")
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """What a reader can copy: fenced blocks without their comments."""
    return [re.sub(r" *#.*", "", block) for block in re.findall(r"```\w+\n(.*?)```", page, re.DOTALL)]


def test_tables_are_rendered_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_readme_names_every_verb_and_every_room(name):
    page = read(name)
    assert all(f"| `twinlora {verb}` |" in page for verb in _VERBS)
    rooms = {p.name for p in (ROOT / "src" / "twinlora").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert all(f"](src/twinlora/{room})" in page for room in rooms), rooms


@pytest.mark.parametrize("example", EXAMPLES, ids=["finetune", "trainer", "dpo"])
def test_examples_run_as_they_stand(example, tiny, tmp_path, monkeypatch, capsys):
    """In a directory with the files they name, on the tiny model."""
    for module in re.findall(r"^from (\w+) import", example, flags=re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [chat(f"say {i}", f"word {i}") for i in range(16)])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"{i}", "chosen": " yes", "rejected": " no"} for i in range(8)])
    assert example.count("Qwen/Qwen3-0.6B") == 1
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example.replace("Qwen/Qwen3-0.6B", str(tiny)), "README.md", "exec"), {})
    adapters = list(tmp_path.rglob("adapter_model.safetensors"))
    assert adapters or "DPOTrainer" in example


def test_both_pages_have_the_same_parts_commands_links_and_options():
    english, chinese = map(read, PAGES)
    assert f"]({PAGES[1]})" in english
    assert f"]({PAGES[0]})" in chinese
    assert commands(english) == commands(chinese)
    for pattern in (
        r"^##? ",
        r"<!-- table: \w+ -->",
        r"\]\((?!README)[^)]+\)",
        r"`--[a-z-]+",
        r"`(?:[a-z]+-[a-z]+|loss|chrf)`",
    ):
        ours, theirs = (re.findall(pattern, page, re.MULTILINE) for page in (english, chinese))
        assert sorted(ours) == sorted(theirs), pattern
    prose = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)", "", chinese, flags=re.DOTALL)
    assert not re.findall(r"\b(?:the|with|and|of|is)\b", prose), "words that were not translated"


def test_readme_names_every_metric():
    from twinlora.evaluate.scores import METRICS

    assert all(f"`{name}`" in read(page) for page in PAGES for name in METRICS)

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from twinlora.demo import tasks
from twinlora.demo.support import TEAMS
from twinlora.demo.tasks import SPLITS, TASKS, rows
from twinlora.errors import DataError


def texts(found, role):
    return [m["content"] for row in found for m in row.messages if m["role"] == role]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_share_no_phrase_with_training_rows(task):
    banks = TASKS[task].banks
    phrases = {
        "values": lambda bank: bank.values,
        "urgent": lambda bank: bank.urgent,
        "templates": lambda bank: [t for ts in bank.templates.values() for t in ts],
        "around": lambda bank: [phrase for phrase in [*bank.before, *bank.after] if phrase],
    }
    for kind, of in phrases.items():
        for one, other in itertools.combinations(SPLITS, 2):
            assert not set(of(banks[one])) & set(of(banks[other])), (kind, one, other)
    assert len({frozenset(b.templates) for b in banks.values()}) == 1, "every split has every label"


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_many_unique_and_disjoint(task):
    users = {s: texts(rows(task, s, n), "user") for s, n in zip(SPLITS, (1500, 200, 400), strict=True)}
    everything = [text for split in users.values() for text in split]
    assert len(everything) == len(set(everything)) == 2100
    assert all("{" not in text for text in everything)
    labels = Counter(
        a.split("|")[0] if "|" in a else json.loads(a)["intent"] for a in texts(rows(task, "train", 1500), "assistant")
    )
    assert max(labels.values()) < 2 * min(labels.values())


def test_support_answers_are_json_that_copies_the_product():
    for split in SPLITS:
        found = rows("support", split, 150)
        for user, answer in zip(texts(found, "user"), texts(found, "assistant"), strict=True):
            value = json.loads(answer)
            assert list(value) == ["intent", "team", "product", "urgent"]
            assert value["product"] in user
            assert TEAMS[value["intent"]] == value["team"]
            assert value["urgent"] == any(cue in user for cue in TASKS["support"].banks[split].urgent)


@pytest.mark.parametrize("task", ["legal", "triage"])
def test_the_last_part_of_an_answer_stands_in_the_message(task):
    found = rows(task, "test", 150)
    for user, answer in zip(texts(found, "user"), texts(found, "assistant"), strict=True):
        assert answer.split(" | ")[-1] in user


def test_deterministic_across_processes():
    code = "import json; from twinlora.demo.tasks import rows; print(json.dumps([r.to_json() for t in ('support', 'legal', 'triage') for r in rows(t, 'test', 30)]))"
    outputs = set()
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""}
        outputs.add(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        )
    assert len(outputs) == 1
    assert rows("legal", "test", 30, seed=1) != rows("legal", "test", 30, seed=2)


def test_wrong_arguments(monkeypatch):
    with pytest.raises(DataError, match="expected one of support, legal, triage"):
        rows("poetry", "train", 1)
    monkeypatch.setattr(tasks, "_TRIES", 2)
    with pytest.raises(DataError, match="its phrases make"):
        rows("triage", "validation", 10_000)

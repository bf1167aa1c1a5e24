"""What is said about a choice names its reason, in two sentences, and the other ways to it."""

import dataclasses
import shlex

import pytest

from tests.plan.rows import GIB, ways
from twinlora.cli.main import parse_options
from twinlora.config import AdapterOptions, PlanOptions
from twinlora.plan.advise import changes, choose, rows_for
from twinlora.plan.claims import checked
from twinlora.plan.rows import RESERVE
from twinlora.plan.words import change_lines, command, duration, memory_note, runner_up, sentences


def told(memory, goal="balanced", parameters=8e9, **more):
    rows = rows_for(ways(parameters, **more), int(memory * GIB), goal, RESERVE)
    choice = choose(rows, goal)
    return choice, rows, " ".join(sentences(choice, rows, goal))


# memory, goal, parameters -> what must be named
NAMED = {
    "ample memory": (80, "balanced", 8e9, "its base is not rounded"),
    "accuracy": (40, "accuracy", 8e9, "its base is not rounded"),
    "many tasks": (80, "many-tasks", 8e9, "switching between tasks swaps"),
    "65B on 48 GiB": (48, "balanced", 65e9, "LoRA in 16 bit needs 124.2 GiB and does not fit into 48.0 GiB"),
    "its quality": (48, "balanced", 65e9, "MMLU 53.1 against 53.0"),
    "a phone": (24, "edge", 1.2e9, "edge device runs a base of about 4 bits"),
    "between the two": (11, "balanced", 8e9, "between QLoRA's and LoRA's"),
    "the fastest": (80, "speed", 8e9, "the fastest that fits"),
    "the least": (80, "memory", 8e9, "needs the least memory"),
    "one way": (30, "balanced", 65e9, "the only way that fits into 30.0 GiB"),
    "nothing": (2, "balanced", 8e9, "Nothing fits into 2.0 GiB"),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_reason_is_named(name):
    memory, goal, parameters, expected = NAMED[name]
    choice, rows, text = told(memory, goal, parameters)
    assert expected in text
    first, second = sentences(choice, rows, goal)
    assert first.endswith(".")
    assert second.endswith(".")


def test_what_was_planned_alone_is_not_said_to_be_the_only_one_that_fits():
    for method, goal in (("qlora", "balanced"), ("lora", "edge"), ("full", "many-tasks")):
        made = [way for way in ways(8e9) if way.method == method]
        rows = rows_for(made, 400 * GIB, goal, RESERVE)
        choice = choose(rows, goal)
        assert (choice.method, choice.reason, choice.runner_up) == (method, "alone", None)
        assert "no other way was planned" in sentences(choice, rows, goal)[0]


def test_times_are_told_only_where_rates_are_known():
    assert "tokens/s in 17 min" in told(80)[2]
    assert "tokens/s" not in told(80, seconds=None)[2]


def test_what_would_change_it():
    made = ways(65e9)
    lines = change_lines(changes(made, 48 * GIB, "balanced", RESERVE), 48 * GIB)
    assert lines[0].startswith("with ")
    assert "GiB more: hybrid at " in lines[0]
    assert any(line.startswith("with --goal accuracy") and "hybrid" in line for line in lines)
    assert runner_up(told(80)[0]).startswith("LoRA over int8: peak ")
    assert runner_up(told(30, parameters=65e9)[0]) is None


@pytest.mark.parametrize(
    "seconds, text",
    [(45, "45 s"), (119, "119 s"), (125, "2 min"), (7300, "2 h 1 min"), (200000, "2 d 7 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "given, noted", [("24GB", True), ("24g", True), ("24GiB", False), ("24000MB", False), (None, False)]
)
def test_gb_where_gib_may_be_meant(given, noted):
    assert (memory_note(given, 24 * 10**9) is not None) == noted
    assert memory_note("1.5TB", 15 * 10**11).startswith("1.5 TB are 1,397.0 GiB")


def test_the_command_of_a_mix_gives_its_bits():
    choice, _, _ = told(11)
    options = PlanOptions(model="x", goal="accuracy", memory="11GB", data=["a b.jsonl"], device="RTX 4090")
    line = command(choice.row, options, "org/model")
    assert f"--method hybrid --bits {choice.row.bits:.2f}" in line
    assert "'a b.jsonl'" in line
    understood = parse_options("train", shlex.split(line)[2:])
    assert understood.memory is None
    assert understood.device == "auto"


def test_the_command_passes_on_what_was_given():
    given = {
        "rank": 8, "alpha": 4.0, "exclude": ["k_proj"], "layers": "0-3", "rank_pattern": ["up_proj=4"], "dora": True,
        "eval": ["held.jsonl"], "overlong": "drop", "allow_untrained": True, "shuffle": False, "packing": "off",
        "batch_size": 3, "max_length": 99, "epochs": 2, "max_steps": 7, "seed": 5, "dtype": "float32",
        "double_quant": False, "block_size": 128, "device": "cpu", "columns": ["prompt=q"], "trust_remote_code": True,
    }  # fmt: skip
    options = PlanOptions(model="x", data=["a.jsonl"], **given)
    rows = {row.method: row for row in told(11)[1]}
    for method in ("lora", "qlora", "hybrid", "full"):
        taken = parse_options("train", shlex.split(command(rows[method], options, "org/model"))[2:])
        unused = {*AdapterOptions.model_fields} if method == "full" else set()
        unused |= {"double_quant", "block_size"} if method in ("lora", "full") else set()
        kept = {name: value for name, value in given.items() if name not in unused}
        assert {name: getattr(taken, name) for name in kept} == kept
        assert taken.method == method


def test_claims_are_checked_against_the_rows():
    rows = {row.method: row for row in told(80)[1]}
    share, saved = checked(rows, model="m", rank=16)
    assert "0.50 %" in share
    assert "74.2 % less" in saved
    recomputed = dataclasses.replace(rows["lora"], setting=rows["lora"].way.candidates[1])
    assert rows["qlora"].setting != recomputed.setting
    _, again = checked(rows | {"lora": recomputed}, model="m", rank=16)
    alike = rows["qlora"].way.candidates[1].peak
    assert f"with equal settings {100 * (1 - alike / recomputed.setting.peak):.1f} % less" in again
    assert len(checked(rows, model="gpt3-175b", rank=16)) == 3

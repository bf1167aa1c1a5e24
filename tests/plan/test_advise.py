"""The advice on hand-made rows: who is chosen, why, and that one input past a border flips it."""

import dataclasses

import pytest

from tests.plan.rows import GIB, ways
from twinlora.plan.advise import changes, choose, rows_for
from twinlora.plan.quality import FORMATS
from twinlora.plan.rows import RESERVE, solve

TINY = {"activations": 0.3, "checkpointed": 0.05}


def at(made, memory, goal="balanced"):
    return choose(rows_for(made, int(memory * GIB), goal, RESERVE), goal)


# parameters, GiB, goal, activations and so on -> method, reason
SCENARIOS = {
    "a simple task and ample memory": (8e9, 80, "balanced", {}, "lora", "not rounded"),
    "a workstation card and a small model": (1.2e9, 24, "balanced", {}, "lora", "not rounded"),
    "law or science, and it fits": (8e9, 40, "accuracy", {}, "lora", "not rounded"),
    "law or science, and it just fits": (8e9, 17, "accuracy", {}, "lora", "not rounded"),
    "law or science, and it does not fit": (8e9, 12, "accuracy", {}, "hybrid", "less rounded"),
    "law or science, full would fit too": (1e9, 80, "accuracy", {}, "lora", "not rounded"),
    "many tasks on a server": (8e9, 80, "many-tasks", {}, "lora", "switching"),
    "many tasks on a small server": (8e9, 6, "many-tasks", {}, "qlora", "no rounding to fear"),
    "65B on one card of 48 GiB": (65e9, 48, "balanced", {}, "qlora", "no rounding to fear"),
    "65B on a card of 34 GiB": (65e9, 34, "balanced", {"checkpointed": 0.5}, "qlora", "no rounding to fear"),
    "65B on a card of 30 GiB": (65e9, 30, "balanced", {}, "hybrid", "only way"),
    "a consumer card and a large model": (13e9, 12, "balanced", {}, "qlora", "no rounding to fear"),
    "a consumer card and a very large model": (33e9, 24, "balanced", {}, "qlora", "no rounding to fear"),
    "memory between the two": (8e9, 11, "balanced", {}, "hybrid", "less rounded"),
    "memory between the two, for a small model": (0.9e9, 1.5, "balanced", TINY, "hybrid", "less rounded"),
    "a phone": (1.2e9, 24, "edge", {}, "qlora", "edge"),
    "an IoT board, little memory": (1.2e9, 1.4, "edge", {}, "qlora", "edge"),
    "the least memory": (8e9, 80, "memory", {}, "qlora", "least memory"),
    "the fastest, all fit": (8e9, 80, "speed", {}, "lora", "fastest"),
    "the fastest, LoRA would checkpoint": (8e9, 17, "speed", {}, "qlora", "fastest"),
    "LoRA would checkpoint, QLoRA need not": (8e9, 17, "balanced", {}, "hybrid", "less rounded"),
    "a tiny model loses by NF4": (1.35e8, 8, "balanced", {}, "lora", "not rounded"),
    "nothing fits": (175e9, 24, "balanced", {}, None, "nothing fits"),
    "nothing fits a phone's card": (8e9, 2, "edge", {}, None, "nothing fits"),
    "ample memory without rates": (8e9, 80, "balanced", {"seconds": None}, "lora", "not rounded"),
    "one large card for 405B": (405e9, 192, "balanced", {}, "hybrid", "only way"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_choice_and_its_reason(name):
    parameters, memory, goal, more, method, reason = SCENARIOS[name]
    choice = at(ways(parameters, **more), memory, goal)
    assert (choice.method, choice.reason) == (method, reason)


# goal, what is on one side of the border, and on the other
BORDERS = {
    "lora or hybrid": ("accuracy", "lora", "hybrid"),
    "hybrid or qlora": ("balanced", "hybrid", "qlora"),
    "hybrid or nothing": ("memory", "hybrid", None),
}


@pytest.mark.parametrize("name", BORDERS)
def test_memory_past_a_border_flips_the_choice(name):
    goal, above, below = BORDERS[name]
    made = ways(8e9)
    high, low = 80 * GIB, GIB
    while at(made, low / GIB, goal).method != below:  # somewhere where `below` is chosen
        low += GIB // 8
    while high - low > 2**20:
        middle = (high + low) // 2
        chosen = at(made, middle / GIB, goal).method
        low, high = (low, middle) if chosen != below else (middle, high)
    assert at(made, high / GIB, goal).method == above
    assert at(made, low / GIB, goal).method == below


def test_lora_fits_at_its_peak_and_the_reserve_and_not_below():
    made = ways(65e9)
    lora = next(way for way in made if way.method == "lora")
    needed = solve(lora, 10**12).needed
    least = solve(lora, 0).needed
    assert solve(lora, least).fit == "fits"
    assert solve(lora, least - 1).fit == "tight"
    assert solve(lora, int(0.98 * least)).fit == "does not fit"
    assert least < needed  # checkpointing is chosen only where it must be
    assert least == pytest.approx((1 + RESERVE) * solve(lora, 0).peak, abs=1)


def test_time_past_a_border_flips_the_choice():
    for factor, method in ((0.70, "qlora"), (0.73, "lora")):  # 1.25 × 0.72 = 0.9: NF4's rounding counts a quarter
        made = ways(8e9, slower={"qlora": factor, "hybrid": 2, "int8": 2})
        assert at(made, 80).method == method


def test_for_speed_a_less_simple_way_must_be_a_tenth_faster():
    for factor, method in ((0.89, "qlora"), (0.91, "lora")):
        made = ways(8e9, slower={"qlora": factor, "hybrid": 2, "int8": 2})
        assert at(made, 80, "speed").method == method


def test_full_is_chosen_where_it_is_a_tenth_faster_and_never_to_switch_tasks():
    for factor, method in ((0.89, "full"), (0.91, "lora")):
        made = ways(1e9, slower={"full": factor})
        assert at(made, 80).method == method
        assert at(made, 80, "many-tasks").method == "lora"


def test_what_is_deployed_on_the_edge_has_4_5_bits_at_most():
    for bits, method in ((4.5, "hybrid"), (4.51, "lora")):
        made = [way.with_bits(bits) if way.method == "hybrid" else way for way in ways(8e9, lacking=("qlora",))]
        choice = at(made, 80, "edge")
        assert choice.method == method


def test_expected_quality_past_a_border_flips_the_choice():
    for points, method in ((-0.49, "qlora"), (-0.51, "lora")):
        made = ways(8e9, slower={"qlora": 0.5, "hybrid": 0.9, "int8": 0.9})
        made = [
            dataclasses.replace(way, expected=dataclasses.replace(way.expected, points=points))
            if way.method == "qlora"
            else dataclasses.replace(way, needs="something")
            if way.method in ("hybrid", "int8")
            else way
            for way in made
        ]
        assert at(made, 80).method == method


def test_the_size_of_the_model_flips_what_quantising_is_expected_to_cost():
    """NF4 is measured to cost a model of 135M, and not one of 7B; both fit and QLoRA is far faster."""
    for parameters, method in ((9.9e8, "lora"), (1.01e9, "qlora")):
        made = ways(parameters, slower={"qlora": 0.5}, lacking=("hybrid", "int8"))
        assert at(made, 80).method == method


def test_a_way_that_cannot_be_trained_is_not_chosen():
    made = ways(8e9, lacking=("hybrid", "int8"))
    assert at(made, 11).method == "qlora"
    assert at(made, 11, "accuracy").method == "qlora"


def test_what_is_tight_is_chosen_only_if_nothing_fits():
    made = [way for way in ways(65e9) if way.method == "qlora"]
    peak = solve(made[0], 0).peak
    assert at(made, (peak + 2**20) / GIB).row.fit == "tight"
    assert at(made, 1.05 * peak / GIB).row.fit == "fits"
    both = [way for way in ways(65e9) if way.method in ("lora", "qlora")]
    tight = solve(both[0], 0).peak
    assert at(both, (tight + 2**20) / GIB, "accuracy").method == "qlora"


def test_where_qlora_is_tight_a_mix_that_rounds_more_buys_nothing_back():
    made = [way for way in ways(65e9) if way.method in ("lora", "qlora", "hybrid")]
    least = solve(next(way for way in made if way.method == "qlora"), 0).needed
    above, below = at(made, least / GIB), at(made, (least - 2**20) / GIB)
    assert above.method == "qlora"
    assert (below.method, below.reason) == ("hybrid", "only way")
    assert below.row.bits < FORMATS[1].bits
    assert at(made, (least - 2**20) / GIB, "memory").reason == "only way"


def test_in_float32_a_mix_goes_up_to_32_bits():
    made = [
        dataclasses.replace(way, bits=32.0, dense_bits=32.0) if way.method == "lora"
        else dataclasses.replace(way, dense_bits=32.0, most_bits=32.0)
        for way in ways(7e9) if way.method in ("lora", "qlora", "hybrid")
    ]  # fmt: skip
    made[0] = dataclasses.replace(
        made[0],
        candidates=tuple(
            dataclasses.replace(c, by_cause=dict(c.by_cause) | {"weights": int(28e9)}) for c in made[0].candidates
        ),
    )
    for memory in (15, 18, 22, 25):
        choice = at(made, memory, "accuracy")
        assert choice.method == "hybrid"
        assert choice.row.bits < 32
    assert at(made, 40, "accuracy").method == "lora"


def test_a_budget_for_the_weights_is_bits():
    way = next(way for way in ways(8e9) if way.method == "hybrid")
    for bits in (3.5, 5.0, 12.0):
        assert way.with_weights(int(8e9 * bits / 8)).most_bits == pytest.approx(bits, abs=1e-6)
    assert way.with_weights(10**12).least_bits == 16
    assert way.with_weights(10).most_bits == pytest.approx(FORMATS[0].bits)


def test_the_runner_up_is_another_way():
    choice = at(ways(8e9), 80)
    assert choice.runner_up is not None
    assert choice.runner_up.method not in (choice.method, "full")
    assert at(ways(65e9), 30).runner_up is None


def test_a_mix_of_16_bit_alone_is_not_another_way_than_lora():
    made = [way for way in ways(8e9) if way.method in ("lora", "hybrid")]
    assert rows_for(made, 80 * GIB, "balanced", RESERVE)[1].bits == 16
    assert at(made, 80).runner_up is None
    assert at(made, 14).runner_up is None, "nor is LoRA another way where the mix alone fits"
    alone = [way for way in made if way.method == "hybrid"]
    assert at(alone, 80).method == "hybrid"


def test_changes_are_where_solving_again_says_so():
    made, memory = ways(8e9), 11 * GIB
    found = changes(made, memory, "balanced", RESERVE)
    sizes = [change for change in found if change.memory]
    assert {change.method for change in sizes} == {"lora", "qlora"}
    for change in sizes:
        step = 2**21 if change.memory > memory else -(2**21)
        assert at(made, change.memory / GIB).method == change.method
        assert at(made, (change.memory - step) / GIB).method == "hybrid"
    assert ("qlora", "edge") in {(change.method, change.goal) for change in found}
    assert all(at(made, 11, change.goal).method == change.method for change in found if change.goal)


def test_for_memory_the_smallest_setting_is_taken_and_for_speed_the_fastest():
    assert at(ways(8e9), 80, "memory").row.setting.checkpointing
    assert not at(ways(8e9), 80, "speed").row.setting.checkpointing
    assert not at(ways(8e9), 80).row.setting.checkpointing


def test_hybrid_takes_the_bits_that_fit():
    way = next(way for way in ways(8e9) if way.method == "hybrid")
    for memory in (6, 9, 12):
        row = solve(way, memory * GIB)
        assert row.fit == "fits"
        assert row.needed <= memory * GIB
        assert row.needed > memory * GIB - 0.02 * 8e9 / 8 * 1.05 or row.bits == 16
    assert solve(way, 2 * GIB).fit == "does not fit"

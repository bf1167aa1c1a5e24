from tests.evaluate.results import report, rows, way
from twinlora.evaluate.verdict import judge

BASE = way("base", rows(0.0))


def verdict(*ways, diverged=()):
    found = report(BASE, *ways)
    return judge([BASE, *ways], found.differences, diverged, metric="exact-match", forgetting=found.forgetting)


def test_the_better_one_wins_and_the_figures_stand_in_the_sentence():
    found = verdict(way("lora", rows(0.8)), way("qlora", rows(0.6), train_peak_rss_bytes=10**9))
    assert found.choose == "lora"
    assert "in exact match it is better than QLoRA by +20.0 points" in found.sentence
    assert "1.00 GB instead of 2.00 GB" in found.sentence


def test_equal_quality_is_decided_by_memory_then_by_speed():
    lora, qlora = way("lora", rows(0.8)), way("qlora", rows(0.79), train_peak_rss_bytes=10**9)
    found = verdict(lora, qlora)
    assert found.choose == "qlora"
    assert "cannot be told from LoRA, -1.0 points" in found.sentence
    found = verdict(lora, way("qlora", rows(0.81), tokens_per_second=300.0, base_weight_bytes=100 * 10**6))
    assert found.choose == "lora"
    assert "33% faster" in found.sentence
    assert "QLoRA stores the base in 100 MB instead of 269 MB" in found.sentence


def test_withheld_at_the_edge_of_the_grid_or_when_everything_diverged():
    found = verdict(way("lora", rows(0.8)), way("qlora", rows(0.2), at_edge=True))
    assert found.choose is None
    assert "best learning rate of QLoRA, 0.001, lies at the edge of its grid (0.0001 to 0.01)" in found.sentence
    found = verdict(way("lora", rows(0.8)), diverged=["qlora"])
    assert found.choose is None
    assert "every learning rate diverged for QLoRA" in found.sentence


def test_the_chosen_metric_decides_and_is_named():
    ways = [
        way(m, [x] * 150 + [y] * 50, "chrf")
        for m, x, y in (("base", 0.1, 0.1), ("lora", 0.6, 0.5), ("qlora", 0.4, 0.6))
    ]
    found = report(*ways).verdict
    assert found.choose == "lora"
    assert "in chrF it is better than QLoRA by +12.5 points" in found.sentence
    assert "LoRA: 57.5% chrF" in found.reasons[0]


def test_who_forgets_more_is_said_if_it_is_beyond_noise_and_worth_a_word():
    (note,) = verdict(way("lora", rows(0.8), rise=0.05), way("qlora", rows(0.8), rise=0.2)).notes
    assert note.startswith("QLoRA forgets more than LoRA: its loss on general text goes 2.6")
    assert "a difference of 0.16" in note
    assert (
        verdict(way("lora", rows(0.8), rise=0.2), way("qlora", rows(0.8), rise=0.05))
        .notes[0]
        .startswith("LoRA forgets")
    )
    assert not verdict(way("lora", rows(0.8), rise=0.2), way("qlora", rows(0.8), rise=0.201)).notes, "too little"
    assert not verdict(way("lora", rows(0.8), rise=-0.2), way("qlora", rows(0.8), rise=-0.05)).notes, "none forgot"
    noisy = way("qlora", rows(0.8), rise=0.2)
    swing = [a + (-1) ** i * 100 for i, a in enumerate(noisy.general.rows_after)]
    noisy.general.rows_after[:] = swing
    assert not verdict(way("lora", rows(0.8), rise=0.1), noisy).notes, "the texts do not agree"


def test_nothing_helped():
    found = verdict(way("lora", rows(0.0)), way("qlora", rows(0.005)))
    assert found.choose is None
    assert found.sentence.startswith("Neither method helped")


def test_one_method_and_three():
    assert verdict(way("lora", rows(0.5))).choose == "lora"
    full = way("full", rows(0.8), train_peak_rss_bytes=5 * 10**9)
    assert verdict(way("lora", rows(0.8)), way("qlora", rows(0.6)), full).choose == "lora"

from tests.evaluate.results import report, rows, way
from twinlora.evaluate.verdict import judge

BASE = way("base", rows(0.0))


def verdict(*ways, diverged=()):
    return judge([BASE, *ways], report(BASE, *ways).differences, diverged)


def test_the_better_one_wins_and_the_figures_stand_in_the_sentence():
    found = verdict(way("lora", rows(0.8)), way("qlora", rows(0.6), train_peak_rss_bytes=10**9))
    assert found.choose == "lora"
    assert "better than QLoRA by +20.0 points" in found.sentence
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


def test_nothing_helped():
    found = verdict(way("lora", rows(0.0)), way("qlora", rows(0.005)))
    assert found.choose is None
    assert found.sentence.startswith("Neither method helped")


def test_one_method_and_three():
    assert verdict(way("lora", rows(0.5))).choose == "lora"
    full = way("full", rows(0.8), train_peak_rss_bytes=5 * 10**9)
    assert verdict(way("lora", rows(0.8)), way("qlora", rows(0.6)), full).choose == "lora"

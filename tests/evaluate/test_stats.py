import numpy as np
import pytest

from twinlora.evaluate.stats import mean_interval, paired_interval, ratio_interval, wilson_interval


def test_wilson_against_published_values_and_at_the_ends():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, Statistics in Medicine 17:857, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 20)[0] == 0.0
    assert round(wilson_interval(0, 20)[1], 4) == 0.1611
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_paired_interval_covers_the_truth_about_as_often_as_it_says():
    generator, inside = np.random.default_rng(1), 0
    for trial in range(200):
        hard = generator.random(300)
        a, b = hard < 0.7 + 0.05 * generator.standard_normal(300), hard < 0.6 + 0.05 * generator.standard_normal(300)
        _, low, high = paired_interval(a, b, resamples=400, seed=trial)
        inside += low <= 0.1 <= high
    assert 178 <= inside <= 199


def test_pairing_matters():
    a = [i % 2 == 0 for i in range(400)]
    b = [i % 2 == 0 and i % 40 != 0 for i in range(400)]
    value, low, high = paired_interval(a, b)
    assert value == pytest.approx(0.025)
    assert 0 < low < value < high < 0.05  # unpaired: about ±0.07


def test_identical_and_unequal():
    assert paired_interval([1, 0], [1, 0]) == (0.0, -1.0, 1.0)
    assert paired_interval([1] * 300, [1] * 300) == (0.0, -0.01, 0.01)
    with pytest.raises(ValueError, match="same rows"):
        paired_interval([1], [1, 0])


def test_mean_interval_is_wilsons_for_hits_and_a_bootstrap_for_scores():
    assert mean_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    assert mean_interval([0.5] * 30) == pytest.approx((0.4, 0.6))
    scores = np.random.default_rng(0).beta(2, 3, 400)
    low, high = mean_interval(scores.tolist())
    half = 1.96 * scores.std() / 20
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.003)


def test_ratio_interval_weighs_rows_by_their_tokens():
    totals, counts = [10.0, 300.0, 2.0] * 50, [10, 100, 4] * 50
    value, low, high = ratio_interval(totals, counts)
    assert value == pytest.approx(312 / 114)
    assert low < value < high < 3.0
    assert ratio_interval([2.0, 4.0], [1, 2]) == (2.0, 2.0, 2.0), "the same rate everywhere"
    with pytest.raises(ValueError, match="same rows"):
        ratio_interval([1.0], [])

import numpy as np
import pytest

from twinlora.evaluate.stats import paired_interval, wilson_interval


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

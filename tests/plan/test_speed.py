"""The time model on counts whose time can be worked out by hand."""

import pytest

from twinlora.plan.devices import find
from twinlora.plan.speed import Curve, InStep, Measured, launched, sort, stated
from twinlora.plan.work import Counts, Kind

MM = Kind("product", "mm", "bfloat16", 2 * 1024**3, 4 * 1024**2, 2 * 1024**2)
INT8 = Kind("int8 product", "blockwise_linear", "bfloat16", 2 * 1024**3, 4 * 1024**2, 2 * 1024**2)
NF4 = Kind("nf4 product", "nf4_linear", "bfloat16", 2 * 1024**3, 3 * 1024**2, 2 * 1024**2)
ADD = Kind("elementwise", "add", "float32", 1000, 8000, 4000)


def test_a_curve_goes_through_its_points_and_ends_flat():
    curve = Curve(((1.0, 10.0), (100.0, 1000.0)))
    assert [curve.at(x) for x in (0.1, 1, 10, 100, 1e6)] == pytest.approx([10, 10, 100, 1000, 1000])


def test_measured_rates_add_work_and_overhead():
    curves = {"product bfloat16": Curve(((1.0, 1e12),)), "elementwise": Curve(((1.0, 1e9),))}
    rates = Measured("here", curves, overhead=1e-6)
    seconds = rates.step_seconds(Counts({MM: 3, ADD: 10}), 1024)
    assert seconds == pytest.approx(3 * (MM.flops / 1e12 + 1e-6) + 10 * (12000 / 1e9 + 1e-6))
    slower = Measured("here", curves, overhead=1e-6, slowdown=1.5).step_seconds(Counts({MM: 3, ADD: 10}), 1024)
    assert slower == pytest.approx(1.5 * (seconds - 13e-6) + 13e-6), "work is slowed, what is around it is not"
    assert sum(rates.seconds_by_kind(Counts({MM: 3, ADD: 10}), 1024).values()) == pytest.approx(seconds)


def test_an_operation_has_its_own_curve_if_it_was_measured():
    curves = {
        "product float32": Curve(((1.0, 1e12),)),
        "mm": Curve(((1.0, 5e11),)),
        "elementwise": Curve(((1.0, 1e9),)),
    }
    assert Measured("", curves, 0).call_seconds(MM, 1) == pytest.approx(MM.flops / 5e11)
    assert Measured("", curves, 0).call_seconds(NF4, 1) == pytest.approx(NF4.flops / 1e12)
    curves["nf4 product bfloat16"] = Curve(((1.0, 4e11),))
    assert Measured("", curves, 0).call_seconds(NF4, 1) == pytest.approx(NF4.flops / 4e11)
    curves["nf4 product nf4_linear bfloat16"] = Curve(((1.0, 3e11),))
    assert Measured("", curves, 0).call_seconds(NF4, 1) == pytest.approx(NF4.flops / 3e11)


def test_a_call_takes_in_a_step_what_its_sort_does_there():
    curves = {"product bfloat16": Curve(((1.0, 1e12),)), "elementwise": Curve(((1.0, 1e9),))}
    rates = Measured("here", curves, 1e-6, {"product mm": InStep(2e-6, 1.5)}, slowdown=1.1, factor=2.0)
    assert rates.call_seconds(MM, 1) == pytest.approx(2 * (1.1 * (1.5 * MM.flops / 1e12 + 2e-6) + 1e-6))
    assert rates.call_seconds(ADD, 1) == pytest.approx(2 * (1.1 * 12e-6 + 1e-6)), "as it is alone"


def test_narrow_products_are_a_sort_of_their_own():
    narrow = Kind("product", "mm", "bfloat16", 2 * 1024 * 1024 * 16, 2 * 1024 * 1024 + 32768, 32768)
    assert [sort(MM), sort(narrow)] == ["product mm", "product mm narrow"]
    assert sort(INT8) != sort(Kind("nf3 product", "blockwise_linear", "bfloat16", 1, 1, 1))
    lists = Kind("optimiser", "_fused_adamw_", "float32", 1, 1, 1)
    assert launched(Counts({MM: 3, lists: 5})) == 3


def test_stated_peaks_are_a_roofline():
    rates = stated(find("H200"))
    assert rates.call_seconds(MM, 1024) == pytest.approx(MM.flops / 790e12 + 5e-6)
    assert rates.call_seconds(ADD, 1024) == pytest.approx(12000 / 4.3e12 + 5e-6)


@pytest.mark.parametrize("tokens, surcharge", [(2048, 0.20), (8192, 0.05)])
def test_decoding_weighs_less_the_more_tokens_share_it(tokens, surcharge):
    """Unfused, 4.5 bytes a weight: 413 / tokens of a product's time on an H200."""
    rates = stated(find("H200"))
    flops = 2 * tokens * 4096 * 4096
    plain, quantised = (Kind(n, n, "bfloat16", flops, 10**7, 10**7) for n in ("product", "nf4 product"))
    more = rates.call_seconds(quantised, tokens) / rates.call_seconds(plain, tokens) - 1
    assert more == pytest.approx(surcharge, abs=0.02)

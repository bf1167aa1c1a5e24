"""The time model on counts whose time can be worked out by hand."""

import pytest

from twinlora.plan.devices import find
from twinlora.plan.speed import Cost, Measured, launched, names, stated
from twinlora.plan.work import Counts, Kind

MM = Kind("product", "mm", "bfloat16", 2 * 1024**3, 4 * 1024**2, 2 * 1024**2)
NF4 = Kind("nf4 product", "nf4_linear", "bfloat16", 2 * 1024**3, 3 * 1024**2, 2 * 1024**2)
ADD = Kind("elementwise", "add", "float32", 1000, 8000, 4000)


def test_measured_rates_add_work_and_overhead():
    costs = {"product bfloat16": Cost(3e-6, 1e-12, 1e-11), "elementwise": Cost(byte=1e-9)}
    rates = Measured("here", costs, {}, overhead=1e-6)
    product = 3e-6 + MM.flops * 1e-12 + 6 * 1024**2 * 1e-11
    assert rates.call_seconds(MM, 1) == pytest.approx(product + 1e-6)
    seconds = rates.step_seconds(Counts({MM: 3, ADD: 10}), 1024)
    assert seconds == pytest.approx(3 * product + 10 * 12e-6 + 13e-6)
    slower = Measured("here", costs, {}, overhead=1e-6, slowdown=1.5).step_seconds(Counts({MM: 3, ADD: 10}), 1024)
    assert slower == pytest.approx(1.5 * (seconds - 13e-6) + 13e-6), "work is slowed, what is around it is not"
    assert Measured("here", costs, {}, 1e-6, factor=2.0).step_seconds(Counts({MM: 3, ADD: 10}), 1) == 2 * seconds
    assert sum(rates.seconds_by_kind(Counts({MM: 3, ADD: 10}), 1024).values()) == pytest.approx(seconds)


def test_the_cost_of_the_calls_most_alike_counts():
    sorts, operations = {"product float32": Cost(1.0), "elementwise": Cost(2.0)}, {}
    rates = Measured("", sorts, operations)
    assert rates.cost(MM) == rates.cost(NF4) == Cost(1.0)
    assert rates.cost(ADD) == Cost(2.0)
    sorts["nf4 product bfloat16"] = Cost(3.0)
    assert rates.cost(NF4) == Cost(3.0)
    operations["nf4 product nf4_linear bfloat16"] = Cost(4.0)
    assert rates.cost(NF4) == Cost(4.0)
    assert rates.cost(MM) == Cost(1.0)
    with pytest.raises(KeyError, match="product mm"):
        Measured("", {"elementwise": Cost()}, {}).cost(MM)


def test_narrow_products_and_every_type_have_names_of_their_own():
    narrow = Kind("product", "mm", "bfloat16", 2 * 1024 * 1024 * 16, 2 * 1024 * 1024 + 32768, 32768)
    assert names(MM) == ("product mm bfloat16", "product bfloat16")
    assert names(narrow) == ("product mm narrow bfloat16", "product bfloat16")
    assert names(ADD) == ("elementwise add", "elementwise")
    assert names(Kind("nf3 product", "blockwise_linear", "float32", 1, 1, 1)) == (
        "nf3 product blockwise_linear float32",
        "nf3 product float32",
    )
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

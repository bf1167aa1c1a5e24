"""Figures in, verdict out. Every number in a sentence comes from the measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from twinlora.evaluate.report import BASE, Difference, MethodResult, Verdict
from twinlora.evaluate.scores import title_of

__all__ = ["judge", "name_of", "peak_bytes"]

_NAMES = {
    "lora": "LoRA",
    "qlora": "QLoRA",
    "hybrid": "hybrid precision",
    "full": "full fine-tuning",
    BASE: "the untuned base",
}
_MATTERS = 0.05  # a smaller relative difference in memory or speed decides nothing
_FORGETS = 0.01  # nats a token, 1 % of perplexity: a smaller difference in forgetting is not worth a word


def name_of(method: str) -> str:
    """How a method is written in prose."""
    return _NAMES.get(method, method)


def judge(
    ways: list[MethodResult],
    differences: list[Difference],
    diverged: Sequence[str] = (),
    failed: Mapping[str, str] = MappingProxyType({}),
    *,
    metric: str,
    forgetting: list[Difference],
) -> Verdict:
    """Choose among the tuned ways by `metric`, or say why not; and say in notes which of them forget more.

    Withheld if a best learning rate lies at the edge of its grid, or every rate diverged: then the comparison would be
    between badly tuned methods; and if a method's run failed. Quality decides if the paired interval excludes 0, else
    memory, then speed.
    """
    verdict = _choose(ways, differences, diverged, failed, metric)
    return verdict.model_copy(update={"notes": _forgets_more(ways, forgetting)})


def _choose(
    ways: list[MethodResult],
    differences: list[Difference],
    diverged: Sequence[str],
    failed: Mapping[str, str],
    metric: str,
) -> Verdict:
    tuned = [way for way in ways if way.method != BASE]
    reasons = [_describe(way, metric) for way in tuned]
    rates = [f"every learning rate diverged for {name_of(method)}" for method in diverged] + _edges(tuned)
    withheld = rates + [f"{name_of(method)} failed ({why.splitlines()[0]})" for method, why in failed.items()]
    if withheld:
        advice = "Widen the grid of learning rates" if rates else "Mend that"
        sentence = "No verdict: " + "; ".join(withheld) + f". {advice} and compare again."
        return Verdict(choose=None, sentence=sentence, reasons=reasons, withheld=withheld)
    useless = _none_beats_base(tuned, differences)
    if useless:
        return Verdict(choose=None, sentence=useless, reasons=reasons)
    if len(tuned) == 1:
        return Verdict(choose=tuned[0].method, sentence=f"Only {_describe(tuned[0], metric)} was run.", reasons=reasons)
    best = max(tuned, key=lambda way: way.scores[metric].value)
    rivals = [way for way in tuned if way is not best and _between(best, way, differences).undecided]
    if not rivals:
        second = max((way for way in tuned if way is not best), key=lambda way: way.scores[metric].value)
        sentence = _clear_winner(best, second, differences, metric)
        return Verdict(choose=best.method, sentence=sentence, reasons=reasons)
    return _by_resources([best, *rivals], tuned, differences, reasons)


def _describe(way: MethodResult, metric: str) -> str:
    score = way.scores[metric]
    speed = f", {way.tokens_per_second:,.0f} tokens/s" if way.tokens_per_second else ""
    interval = f"{score.low:.1%} to {score.high:.1%}, {score.rows} rows"
    return (
        f"{name_of(way.method)}: {score.value:.1%} {title_of(metric)} ({interval}){speed}, "
        f"base weights {way.base_weight_bytes / 1e6:,.0f} MB, peak {peak_bytes(way) / 1e9:.2f} GB"
    )


def peak_bytes(way: MethodResult) -> int:
    """The memory that runs out first: the device's if there is one."""
    return way.peak_device_bytes or way.train_peak_rss_bytes or way.peak_rss_bytes


def _edges(tuned: list[MethodResult]) -> list[str]:
    """A line for each way whose best learning rate lies at the edge of its grid."""
    out = []
    for way in tuned:
        if way.at_edge and way.learning_rate is not None:
            rates = [point.lr for point in way.search]
            out.append(
                f"the best learning rate of {name_of(way.method)}, {way.learning_rate:g}, lies at the edge of its grid "
                f"({min(rates):g} to {max(rates):g})"
            )
    return out


def _between(a: MethodResult, b: MethodResult, differences: list[Difference]) -> Difference:
    """Paired difference a - b, turned round where it was recorded as b - a."""
    for d in differences:
        if (d.a, d.b) == (a.method, b.method):
            return d
        if (d.b, d.a) == (a.method, b.method):
            return Difference(a=d.b, b=d.a, value=-d.value, low=-d.high, high=-d.low, rows=d.rows)
    raise ValueError(f"no paired difference of {a.method} and {b.method}")


def _none_beats_base(tuned: list[MethodResult], differences: list[Difference]) -> str | None:
    to_base = [d for d in differences if d.b == BASE]
    if not to_base or any(d.low > 0 for d in to_base):
        return None
    best = max(to_base, key=lambda d: d.value)
    return (
        f"Neither method helped: the best, {name_of(best.a)}, differs from the untuned base by {_points(best)}. "
        "More rows or more epochs are needed before a choice means anything."
    )


def _points(d: Difference) -> str:
    return f"{100 * d.value:+.1f} points (95 % interval {100 * d.low:+.1f} to {100 * d.high:+.1f}, {d.rows} rows)"


def _clear_winner(best: MethodResult, second: MethodResult, differences: list[Difference], metric: str) -> str:
    sentence = f"Choose {name_of(best.method)}: in {title_of(metric)} it is better than {name_of(second.method)} by "
    sentence += _points(_between(best, second, differences))
    if peak_bytes(second) < (1 - _MATTERS) * peak_bytes(best):
        sentence += (
            f"; if memory is short, {name_of(second.method)} needs {peak_bytes(second) / 1e9:.2f} GB "
            f"instead of {peak_bytes(best) / 1e9:.2f} GB at its peak"
        )
    return sentence + "."


def _forgets_more(ways: list[MethodResult], forgetting: list[Difference]) -> list[str]:
    """A line for each pair of tuned ways of which one's loss on general text rose more, beyond noise."""
    general = {way.method: way.general for way in ways}
    out = []
    for d in forgetting:
        if d.b == BASE or d.low <= 0 <= d.high or abs(d.value) < _FORGETS:
            continue
        more, less = (d.a, d.b) if d.value > 0 else (d.b, d.a)
        if general[more].after <= general[more].before:
            continue  # neither forgot: one learnt less
        low, high = sorted((abs(d.low), abs(d.high)))
        changes = [f"{general[m].before:.3f} → {general[m].after:.3f}" for m in (more, less)]
        out.append(
            f"{name_of(more)} forgets more than {name_of(less)}: its loss on general text goes {changes[0]}, that of "
            f"{name_of(less)} {changes[1]}, a difference of {abs(d.value):.3f} nats a token (95 % interval {low:.3f} "
            f"to {high:.3f}, {d.rows} texts)."
        )
    return out


def _by_resources(
    equal: list[MethodResult], tuned: list[MethodResult], differences: list[Difference], reasons: list[str]
) -> Verdict:
    """Quality cannot tell `equal` apart: the smaller peak wins, if it is smaller at all, else the faster one."""
    smallest, largest = min(equal, key=peak_bytes), max(equal, key=peak_bytes)
    fastest = max(equal, key=lambda way: way.tokens_per_second or 0.0)
    slowest = min(equal, key=lambda way: way.tokens_per_second or 0.0)
    memory_decides = peak_bytes(smallest) < (1 - _MATTERS) * peak_bytes(largest)
    choice = smallest if memory_decides else fastest
    other = next(way for way in (largest, slowest, *equal) if way is not choice)
    d = _between(choice, other, differences)
    sentence = (
        f"Choose {name_of(choice.method)}: in quality it cannot be told from {name_of(other.method)}, {_points(d)}; "
        + _resources(choice, other)
    )
    weights = min(equal, key=lambda way: way.base_weight_bytes)
    if weights is not choice and weights.base_weight_bytes < (1 - _MATTERS) * choice.base_weight_bytes:
        sentence += (
            f" {name_of(weights.method)} stores the base in {weights.base_weight_bytes / 1e6:,.0f} MB instead of "
            f"{choice.base_weight_bytes / 1e6:,.0f} MB: take it when the weights, not the activations, fill the memory."
        )
    return Verdict(choose=choice.method, sentence=sentence, reasons=reasons)


def _resources(a: MethodResult, b: MethodResult) -> str:
    """`it peaks at … instead of … and trains … faster/slower.`"""
    speed_a, speed_b = a.tokens_per_second or 0.0, b.tokens_per_second or 0.0
    text = f"it peaks at {peak_bytes(a) / 1e9:.2f} GB against {peak_bytes(b) / 1e9:.2f} GB"
    if speed_a and speed_b:
        ratio = speed_a / speed_b - 1
        word = "faster" if ratio >= 0 else "slower"
        text += f" and trains {abs(ratio):.0%} {word} ({speed_a:,.0f} against {speed_b:,.0f} tokens/s)"
    return text + "."

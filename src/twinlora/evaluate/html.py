"""report.html: one file without any outside resource, rendered from the report's schema."""

from __future__ import annotations

import math
from pathlib import Path

import jinja2

from twinlora import atomic
from twinlora.evaluate import plots
from twinlora.evaluate.report import BASE, Difference, Report
from twinlora.evaluate.scores import METRICS, title_of
from twinlora.evaluate.verdict import name_of, peak_bytes

__all__ = ["render", "write"]


def write(report: Report, path: Path) -> None:
    """Write the page."""
    atomic.write_text(path, render(report))


def render(report: Report) -> str:
    """The page. Whatever comes from models, data or users is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("twinlora.evaluate", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": name_of,
        "size": _size,
        "percent": _percent,
        "duration": _duration,
        "title": title_of,
        "perplexity": _perplexity,
    }
    pictures = {
        "Test quality": (
            plots.quality(report),
            "Dots are measured shares, bands their 95 % intervals."
            if METRICS[report.metric].whole
            else "Dots are means over the rows, bands their 95 % intervals.",
        ),
        "Difference between methods": (
            plots.paired_differences(report),
            "Row by row on the same test rows. A band that crosses 0 means that these rows cannot tell the two apart.",
        ),
        "Training loss": (plots.loss_curves(report), "Same initial adapter, same rows in the same order."),
        "Learning-rate search": (
            plots.rate_search(report),
            "Short runs, judged on validation rows that are in neither other split. Rings mark the chosen rates.",
        ),
    }
    return environment.get_template("report.html").render(
        report=report,
        base=report.ways[0],
        tuned=[way for way in report.ways if way.method != BASE],
        pictures={title: picture for title, picture in pictures.items() if picture[0]},
        peak=peak_bytes,
        rise={d.a: _nats(d) for d in report.forgetting if d.b == BASE},
        fields=list(report.ways[0].fields),
        whole=METRICS[report.metric].whole,
    )


def _size(count: float) -> str:
    """Bytes as people write them, decimal units."""
    for unit, limit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= limit:
            digits = max(0, 2 - len(str(int(count / limit))) + 1) if unit == "GB" else 1 if count < 10 * limit else 0
            return f"{count / limit:.{digits}f} {unit}"
    return f"{count:.0f} B"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}"


def _nats(d: Difference) -> str:
    return f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

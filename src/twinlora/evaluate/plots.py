"""The figures of a report as SVG that follows the page's light or dark colours.

Matplotlib draws in placeholder colours; each becomes a CSS variable of the page, so one drawing serves both themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twinlora.evaluate.report import BASE, Report
from twinlora.evaluate.scores import title_of
from twinlora.evaluate.verdict import name_of

__all__ = ["loss_curves", "paired_differences", "quality", "rate_search"]

_WIDTH = 4.6  # inches; narrow, so that letters stay readable on a phone
_TEXT, _GRID = "#010101", "#020202"
_COLOURS = {BASE: "#030303", "lora": "#040404", "qlora": "#050505", "full": "#060606", "hybrid": "#070707"}
_VARIABLES = {_TEXT: "--text", _GRID: "--line"} | {colour: f"--{way}" for way, colour in _COLOURS.items()}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "twinlora", "font.size": 9.5, "font.family": "sans-serif",
    "text.color": _TEXT, "axes.labelcolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT, "axes.edgecolor": _GRID,
    "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
}  # fmt: skip


def quality(report: Report) -> str:
    """The deciding metric of every way with its 95 % interval."""

    def draw(axes: Axes) -> None:
        for y, way in enumerate(reversed(report.ways)):
            score, colour = way.scores[report.metric], _COLOURS[way.method]
            axes.plot(
                [100 * score.low, 100 * score.high],
                [y, y],
                color=colour,
                linewidth=5,
                solid_capstyle="round",
                alpha=0.35,
            )
            axes.plot(100 * score.value, y, "o", color=colour, markersize=8)
            right = score.value < 0.75
            axes.annotate(
                f"{100 * score.value:.1f} %", (100 * (score.high if right else score.low), y),
                xytext=(8 if right else -8, 0), textcoords="offset points", va="center",
                ha="left" if right else "right",
            )  # fmt: skip
        axes.set_yticks(range(len(report.ways)), [name_of(way.method) for way in reversed(report.ways)])
        axes.set_ylim(-0.6, len(report.ways) - 0.4)
        axes.set_xlim(-2, 102)
        axes.set_xlabel(f"{title_of(report.metric)} on the test rows, %")
        axes.grid(axis="y", visible=False)

    return _draw("quality", draw, 0.75 + 0.42 * len(report.ways))


def paired_differences(report: Report) -> str:
    """Differences among the tuned ways with their paired 95 % intervals; empty if there is one way only."""
    pairs = [d for d in report.differences if d.b != BASE]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=_TEXT, linewidth=1)
        for y, d in enumerate(reversed(pairs)):
            colour = _COLOURS[d.a if d.value >= 0 else d.b]
            axes.plot(
                [100 * d.low, 100 * d.high], [y, y], color=colour, linewidth=5, solid_capstyle="round", alpha=0.35
            )
            axes.plot(100 * d.value, y, "o", color=colour, markersize=8)
        axes.set_yticks(range(len(pairs)), [f"{name_of(d.a)} − {name_of(d.b)}" for d in reversed(pairs)])
        axes.set_ylim(-0.6, len(pairs) - 0.4)
        reach = 100 * max(max(abs(d.low), abs(d.high)) for d in pairs) * 1.15
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("difference in points, on the same rows")
        axes.grid(axis="y", visible=False)

    return _draw("paired", draw, 0.75 + 0.42 * len(pairs)) if pairs else ""


def loss_curves(report: Report) -> str:
    """Training loss by step; the thick line is a running mean."""

    def draw(axes: Axes) -> None:
        for way in report.ways[1:]:
            steps, losses = [p.step for p in way.curve], np.array([p.loss for p in way.curve])
            window = max(1, len(losses) // 12)
            mean = [losses[max(0, i - window + 1) : i + 1].mean() for i in range(len(losses))]
            axes.plot(steps, losses, color=_COLOURS[way.method], linewidth=0.8, alpha=0.4)
            axes.plot(steps, mean, color=_COLOURS[way.method], linewidth=1.8, label=name_of(way.method))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss, nats per trained token")
        axes.set_yscale("log")
        axes.legend()

    return _draw("curves", draw, 2.9) if len(report.ways) > 1 else ""


def rate_search(report: Report) -> str:
    """Validation loss by learning rate; the ring marks the chosen rate, a cross one that diverged."""
    searched = [way for way in report.ways if len(way.search) > 1]

    def draw(axes: Axes) -> None:
        rates = sorted({point.lr for way in searched for point in way.search})
        for way in searched:
            colour = _COLOURS[way.method]
            alive = [(p.lr, p.validation_loss) for p in way.search if p.validation_loss is not None]
            axes.plot(*zip(*alive, strict=True), "o-", color=colour, label=name_of(way.method), markersize=4)
            best = next(loss for lr, loss in alive if lr == way.learning_rate)
            assert way.learning_rate is not None
            axes.plot(way.learning_rate, best, "o", markersize=12, markerfacecolor="none", markeredgecolor=colour)
            for lr in {p.lr for p in way.search} - {lr for lr, _ in alive}:
                axes.plot(lr, max(loss for _, loss in alive), "x", color=colour, markersize=8)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss")
        axes.legend()

    return _draw("search", draw, 2.9) if searched else ""


def _draw(name: str, draw: Callable[[Axes], None], height: float) -> str:
    """Call `draw` on fresh axes; the picture as an `<svg>` element whose ids start with `name`."""
    with rc_context(_STYLE):
        figure = Figure((_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # Ids are unique within a drawing only; the page holds several.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)

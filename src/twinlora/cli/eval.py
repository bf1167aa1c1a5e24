"""`twinlora eval`."""

from __future__ import annotations

from functools import partial
from typing import Any

from twinlora.cli.console import carry_out, figures_table, out, print_table
from twinlora.config import EvalOptions


def run(options: EvalOptions) -> None:
    """Measure, then print the figures."""
    from twinlora.data.examples import Advice
    from twinlora.evaluate.evaluate import evaluate

    advice = Advice("give --max-length {longest}, or leave these rows out", "mend them, or leave them out")
    carry_out(options, partial(evaluate, advice=advice), lambda result: show(result, options))


def show(result: dict[str, Any], options: EvalOptions) -> None:
    """A line a figure: its value and its 95 % interval; the fields of JSON below their mean."""
    from twinlora.evaluate.scores import METRICS, title_of

    table = figures_table(f"{result['rows']} rows", "", "95 % interval", words=["95 % interval"])
    for name, digits in (("loss", 4), ("perplexity", 2)):
        if name in result:
            low, high = (f"{end:.{digits}f}" for end in result[f"{name}_interval"])
            table.add_row(name, f"{result[name]:.{digits}f}", f"{low} to {high}")
    for name in METRICS:
        if figure := result.get(name.replace("-", "_")):
            hits = f"  ({figure['hits']} of {figure['rows']})" if "hits" in figure else ""
            interval = f"{figure['low']:.1%} to {figure['high']:.1%}{hits}"
            table.add_row(title_of(name), f"{figure['value']:.1%}", interval)
            for field, share in figure.get("fields", {}).items():
                table.add_row(f"  {field}", f"{share:.1%}")
    print_table(table)
    if options.output:
        out.print(f"rows: {options.output}", markup=False)

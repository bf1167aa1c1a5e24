"""`twinlora eval`."""

from __future__ import annotations

from twinlora.cli.console import out, print_json
from twinlora.config import EvalOptions
from twinlora.reporter import ConsoleReporter


def run(options: EvalOptions) -> None:
    """Measure, then print the figures."""
    from twinlora.evaluate.evaluate import evaluate

    reporter = ConsoleReporter()
    try:
        result = evaluate(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(result)
        return
    if "loss" in result:
        out.print(f"loss         {result['loss']:.4f} (perplexity {result['perplexity']:.2f})")
    if "exact_match" in result:
        match = result["exact_match"]
        out.print(
            f"exact match  {match['value']:.1%} ({match['hits']} of {match['rows']}, 95 % interval "
            f"{match['low']:.1%} to {match['high']:.1%})"
        )

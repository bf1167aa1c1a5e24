"""`twinlora merge`."""

from __future__ import annotations

from twinlora.cli.console import print_json
from twinlora.cli.export import show
from twinlora.config import MergeOptions
from twinlora.reporter import ConsoleReporter


def run(options: MergeOptions) -> None:
    """Fold an adapter into its base, then print how the result compares."""
    from twinlora.export.ship import merge

    reporter = ConsoleReporter()
    try:
        record = merge(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(record)
    else:
        show(record)

"""`twinlora adapter compress`."""

from __future__ import annotations

from twinlora.cli.adapter_combine import show
from twinlora.cli.console import print_json
from twinlora.config import AdapterCompressOptions
from twinlora.reporter import ConsoleReporter


def run(options: AdapterCompressOptions) -> None:
    """Write the adapter, then print what is lost."""
    from twinlora.export.combine import compress

    reporter = ConsoleReporter()
    try:
        result = compress(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(result)
    else:
        show(result)

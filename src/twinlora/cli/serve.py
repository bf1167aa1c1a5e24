"""`twinlora serve`."""

from __future__ import annotations

import sys
from typing import Any

from twinlora.cli.chat import parse_adapters
from twinlora.cli.console import err, print_json
from twinlora.config import ServeOptions
from twinlora.errors import BackendError
from twinlora.reporter import ConsoleReporter


def run(options: ServeOptions) -> None:
    """Serve until a signal comes."""
    adapters = parse_adapters(options.adapter)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendError(f"serving needs {error.name}: pip install 'twinlora[serve]'") from None
    from twinlora.serve.server import serve

    def announce(facts: dict[str, Any]) -> None:
        if options.json_output:
            print_json(facts)
            sys.stdout.flush()
        else:
            err.print(
                f"serving {facts['base']} and {len(facts['adapters'])} adapter(s) on {facts['url']}", markup=False
            )

    serve(options, adapters, ConsoleReporter(), announce)

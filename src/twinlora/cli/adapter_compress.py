"""`twinlora adapter compress`."""

from __future__ import annotations

from twinlora.cli.adapter_combine import show
from twinlora.cli.console import carry_out
from twinlora.config import AdapterCompressOptions


def run(options: AdapterCompressOptions) -> None:
    """Write the adapter, then print what is lost."""
    from twinlora.export.combine import compress

    carry_out(options, compress, show)

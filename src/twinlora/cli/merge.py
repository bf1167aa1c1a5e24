"""`twinlora merge`."""

from __future__ import annotations

from twinlora.cli.console import carry_out
from twinlora.cli.export import show
from twinlora.config import MergeOptions


def run(options: MergeOptions) -> None:
    """Fold an adapter into its base, then print how the result compares."""
    from twinlora.export.ship import merge

    carry_out(options, merge, show)

"""What the benchmarks share: the package on the path, and the facts recorded with every result."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))  # runs without installing, too

PEERS = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")


def facts() -> dict:
    """The machine, the versions of what is compared, and the commit."""
    from twinlora import machine
    from twinlora.numerics import ops

    versions = {}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return {"machine": machine.describe(), "versions": versions, "backend": ops.backend(), "git_hash": commit.strip()}

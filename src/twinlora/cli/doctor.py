"""`twinlora doctor`."""

from __future__ import annotations

from twinlora.cli.console import out, print_json
from twinlora.config import DoctorOptions


def run(options: DoctorOptions) -> None:
    """Print what this machine is, and which backend does the arithmetic."""
    from twinlora import machine
    from twinlora.model.load import pick_device
    from twinlora.numerics import ops

    device = pick_device("auto")
    facts = machine.describe(device) | {"backend": ops.backend(device)}
    if options.json_output:
        print_json(facts)
        return
    out.print(f"cpu      {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads in use", markup=False)
    out.print(f"memory   {facts['memory_bytes'] / 2**30:.1f} GiB")
    out.print(f"device   {facts['device']}", markup=False)
    out.print(f"backend  {facts['backend']}")
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "twinlora"))
    out.print(f"versions {versions}")

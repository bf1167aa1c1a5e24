"""`twinlora doctor`."""

from __future__ import annotations

from twinlora.cli.console import out, print_json
from twinlora.config import DoctorOptions


def run(options: DoctorOptions) -> None:
    """Print what this machine is, and which backend does the arithmetic."""
    from twinlora import machine
    from twinlora.model.load import pick_device
    from twinlora.numerics import cpu, ops

    device = pick_device("auto")
    facts = machine.describe(device) | {"backend": ops.backend(device), "cpu_paths": cpu.paths()}
    facts["openmp"] = cpu.runtime() if cpu.paths() else None
    if options.json_output:
        print_json(facts)
        return
    out.print(f"cpu      {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads in use", markup=False)
    out.print(f"memory   {facts['memory_bytes'] / 2**30:.1f} GiB")
    out.print(f"device   {facts['device']}", markup=False)
    out.print(f"backend  {facts['backend']}")
    if not cpu.paths():
        out.print(
            "         the compiled CPU backend is missing: install a C++ compiler, then `pip install --force-reinstall`"
        )
        out.print("         twinlora again; until then NF4 is decoded several times slower")
    elif not facts["openmp"]:
        out.print("         no OpenMP runtime of torch was found, so its kernels run on one thread")
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "twinlora"))
    out.print(f"versions {versions}")

"""`twinlora doctor`: this machine, and the command that mends what is missing."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.text import Text

from twinlora.cli.console import out, print_json
from twinlora.config import DoctorOptions

# Packages that a feature asks for and a plain installation lacks: what each is for.
_OPTIONAL = {
    "sacrebleu": "--metric chrf",
    "rouge-score": "--metric rouge-l",
    "triton": "kernels for NF4 on a GPU",
    "fastapi": "twinlora serve",
    "uvicorn": "twinlora serve",
    "prometheus-client": "twinlora serve",
    "lm-eval": "lm-evaluation-harness on our models",
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "mlflow": "--report-to mlflow",
    "trackio": "--report-to trackio",
    "xllamacpp": "export --to gguf, compared in llama.cpp",
    "bitsandbytes": "export --to bnb, compared in it",
    "peft": "export --to peft, compared in it",
}
_LITTLE_DISK = 10 * 10**9  # bytes; a checkpoint of a 7B model alone has 14 GB


def run(options: DoctorOptions) -> None:
    """Print the facts, then what is missing, each with the command that mends it."""
    facts = examine()
    if options.json_output:
        print_json(facts)
    else:
        show(facts)


def examine() -> dict[str, Any]:
    """Everything that doctor knows, as JSON. Sizes in bytes, rates in flop/s."""
    from twinlora import machine
    from twinlora.model.load import pick_device
    from twinlora.numerics import cpu, ops, pool

    device = pick_device("auto")
    facts = machine.describe(device) | {
        "backend": ops.backend(device),
        "cpu_paths": cpu.paths(),
        "openmp": cpu.runtime() if cpu.paths() else None,
        "no_tensor_pool": pool.refusal(),
        "rates": _rates(),
        "gpu": _gpu(),
        "hub": _hub(),
        "disk": _disk(),
        "optional": {name: {"version": _version(name), "for": use} for name, use in _OPTIONAL.items()},
    }
    facts["missing"] = _missing(facts)
    return facts


def _rates() -> dict[str, float]:
    """Matrix products on the CPU by type."""
    import torch

    from twinlora.machine import product_rates

    narrow, wide = product_rates(torch.bfloat16, torch.float32)
    return {"bfloat16": narrow, "float32": wide}


def _gpu() -> dict[str, Any]:
    """The GPUs that torch sees, and what explains that it sees none."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        found.append({"name": name, "capability": capability, "memory_bytes": total, "free_bytes": free})
    return {"devices": found, "torch_cuda": torch.version.cuda, "driver": shutil.which("nvidia-smi") is not None}


def _hub() -> dict[str, Any]:
    """Where hub models are kept, and whether a token is set; never the token."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    return {"cache": str(cache), "offline": bool(constants.HF_HUB_OFFLINE), "token": get_token() is not None}


def _disk() -> dict[str, dict[str, Any]]:
    """Free space where models are kept and where runs are written."""
    from huggingface_hub import constants

    from twinlora.model.fingerprint import cache_directory

    places = {"hub cache": Path(constants.HF_HUB_CACHE), "twinlora's cache": cache_directory(), "here": Path.cwd()}
    return {name: {"path": str(path), "free_bytes": _free(path)} for name, path in places.items()}


def _free(path: Path) -> int:
    """Free bytes of the file system on which `path` is or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What stands in the way of full speed or of a run, and what mends it. Optional packages are listed apart."""
    found = []
    if not facts["cpu_paths"]:
        found.append(("the compiled CPU backend: NF4 is decoded several times slower", "install a C++ compiler, then "
                      "`pip install --editable .` in twinlora's sources"))  # fmt: skip
    elif not facts["openmp"]:
        found.append(
            ("an OpenMP runtime of torch: our kernels run on one thread", "pip install --force-reinstall torch")
        )
    if facts["gpu"]["driver"] and not facts["gpu"]["torch_cuda"]:
        found.append(
            ("a CUDA build of torch: this machine has an NVIDIA driver", "make CUDA=1, or PyTorch's install page")
        )
    elif facts["gpu"]["torch_cuda"] and facts["gpu"]["driver"] and not facts["gpu"]["devices"]:
        found.append(("a GPU that torch can use, though a driver is here", "nvidia-smi; then CUDA_VISIBLE_DEVICES"))
    if facts["gpu"]["devices"] and not facts["optional"]["triton"]["version"]:
        found.append(("Triton: NF4 on the GPU is computed in plain PyTorch", "pip install triton"))
    if facts["threads"] < facts["cores"] and "OMP_NUM_THREADS" in os.environ:
        found.append((f"{facts['cores'] - facts['threads']} of {facts['cores']} cores", "unset OMP_NUM_THREADS"))
    for name, place in facts["disk"].items():
        if place["free_bytes"] < _LITTLE_DISK:
            mend = "HF_HOME=DIR on a larger disk" if name == "hub cache" else "remove old runs, or a larger disk"
            found.append((f"room on disk: {_size(place['free_bytes'])} free ({name}, {place['path']})", mend))
    return [{"what": what, "mend": mend} for what, mend in found]


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def _line(label: str, text: str) -> None:
    out.print(Text.assemble((f"{label:<10}", "dim"), text))


def show(facts: dict[str, Any]) -> None:
    """The facts, a line each."""
    _line("cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads in use")
    _line("memory", f"{facts['memory_bytes'] / 2**30:.1f} GiB")
    if why := facts["no_tensor_pool"]:
        _line("", f"no pool for torch's large tensors: {why}; steps on the CPU take up to half as much again")
    _line("gpu", _gpu_line(facts["gpu"]))
    _line("backend", facts["backend"])
    rates = {name: rate / 1e9 for name, rate in facts["rates"].items()}
    speed = "fast" if rates["bfloat16"] >= rates["float32"] else "slow, so that --dtype auto takes float32"
    _line("bfloat16", f"{speed} ({rates['bfloat16']:,.0f} GFLOP/s on the CPU, float32 {rates['float32']:,.0f})")
    hub = facts["hub"]
    offline = ", offline (HF_HUB_OFFLINE)" if hub["offline"] else ""
    _line("hub", f"{hub['cache']}, token {'set' if hub['token'] else 'not set (hf auth login)'}{offline}")
    places = {place["path"]: f"{_size(place['free_bytes'])} free ({name})" for name, place in facts["disk"].items()}
    _line("disk", ", ".join(places.values()))
    _line("versions", ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "twinlora")))
    out.print()
    width = max(map(len, _OPTIONAL)) + 2
    for number, (name, package) in enumerate(facts["optional"].items()):
        state = package["version"] or "–"
        mend = "" if package["version"] else f"pip install {name}"
        _line("" if number else "optional", f"{name:<{width}}{state:<16}{package['for']:<38}{mend}".rstrip())
    out.print()
    for number, missing in enumerate(facts["missing"]):
        _line("" if number else "missing", missing["what"])
        _line("", f"→ {missing['mend']}")
    if not facts["missing"]:
        _line("missing", "nothing")


def _gpu_line(gpu: dict[str, Any]) -> str:
    if gpu["devices"]:
        return "; ".join(
            f"{d['name']}, {d['free_bytes'] / 2**30:.1f} of {d['memory_bytes'] / 2**30:.1f} GiB free, capability "
            f"{d['capability']}"
            for d in gpu["devices"]
        )
    build = f"torch for CUDA {gpu['torch_cuda']}" if gpu["torch_cuda"] else "torch is a CPU build"
    return f"none ({build}; {'an NVIDIA driver is here' if gpu['driver'] else 'no NVIDIA driver'})"

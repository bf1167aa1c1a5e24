"""twinlora on a GPU: first whether it is right there, then how fast, beside the peers that are installed.

    python benchmarks/gpu.py                       all sections, into benchmarks/results/gpu.json
    python benchmarks/gpu.py --only checks,steps   some of them; what the file has of others stays
    python benchmarks/gpu.py --continue --seconds 500   cells that are missing, and none begun after 500 seconds
    python benchmarks/gpu.py --dry-run             every section on the CPU in tiny shapes, the large ones as fake tensors

Every result is written as soon as it is there. Peers: peft, bitsandbytes, unsloth, liger-kernel, where installed. A cell
that runs out of memory says so and the next one begins; times are medians by CUDA events, ways taken in turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import torch

from twinlora import atomic

DEFAULT = harness.ROOT / "benchmarks" / "results" / "gpu.json"
PEERS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "liger-kernel")


def sections() -> dict[str, Callable[..., Any]]:
    import gpu_checks
    import gpu_kernels
    import gpu_steps

    return {
        "rates": gpu_kernels.rates,
        "checks": gpu_checks.sections,
        "fits": gpu_steps.fits,
        "steps": gpu_steps.steps,
        "kernels": gpu_kernels.kernels,
        "head": gpu_kernels.head,
        "blocks": gpu_kernels.blocks,
        "decode": gpu_steps.decode,
        "adapters": gpu_kernels.adapters,
    }


def facts(device: torch.device) -> dict[str, Any]:
    return harness.facts(device, PEERS) | {"date": time.strftime("%Y-%m-%d")}


def run_cell(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What it found; a lack of memory or a failure is a finding, too."""
    try:
        return work()
    except torch.OutOfMemoryError:
        found = {"out_of_memory": True}
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError) as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def failed(result: dict[str, Any]) -> bool:
    return "error" in result or result.get("passed") is False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="sections, comma-separated")
    parser.add_argument("--output", type=Path, help=f"default: {DEFAULT.relative_to(harness.ROOT)}; none in a dry run")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--continue", dest="proceed", action="store_true", help="leave out cells that the file has")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    from gpu_measure import Setting

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("this torch sees no GPU; --dry-run runs every section on the CPU, for its harness alone")
    device = torch.device("cpu" if args.dry_run else "cuda")
    setting = Setting(device, args.dry_run, 2 if args.dry_run else args.rounds)
    output = args.output or (None if args.dry_run else DEFAULT)
    known = sections()
    chosen = args.only.split(",") if args.only else list(known)
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"no section {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    document = json.loads(output.read_text()) if output and output.exists() else {"sections": {}}
    start, bad = time.monotonic(), []
    for name in chosen:
        section = document["sections"].setdefault(name, {"results": {}})
        section |= facts(device) | {"dry_run": args.dry_run}
        for key, work in known[name](setting):
            if args.proceed and key in section["results"] and not failed(section["results"][key]):
                continue
            if time.monotonic() - start > args.seconds:
                raise SystemExit(f"stopped before {name}: {key}, after {args.seconds:.0f} s; go on with --continue")
            section["results"][key] = found = run_cell(work, device)
            if failed(found):
                bad.append(f"{name}: {key}")
            print(f"{name:<9} {key:<32} {shown(found)}", flush=True)
            if output:
                atomic.write_json(output, document)
    if bad:
        print("failed:", *bad, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)


def shown(result: dict[str, Any]) -> str:
    """A line of figures."""
    parts = []
    for key, value in result.items():
        if isinstance(value, dict):
            value = " ".join(
                f"{name} {number:.4g}" for name, number in value.items() if isinstance(number, (int, float))
            )
        parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)


if __name__ == "__main__":
    main()

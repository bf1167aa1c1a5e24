"""What the planner says of twenty pairs of a model and a device, in one process, and how long that takes.

    python benchmarks/plan_table.py [--output benchmarks/results/plan_table.json]

Nothing is downloaded: models are built-in shapes. Rows of 512 tokens that all carry loss, 16 a step, rank 16. Also the
border of 65B with QLoRA (one row of 512 tokens): the least memory that fits, found by bisection over whole answers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import harness  # puts src on the path

MODELS = ("smollm2-1.7b", "llama3-8b", "phi4", "qwen2.5-32b", "llama-65b")
DEVICES = ("RTX 4090", "A40", "A100 80GB", "H200")
GIB = 2**30


def summary(model: str, device: str, **more: Any) -> dict[str, Any]:
    from twinlora.config import PlanOptions
    from twinlora.plan.answer import plan
    from twinlora.reporter import Reporter

    start = time.perf_counter()
    document = plan(PlanOptions(model=model, device=device, **more), Reporter()).document()
    kept = ("choice", "reason", "runner_up", "sentences", "change_lines", "memory_bytes", "rows")
    return {"model": model, "device": device, "seconds": time.perf_counter() - start} | {k: document[k] for k in kept}


def border() -> dict[str, Any]:
    """QLoRA on 65B: bytes that fit, and what 2 % less are."""

    def fit(size: int) -> str:
        found = summary("llama-65b", "A40", memory=f"{size / GIB:.6f}GiB", batch_size=1, micro_batch_tokens=512)
        return next(row for row in found["rows"] if row["method"] == "qlora")["fit"]

    low, high = 20 * GIB, 80 * GIB
    while high - low > 2**22:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) == "fits" else (middle, high)
    row = next(
        row
        for row in summary("llama-65b", "A40", memory=f"{high / GIB:.6f}GiB", batch_size=1, micro_batch_tokens=512)[
            "rows"
        ]
        if row["method"] == "qlora"
    )
    return {"fits": high, "peak_bytes": row["peak_bytes"], "two_percent_less": fit(int(0.98 * high))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    start, busy, pairs = time.perf_counter(), time.process_time(), []
    for model in args.models.split(","):
        for device in DEVICES:
            pairs.append(summary(model, device))
            print(
                f"{model:<14} {device:<10} {pairs[-1]['choice'] or 'nothing':<8} {pairs[-1]['seconds']:6.1f} s",
                flush=True,
            )
    document = harness.facts() | {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "pairs": pairs,
        "border_65b": border(),
    }
    if args.output:
        args.output.write_text(json.dumps(document, indent=1))
    print(f"{len(pairs)} pairs in {document['seconds']:.0f} s; 65B: {document['border_65b']}")


if __name__ == "__main__":
    main()

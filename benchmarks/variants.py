"""banking77, 1,000 rows, one epoch: the variants of LoRA, and full fine-tuning, against LoRA. Three seeds.

    python benchmarks/variants.py --data DIR --model DIR --output benchmarks/results/variants.json

Each way first chooses its learning rate by the loss on 200 further training rows after 400 rows: doubled or halved as
long as that helps. Then it trains on the first 1,000 rows once for each seed (initial adapter and order of rows) and
answers 1,000 test rows. Every run is a process of its own; runs that the output already has are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # puts src on the path

# What each way changes, and the learning rate at which its search starts.
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"method": "lora"}, 2e-3),
    "rslora": ({"method": "lora", "rslora": True}, 5e-4),
    "dora": ({"method": "lora", "dora": True}, 2e-3),
    "pissa": ({"method": "lora", "init": "pissa"}, 5e-4),
    "lora-plus": ({"method": "lora", "lora_plus_ratio": 4.0}, 1e-3),
    "qlora": ({"method": "qlora"}, 2e-3),
    "qlora-loftq": ({"method": "qlora", "init": "loftq"}, 2e-3),
    "full": ({"method": "full"}, 1e-4),
}


def rows_of(path: Path, start: int, count: int) -> str:
    return "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[start : start + count])


def one(args: argparse.Namespace) -> dict:
    """Train once; with `--search` the loss on the validation rows, else the hits on the test rows."""
    from twinlora.config import TrainOptions
    from twinlora.data.sources import read_rows
    from twinlora.evaluate.metrics import predict
    from twinlora.evaluate.scores import row_scores
    from twinlora.reporter import ConsoleReporter
    from twinlora.train.loop import train

    changes, _ = WAYS[args.one]
    with tempfile.TemporaryDirectory() as scratch:
        train_rows, held, test = (Path(scratch, f"{name}.jsonl") for name in ("train", "held", "test"))
        train_rows.write_text(rows_of(args.data / "train.jsonl", 0, 400 if args.search else 1000), encoding="utf-8")
        held.write_text(rows_of(args.data / "train.jsonl", 1000, 200), encoding="utf-8")
        test.write_text(rows_of(args.data / "test.jsonl", 0, 1000), encoding="utf-8")
        options = TrainOptions(
            model=args.model, data=train_rows, eval=held, output=Path(scratch, "run"), lr=args.lr, seed=args.seed, **changes
        )  # fmt: skip
        done = train(options, ConsoleReporter(f"{args.one} {args.lr:g}"))
        found = {key: done.record[key] for key in ("eval_loss", "trainable_parameters", "seconds", "peak_rss_bytes")}
        if not args.search:
            predictions = predict(
                done.model, done.tokenizer, read_rows(test), batch_size=64, max_new_tokens=24,
                reporter=ConsoleReporter(args.one),
            )  # fmt: skip
            found["hits"] = [bool(score) for score in row_scores("exact-match", predictions)]
    return found


def run(args: argparse.Namespace, *flags: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch, "part.json")
        command = [sys.executable, __file__, "--data", str(args.data), "--model", args.model, "--output", str(part)]
        start = time.perf_counter()
        subprocess.run([*command, *flags], check=True)
        return json.loads(part.read_text()) | {"wall_seconds": time.perf_counter() - start}


def search(way: str, losses: dict[str, float], measure: Callable[[float], float]) -> float:
    """The best rate of the ladder 2^k times the first, whose neighbours are both worse. Fills `losses`."""

    def loss(lr: float) -> float:
        if f"{lr:g}" not in losses:
            losses[f"{lr:g}"] = measure(lr)
        return losses[f"{lr:g}"]

    best = WAYS[way][1]
    while (better := min((2 * best, best, best / 2), key=loss)) != best:
        best = better
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.output.write_text(json.dumps(one(args)))
        return
    results = json.loads(args.output.read_text()) if args.output.exists() else {"ways": {}}
    results |= harness.facts()
    for way in args.ways.split(","):
        found = results["ways"].setdefault(way, {"search": {}, "runs": {}})

        def measure(lr: float, way: str = way) -> float:
            return run(args, "--one", way, "--lr", f"{lr:g}", "--search")["eval_loss"]

        best = search(way, found["search"], measure)
        args.output.write_text(json.dumps(results, indent=1))
        for seed in args.seeds.split(","):
            if seed not in found["runs"]:
                found["runs"][seed] = run(args, "--one", way, "--lr", f"{best:g}", "--seed", seed) | {"lr": best}
                args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""banking77, 2,000 rows, one epoch: twinlora against PEFT (LoRA) and PEFT + bitsandbytes (QLoRA).

    python benchmarks/banking77.py --data DIR --model DIR --output benchmarks/results/banking77.json

Every way runs in a process of its own, from the same initial adapter, over the same rows in the same order
(the `tuned` peers regroup rows by length). DIR holds train.jsonl and test.jsonl in the `messages` form.
`--ways` and `--seeds` choose what to run; other runs in the output are kept. A seed draws the initial adapter.
Speed is measured by cpu_train.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness  # puts src on the path


def rows_of(path: Path, count: int) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def run_ours(method: str, args: argparse.Namespace, train_rows: list[dict], test_rows: list[dict]) -> dict:
    """The same through twinlora's own training loop and evaluation."""
    import peers

    from twinlora.config import TrainOptions
    from twinlora.data.sources import read_rows
    from twinlora.evaluate.metrics import predict
    from twinlora.evaluate.scores import row_scores
    from twinlora.reporter import ConsoleReporter
    from twinlora.train.loop import train

    recipe = peers.Recipe()
    with tempfile.TemporaryDirectory() as scratch:
        data, test = Path(scratch, "train.jsonl"), Path(scratch, "test.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in train_rows))
        test.write_text("".join(json.dumps(row) + "\n" for row in test_rows))
        options = TrainOptions(
            model=args.model, data=data, method=method, output=Path(scratch, "run"), init_adapter=Path(args.initial),
            rank=recipe.rank, alpha=recipe.alpha, lr=recipe.lr, warmup_steps=recipe.warmup_steps,
            batch_size=recipe.batch_size, max_grad_norm=recipe.clip, shuffle=False,
        )  # fmt: skip
        done = train(options, ConsoleReporter(method))
        steps = [json.loads(line) for line in (options.output / "metrics.jsonl").read_text().splitlines()]
        totals = [0, *(step["tokens"] for step in steps)]
        result = {
            "losses": [step["loss"] for step in steps],
            "step_seconds": [step["seconds"] for step in steps],
            "tokens": [after - before for before, after in itertools.pairwise(totals)],
            "peak_rss_train_bytes": done.record["peak_rss_bytes"],
            "backend": done.record["backend"],
        }
        start = time.perf_counter()
        predictions = predict(
            done.model, done.tokenizer, read_rows(test), batch_size=recipe.eval_batch,
            max_new_tokens=recipe.max_new_tokens, reporter=ConsoleReporter(method),
        )  # fmt: skip
        result["hits"] = [score == 1 for score in row_scores("exact-match", predictions)]
        result["eval_seconds"] = time.perf_counter() - start
    return result


def run_one(way: str, args: argparse.Namespace) -> dict:
    train_rows = rows_of(args.data / "train.jsonl", args.rows)
    test_rows = rows_of(args.data / "test.jsonl", args.test_rows)
    if way in harness.OUR_WAYS:
        return run_ours(harness.OUR_WAYS[way], args, train_rows, test_rows)
    import peers

    return peers.train_and_test(
        args.model,
        args.initial,
        train_rows,
        test_rows,
        peers.Recipe(),
        progress=lambda text: print(f"[{way}] {text}", file=sys.stderr, flush=True),
        **harness.PEER_WAYS[way],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ways", default=",".join([*harness.PEER_WAYS, *harness.OUR_WAYS]))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument("--initial", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.output.write_text(json.dumps(run_one(args.one, args)))
        return
    import peers

    results = json.loads(args.output.read_text()) if args.output.exists() else {"ways": {}}
    results |= harness.facts()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds.split(","):
            initial = f"{scratch}/initial-{seed}"
            peers.write_initial_adapter(args.model, initial, peers.Recipe(), int(seed))
            for way in args.ways.split(","):
                part = Path(scratch, f"{way}.json")
                command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
                command += ["--initial", initial, "--output", str(part)]
                start = time.perf_counter()
                subprocess.run(command, check=True)
                found = json.loads(part.read_text()) | {"wall_seconds": time.perf_counter() - start}
                results["ways"].setdefault(way, {})[seed] = found
                args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

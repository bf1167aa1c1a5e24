"""Where a training run was killed, torn, or found the disk full, and what came of it: a Markdown table.

`python benchmarks/faults.py` (minutes). Every operation below the run's directory and the cache is hit: a fork of one
process trains a tiny model until the fault, another resumes. See tests/train/faults.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conftest import chat, tiny_tokenizer, write_jsonl, write_tiny
from tests.train import faults

FAULTS = {
    "die": "killed before it",
    "tear": "killed in the middle of it",
    "power": "power lost before it, unsynced bytes gone",
    "full": "no space from it on",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tiny(directory, tiny_tokenizer())
        write_jsonl(directory / "train.jsonl", [chat("say " + "ab" * (i % 7), f"word {i}") for i in range(8)])
        process = faults.start(directory, list(FAULTS))
        assert process.stdout is not None
        outcomes = [json.loads(line) for line in process.stdout]
        assert process.wait() == 0
    tried: Counter[tuple[str, str, str]] = Counter()
    failed: Counter[tuple[str, str, str]] = Counter()
    for outcome in outcomes:
        key = (outcome["path"], outcome["operation"], outcome["fault"])
        tried[key] += 1
        failed[key] += bool(outcome["wrong"])
    print(f"| path | operation | {' | '.join(FAULTS.values())} |\n|---|---|{'---|' * len(FAULTS)}")
    for path, operation in dict.fromkeys(key[:2] for key in tried):
        keys = [(path, operation, fault) for fault in FAULTS]
        cells = [f"{tried[key] - failed[key]} of {tried[key]}" if tried[key] else "–" for key in keys]
        print(f"| `{path}` | {operation} | {' | '.join(cells)} |")
    print(f"\n{sum(tried.values())} faults, {sum(failed.values())} with another result than the undisturbed run.")
    for outcome in outcomes:
        if outcome["wrong"]:
            print(outcome)


if __name__ == "__main__":
    main()

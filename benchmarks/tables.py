"""Write the measured tables of README.md from benchmarks/results/*.json.

python benchmarks/tables.py            rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/tables.py --check    exits with 1 if the page is not what the results say
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine_line(result: dict) -> str:
    m, v = result["machine"], result["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in v.items())
    return f"{m['cpu']}, {m['threads']} threads, {m['memory_bytes'] / 2**30:.0f} GiB; {versions}."


def rate(way: dict) -> float:
    """Median over the steps of real (not padding) tokens per second."""
    return statistics.median(
        tokens / seconds for tokens, seconds in zip(way["tokens"], way["step_seconds"], strict=True)
    )


def banking77() -> str:
    """Quality of whole runs; speed and memory of a quiet interleaved run."""
    from twinlora.evaluate.stats import paired_interval, wilson_interval

    quality = json.loads((RESULTS / "banking77.json").read_text())
    speed = json.loads((RESULTS / "banking77_speed.json").read_text())
    rows = [
        ("LoRA", "PEFT", "peft-lora", None),
        ("LoRA", "PEFT, tuned by hand", "peft-lora-tuned", None),
        ("LoRA", "**twinlora**", "twinlora-lora", "peft-lora"),
        ("QLoRA", "PEFT + bitsandbytes", "peft-qlora", None),
        ("QLoRA", "PEFT + bitsandbytes, tuned by hand", "peft-qlora-tuned", None),
        ("QLoRA", "**twinlora**", "twinlora-qlora", "peft-qlora"),
    ]
    lines = [
        "| method | with | exact match (95 % interval) | difference to PEFT, paired | tokens/s | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for method, tool, way, against in rows:
        whole = quality["ways"].get(way)
        score = difference = "–"
        if whole:
            hits = whole["hits"]
            low, high = wilson_interval(sum(hits), len(hits))
            score = f"{100 * sum(hits) / len(hits):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        if whole and against:
            value, low, high = paired_interval(whole["hits"], quality["ways"][against]["hits"])
            difference = f"{100 * value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        fast = speed["ways"][way]
        ratio = f" ({rate(fast) / rate(speed['ways'][against]):.1f}×)" if against else ""
        memory = f"{fast['peak_rss_train_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {method} | {tool} | {score} | {difference} | {rate(fast):.0f}{ratio} | {memory} |")
    setting = (
        "SmolLM2-135M-Instruct on banking77 (77 intents, written out): 2,000 rows, one epoch, rank 16 on all linear "
        "layers, learning rate 1e-3, batch 16, identical initial adapters and order of rows, 1,500 test rows. "
        "Tokens are real ones, without padding. "
    )
    return setting + machine_line(speed) + "\n\n" + "\n".join(lines)


TABLES = {"banking77": banking77}


def render(page: str) -> str:
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"README.md has no place for table {name}: expected <!-- table: {name} --> … <!-- end -->")
        text = make()
        page = pattern.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page)
    return page


def main() -> None:
    path = ROOT / "README.md"
    page = path.read_text(encoding="utf-8")
    made = render(page)
    if "--check" in sys.argv[1:]:
        if made != page:
            raise SystemExit("README.md differs from benchmarks/results: run python benchmarks/tables.py")
        return
    path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()

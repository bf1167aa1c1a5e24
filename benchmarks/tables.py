"""Write the measured tables of README.md and README.zh-CN.md from benchmarks/results/*.json.

python benchmarks/tables.py            rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/tables.py --check    exits with 1 if a page is not what the results say

The tables are made in English; chinese.py translates their words.
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


WAYS = [
    ("LoRA", "PEFT", "peft-lora"),
    ("LoRA", "PEFT, tuned by hand", "peft-lora-tuned"),
    ("LoRA", "**twinlora**", "twinlora-lora"),
    ("QLoRA", "PEFT + bitsandbytes", "peft-qlora"),
    ("QLoRA", "PEFT + bitsandbytes, tuned by hand", "peft-qlora-tuned"),
    ("QLoRA", "**twinlora**", "twinlora-qlora"),
]


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def banking77() -> str:
    """Quality: per row the mean over the seeds, so that the interval is that of the rows."""
    from twinlora.evaluate.stats import paired_interval, wilson_interval

    result = load("banking77")
    lines = [
        "| method | with | exact match (95 % interval) | difference to PEFT, paired | by seed |",
        "|---|---|---|---|---|",
    ]
    for method, tool, way in WAYS:
        if way not in result["ways"]:
            continue
        runs = {seed: run["hits"] for seed, run in result["ways"][way].items()}
        rows = [statistics.mean(values) for values in zip(*runs.values(), strict=True)]
        low, high = wilson_interval(round(sum(rows)), len(rows))
        score = f"{100 * statistics.mean(rows):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        difference = seeds = "–"
        peer = "peft-" + way.partition("-")[2]
        if way != peer:
            theirs = {seed: run["hits"] for seed, run in result["ways"][peer].items()}
            value, low, high = paired_interval(rows, [statistics.mean(v) for v in zip(*theirs.values(), strict=True)])
            difference = f"{100 * value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
            each = (100 * (sum(runs[seed]) - sum(theirs[seed])) / len(rows) for seed in runs)
            seeds = ", ".join(f"{value:+.1f}" for value in each)
        lines.append(f"| {method} | {tool} | {score} | {difference} | {seeds} |")
    setting = (
        "SmolLM2-135M-Instruct on banking77 (77 intents, written out): 2,000 rows, one epoch, rank 16 on all linear "
        "layers, learning rate 1e-3, batch 16, identical initial adapters and order of rows, 1,500 test rows. The "
        "interval is that of the rows; runs that differ only in the initial adapter scatter as shown by seed. "
    )
    return setting + machine_line(result) + "\n\n" + "\n".join(lines)


def cpu_train() -> str:
    result = load("cpu_train")
    titles = {"2x512": "2 × 512 tokens", "banking77": "banking77, batches of 16"}
    workloads = result["workloads"]
    lines = [
        "| method | with | " + " | ".join(f"{titles[name]}: tokens/s | peak memory" for name in workloads) + " |",
        "|---|---|" + "---|---|" * len(workloads),
    ]
    for method, tool, way in WAYS:
        cells = []
        for ways in workloads.values():
            found, stock = ways[way], ways["peft-" + ("qlora" if "qlora" in way else "lora")]
            speed, memory = found["median_tokens_per_second"], found["peak_rss_bytes"]
            ratio = (
                f" ({speed / stock['median_tokens_per_second']:.1f}×)",
                f" ({memory / stock['peak_rss_bytes']:.2f}×)",
            )
            shown = ratio if found is not stock else ("", "")
            cells += [f"{speed:.0f}{shown[0]}", f"{memory / 1e9:.2f} GB{shown[1]}"]
        lines.append(f"| {method} | {tool} | " + " | ".join(cells) + " |")
    setting = (
        "A training step, SmolLM2-135M, rank 16 on all linear layers; medians of steps taken in turn. Tokens are real "
        "ones, without padding; all of the 2 × 512 carry loss, of banking77's the answers. "
    )
    return setting + machine_line(result) + "\n\n" + "\n".join(lines)


def cpu_decode() -> str:
    result = load("cpu_decode")
    batches = result["batches"]
    lines = ["| greedy decoding, tokens/s | one stream | batch of 8 |", "|---|---|---|"]
    for way in batches["1"]["tokens_per_second"]:
        rates = [batches[size]["tokens_per_second"][way] for size in ("1", "8")]
        lines.append(f"| {way.replace('twinlora', '**twinlora**')} | {rates[0]:.0f} | {rates[1]:.0f} |")
    return "\n".join(lines)


def cpu_kernels() -> str:
    result = load("cpu_kernels")
    lines = ["| one 4096 × 4096 weight | milliseconds |", "|---|---|"]
    for name, ways in result["seconds"].items():
        cells = ", ".join(f"{way} {1e3 * seconds:.2f}" for way, seconds in ways.items())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def cpu_7b() -> str:
    result = load("cpu_7b")
    peak, steps = result["result"]["peak_rss_bytes"] / 2**30, result["step_seconds"]
    return (
        f"A random 7B llama (32 layers of 4,096) in NF4, rank 16 on all linear layers, one row of 256 tokens a step: it "
        f"trains within {peak:.1f} GiB, {statistics.median(steps):.0f} s a step. " + machine_line(result)
    )


def plan_table() -> str:
    """What is chosen for each model and device, and the peak of a step."""
    result = load("plan_table")
    pairs = {(pair["model"], pair["device"]): pair for pair in result["pairs"]}
    models, devices = (list(dict.fromkeys(pair[key] for pair in result["pairs"])) for key in ("model", "device"))
    titles = {"lora": "LoRA", "qlora": "QLoRA", "int8": "LoRA over int8", "full": "full", "hybrid": "hybrid"}
    memory = {pair["device"]: pair["memory_bytes"] / 2**30 for pair in result["pairs"]}
    lines = [
        "| model | " + " | ".join(f"{device}, {memory[device]:.0f} GiB" for device in devices) + " |",
        "|---|" + "---|" * len(devices),
    ]
    for model in models:
        cells = []
        for device in devices:
            pair = pairs[model, device]
            row = next((row for row in pair["rows"] if row["method"] == pair["choice"]), None)
            cells.append(f"{titles[row['method']]}, {row['peak_bytes'] / 2**30:.1f} GiB" if row else "nothing fits")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    border = result["border_65b"]
    setting = (
        "What the planner chooses for rows of 512 tokens, 16 a step, rank 16, and the peak of a step. With one row a step "
        f"65B in QLoRA fits from {border['fits'] / 2**30:.1f} GiB on (peak {border['peak_bytes'] / 1e9:.1f} GB and the "
        "reserve)."
    )
    return setting + "\n\n" + "\n".join(lines)


TABLES = {
    "banking77": banking77, "cpu_train": cpu_train, "cpu_decode": cpu_decode, "cpu_7b": cpu_7b, "cpu_kernels": cpu_kernels,
    "plan_table": plan_table,
}  # fmt: skip


def render(page: str, name: str, tables: dict[str, str]) -> str:
    """`page`, the text of the file `name`, with every table in its place."""
    for table, text in tables.items():
        pattern = re.compile(rf"(<!-- table: {table} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{name} has no place for table {table}: expected <!-- table: {table} --> … <!-- end -->")
        page = pattern.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page)
    return page


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from chinese import translated

    english = {name: make() for name, make in TABLES.items()}
    for name, tables in (("README.md", english), ("README.zh-CN.md", translated(english))):
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        made = render(page, name, tables)
        if "--check" not in sys.argv[1:]:
            path.write_text(made, encoding="utf-8")
        elif made != page:
            raise SystemExit(f"{name} differs from benchmarks/results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()

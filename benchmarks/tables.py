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
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine_line(result: dict) -> str:
    m, v = result["machine"], result["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in v.items())
    return (
        f"{m['cpu']}, {m['threads']} thread{'s' * (m['threads'] > 1)}, {m['memory_bytes'] / 2**30:.0f} GiB; {versions}."
    )


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


VARIANTS = {
    "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "pissa": "PiSSA", "lora-plus": "LoRA+, ratio 4", "qlora": "QLoRA",
    "qlora-loftq": "QLoRA, LoftQ", "full": "all weights",
}  # fmt: skip


def variants() -> str:
    """Each way at its own best learning rate against LoRA at its own; per row the mean over the seeds."""
    from twinlora.evaluate.stats import paired_interval

    result = load("variants")
    hits = {
        way: [statistics.mean(row) for row in zip(*(run["hits"] for run in found["runs"].values()), strict=True)]
        for way, found in result["ways"].items()
    }
    lines = [
        "| way | trains | learning rate | held-out loss | exact match | difference to LoRA, paired (95 %) | by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, title in VARIANTS.items():
        runs = list(result["ways"][way]["runs"].values())
        loss = statistics.mean(run["eval_loss"] for run in runs)
        difference = "–"
        if way != "lora":
            value, low, high = paired_interval(hits[way], hits["lora"])
            difference = f"{100 * value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        seeds = ", ".join(f"{100 * statistics.mean(run['hits']):.1f}" for run in runs)
        lines.append(
            f"| {title} | {runs[0]['trainable_parameters'] / 1e6:.1f} M | {runs[0]['lr']:g} | {loss:.3f} | "
            f"{100 * statistics.mean(hits[way]):.1f} % | {difference} | {seeds} |"
        )
    setting = (
        "SmolLM2-135M-Instruct on banking77: 1,000 rows, one epoch, rank 16 on all linear layers, batch 16, 1,000 test rows, "
        "three seeds. Each way has its own learning rate, doubled or halved as long as the loss on 200 other rows fell. "
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


NOT_MEASURED = "**not measured**"


def gpu_results(section: str) -> dict[str, dict]:
    """What benchmarks/gpu.py has found on a device, by cell; empty where it has not run."""
    path = RESULTS / "gpu.json"
    found = json.loads(path.read_text())["sections"].get(section, {}) if path.exists() else {}
    return {} if found.get("dry_run", True) else found["results"]


def gpu_cell(result: dict | None, text: Callable[[dict], str]) -> str:
    """A figure; or why there is none."""
    if result is None:
        return NOT_MEASURED
    if result.get("out_of_memory"):
        return "out of memory"
    return text(result) if "error" not in result and "skipped" not in result else "did not run"


def gpu_steps() -> str:
    """A training step of the 8B shape: ours of both kinds, their ratio, the peers."""
    steps, rates = gpu_results("steps"), gpu_results("rates").get("rates")
    lines = [
        "| tokens a step | LoRA: tokens/s | share of the GEMM rate | QLoRA: tokens/s | QLoRA's step / LoRA's | PEFT LoRA | "
        "PEFT + bitsandbytes | Unsloth LoRA | Unsloth QLoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if not steps:
        lines.append("| 2,048, recomputed |" + f" {NOT_MEASURED} |" * 8)
    for tokens in (2048, 4096, 16384) if steps else ():
        for recomputed in ("", ", recomputed"):
            name = f"{tokens} tokens{recomputed}"
            pair = steps.get(name, {})
            lora, qlora, ratio = pair.get("lora"), pair.get("qlora"), pair.get("qlora_over_lora")
            cells = [
                gpu_cell(lora, lambda r: f"{r['tokens_per_second']:,.0f}"),
                gpu_cell(
                    lora and rates and {**lora, "limit": rates["gemm_flops"]},
                    lambda r: f"{100 * r['flops'] / r['seconds'] / r['limit']:.0f} %",
                ),
                gpu_cell(qlora, lambda r: f"{r['tokens_per_second']:,.0f}"),
                f"{ratio:.2f}" if ratio else "–" if pair else NOT_MEASURED,
            ]
            ways = ("peft-lora", "peft-qlora", "unsloth-lora", "unsloth-qlora")
            cells += [gpu_cell(steps.get(f"{way}, {name}"), lambda r: f"{r['tokens_per_second']:,.0f}") for way in ways]
            lines.append(f"| {tokens:,}{recomputed} | " + " | ".join(cells) + " |")
    setting = (
        "A training step of the llama-8B shape, random weights, rank 16 on all linear layers, rows of 2,048 tokens; "
        "tokens/s. recomputed: with `--gradient-checkpointing`. "
    )
    return setting + gpu_machine("steps") + "\n\n" + "\n".join(lines)


def gpu_machine(section: str) -> str:
    if not gpu_results(section):
        return "No device has been at hand yet: `python benchmarks/gpu.py` measures."
    found = json.loads((RESULTS / "gpu.json").read_text())["sections"][section]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['machine']['device']}; {versions}."


def gpu_fits() -> str:
    """Large models under a cap, and the kernels that carry them."""
    fits, kernels = gpu_results("fits"), gpu_results("kernels")
    lines = ["| QLoRA, one row of 512 tokens, recomputed | peak memory | tokens/s |", "|---|---|---|"]
    for name in ("7B within 8 GB", "33B within 24 GB", "65B within 48 GB"):
        peak = gpu_cell(fits.get(name), lambda r: f"{(r['reserved_bytes'] + r['context_bytes']) / 1e9:.1f} GB")
        speed = gpu_cell(fits.get(name), lambda r: f"{r['tokens_per_second']:.0f}")
        lines.append(f"| {name} | {peak} | {speed} |")
    lines += ["", "| NF4 → bfloat16 | share of the copy rate | speed over bitsandbytes |", "|---|---|---|"]
    for title, name in (("4096 × 4096", "dequantize 8B q"), ("28672 × 8192", "dequantize 70B gate")):
        result = kernels.get(name)
        share = gpu_cell(result, lambda r: f"{100 * r['share_of_copy']:.0f} %")
        both = result if result and "bitsandbytes" in result.get("seconds", {}) else None
        peer = gpu_cell(both, lambda r: f"{r['seconds']['bitsandbytes'] / r['seconds']['twinlora']:.1f}×")
        lines.append(f"| {title} | {share} | {peer} |")
    return "\n".join(lines)


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


def hybrid() -> str:
    """What each budget costs before training, and after it where runs are there."""
    result = load("hybrid")
    ways = sorted(result["ways"].items(), key=lambda item: item[1]["bits_per_linear_weight"])
    trained = [name for name, way in ways if "runs" in way]
    header = (
        "| base | bits per weight: linear layers | whole model | size | divergence before training (95 % interval) |"
    )
    lines = [header + (" loss after training, difference to 16 bit, paired |" if trained else "")]
    lines.append("|---|---|---|---|---|" + ("---|" if trained else ""))
    for name, way in ways:
        low, high = way["kl_interval"]
        cells = [f"all {name}" if len(way["layers"]) == 1 else "hybrid"]
        cells += [f"{way['bits_per_linear_weight']:.2f}", f"{way['bits_per_weight']:.2f}"]
        cells += [f"{way['weight_bytes'] / 1e6:.0f} MB", f"{way['kl']:.4f} ({low:.4f} to {high:.4f})"]
        if trained:
            compared = name in trained and name != "16bit"
            cells.append(_trained_difference(way, result["ways"]["16bit"]) if compared else "–")
        lines.append("| " + " | ".join(cells) + " |")
    rows = len(ways[0][1]["kl_rows"])
    four, dense = result["ways"]["4"], result["ways"]["16bit"]
    saved = [100 * (1 - four[key] / dense[key]) for key in ("bits_per_linear_weight", "weight_bytes")]
    setting = (
        "SmolLM2-135M-Instruct on banking77: Kullback-Leibler divergence of the next-token distributions from the 16-bit "
        f"base, nats a token, over all tokens of {rows} held-out rows. Embeddings, a fifth of this model, stay in 16 bit: at "
        f"4 bits the linear layers take {saved[0]:.0f} % less than in 16 bit, the whole model {saved[1]:.0f} % less. "
        "Its weights were rounded to 4 bits once before they were published here, so differences are understated. "
    )
    return setting + machine_line(result) + "\n\n" + "\n".join(lines)


def _trained_difference(way: dict, base: dict) -> str:
    """Mean over the seeds for each row, so that the interval is that of the rows."""
    from twinlora.evaluate.stats import paired_interval

    def rows(runs: dict) -> list[float]:
        each = [[a / b for a, b in zip(run["loss_rows"], run["loss_tokens"], strict=True)] for run in runs.values()]
        return [statistics.mean(values) for values in zip(*each, strict=True)]

    value, low, high = paired_interval(rows(way["runs"]), rows(base["runs"]))
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


TABLES = {
    "banking77": banking77, "variants": variants, "hybrid": hybrid, "cpu_train": cpu_train, "cpu_decode": cpu_decode,
    "cpu_7b": cpu_7b, "cpu_kernels": cpu_kernels, "gpu_steps": gpu_steps, "gpu_fits": gpu_fits, "plan_table": plan_table,
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

"""Training and decoding on a CPU: speed, memory, and what is learnt."""

from __future__ import annotations

import statistics

from readme.results import load, machine_line

WAYS = [
    ("LoRA", "PEFT", "peft-lora"),
    ("LoRA", "PEFT, tuned by hand", "peft-lora-tuned"),
    ("LoRA", "**twinlora**", "twinlora-lora"),
    ("QLoRA", "PEFT + bitsandbytes", "peft-qlora"),
    ("QLoRA", "PEFT + bitsandbytes, tuned by hand", "peft-qlora-tuned"),
    ("QLoRA", "**twinlora**", "twinlora-qlora"),
]


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

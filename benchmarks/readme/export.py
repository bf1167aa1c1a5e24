"""What an adapter is worth in every form in which it ships, and what that form costs in llama.cpp."""

from __future__ import annotations

import statistics

from readme.results import load, machine_line, markdown, measured, not_yet


def export() -> str:
    """Formats, training on deployed weights, costs: those of them that were measured."""
    setting = (
        "Adapters trained on banking77, exported, and asked in the program that each form is for. held-out loss: nats a token "
        "of the right answers; KL: from the trained model, nats. "
    )
    if not measured("export"):
        return setting + not_yet("export.py")
    result = load("export")
    setting += f"SmolLM2-135M-Instruct, {result['rows']:,} rows, rank 16 on all linear layers; {result['test_rows']} test rows. "
    parts = [setting + machine_line(result)]
    parts.append(_formats(result) if "lora" in result else not_yet("export.py --parts formats"))
    parts.append(_deploy(result["deploy"]) if "deploy" in result else not_yet("export.py --parts deploy"))
    parts.append(_edge(result["edge"]) if "edge" in result else not_yet("export.py --parts edge"))
    return "\n\n".join(parts)


def _scores(found: dict | None) -> list[str]:
    if found is None:
        return ["–"] * 3
    kl = found.get("kl_mean")
    compared = "refused by the gate" if "refused" in found else "–" if kl is None else f"{kl:.2g}"
    return [f"{100 * found['exact_match']:.1f} %", f"{found['loss']:.4f}", compared]


def _formats(result: dict) -> str:
    """LoRA beside QLoRA, which may be folded into either of two bases."""
    lora, qlora = result["lora"], result.get("qlora", {})
    found = {  # title: of LoRA, of QLoRA
        "adapter, in twinlora": (lora.get("adapter"), qlora.get("adapter")),
    }
    for name in dict.fromkeys([*lora, *qlora]):
        spec, _, base = name.partition(" on ")
        title = f"`{spec.replace(':', ' ')}`"
        if base == "dequantised":
            found[title] = (lora.get(f"{spec} on 16bit"), qlora[name])
        elif base and name in lora:
            found.setdefault(title, (lora[name], None))
    for name in qlora:
        if name.endswith(" on 16bit"):
            found[f"`{name.removesuffix(' on 16bit').replace(':', ' ')}`, QLoRA's into 16 bit"] = (None, qlora[name])
    rows = []
    for title, pair in found.items():
        size = next((each["bytes"] for each in pair if each and "bytes" in each), None)
        rows.append([title, f"{size / 1e6:.0f}" if size else "–", *_scores(pair[0]), *_scores(pair[1])])
    header = (
        "| shipped as | MB | LoRA: exact match | held-out loss | KL | QLoRA, into its dequantised base: exact match | "
        "held-out loss | KL |"
    )
    return markdown(header, rows)


def _deploy(found: dict) -> str:
    """Each way's mean over its seeds."""
    ways: dict[str, list[dict]] = {}
    for name, run in found.items():
        ways.setdefault(name.partition(", seed ")[0], []).append(run)
    rows = []
    for way, runs in ways.items():
        means = {key: statistics.mean(run[key] for run in runs) for key in ("exact_match", "loss")}
        refused = [run["refused"] for run in runs if "refused" in run]
        means |= {"refused": refused} if refused else {"kl_mean": statistics.mean(run["kl_mean"] for run in runs)}
        rows.append(
            [
                f"`{way}`" if way.startswith("-") else way,
                *_scores(means),
                ", ".join(f"{100 * run['exact_match']:.1f}" for run in runs),
            ]
        )
    return markdown("| LoRA in Q4_0 | exact match | held-out loss | KL | exact match by seed |", rows)


def _edge(found: dict) -> str:
    costs = {name: cost for each in found.values() for name, cost in each["measured"].items()}
    rows = []
    for name, cost in costs.items():
        sizes = [f"{cost[key] / 1e6:.0f}" for key in ("file_bytes", "peak_rss_bytes")]
        rates = [f"{cost[f'{kind}_tokens_per_second']:.0f}" for kind in ("prompt", "new")]
        rows.append([f"`gguf {name}`", *sizes, *rates])
    return markdown("| in llama.cpp | file, MB | peak memory, MB | tokens/s read | tokens/s written |", rows)

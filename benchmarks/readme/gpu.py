"""What benchmarks/gpu.py found on a device; or that there was none."""

from __future__ import annotations

from collections.abc import Callable

from readme.results import NOT_MEASURED, load, measured


def gpu_results(section: str) -> dict[str, dict]:
    """What benchmarks/gpu.py has found on a device, by cell; empty where it has not run."""
    found = load("gpu")["sections"].get(section, {}) if measured("gpu") else {}
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
    found = load("gpu")["sections"][section]
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

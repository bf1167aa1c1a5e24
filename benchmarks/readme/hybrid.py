"""Precision chosen layer by layer: what each budget costs before training, and after it."""

from __future__ import annotations

import statistics

from readme.results import load, machine_line, markdown


def hybrid() -> str:
    """What each budget costs before training, and after it where runs are there."""
    result = load("hybrid")
    ways = sorted(result["ways"].items(), key=lambda item: item[1]["bits_per_linear_weight"])
    trained = any("runs" in way for _, way in ways)
    header = (
        "| base | bits per weight: linear layers | whole model | size | divergence before training (95 % interval) |"
        + " held-out loss after training | difference to 16 bit, paired (95 %) |" * trained
    )
    rows = []
    for name, way in ways:
        low, high = way["kl_interval"]
        cells = [f"all {name}" if len(way["layers"]) == 1 else "hybrid"]
        cells += [f"{way['bits_per_linear_weight']:.2f}", f"{way['bits_per_weight']:.2f}"]
        cells += [f"{way['weight_bytes'] / 1e6:.0f} MB", f"{way['kl']:.4f} ({low:.4f} to {high:.4f})"]
        if trained:
            cells += _after_training(way.get("runs", {}), result["ways"]["16bit"].get("runs", {}))
        rows.append(cells)
    return _setting(result["ways"], trained) + machine_line(result) + "\n\n" + markdown(header, rows)


def _setting(ways: dict[str, dict], trained: bool) -> str:
    four, dense = ways["4"], ways["16bit"]
    saved = [100 * (1 - four[key] / dense[key]) for key in ("bits_per_linear_weight", "weight_bytes")]
    setting = (
        "SmolLM2-135M-Instruct on banking77: Kullback-Leibler divergence of the next-token distributions from the 16-bit "
        f"base, nats a token, over all tokens of {len(four['kl_rows'])} held-out rows. Embeddings, a fifth of this model, "
        f"stay in 16 bit: at 4 bits the linear layers take {saved[0]:.0f} % less than in 16 bit, the whole model "
        f"{saved[1]:.0f} % less. Its weights were rounded to 4 bits once before they were published here, so differences "
        "are understated. "
    )
    if trained:
        runs = next(way["runs"] for way in ways.values() if "runs" in way)
        rows = len(next(iter(runs.values()))["loss_rows"])
        setting += (
            f"After one epoch over 2,000 rows: nats a token of {rows:,} test rows, each row's loss the mean over the "
            f"seeds ({max(len(way.get('runs', {})) for way in ways.values())}). "
        )
    return setting


def _after_training(runs: dict[str, dict], base: dict[str, dict]) -> list[str]:
    """Loss a token, and its difference to the base's: rows are drawn together, each the mean over the same seeds."""
    from twinlora.evaluate.stats import ratio_interval

    if not runs:
        return ["–", "–"]
    tokens = next(iter(runs.values()))["loss_tokens"]

    def rows(of: dict[str, dict], seeds: set[str]) -> list[float]:
        return [statistics.mean(losses) for losses in zip(*(of[seed]["loss_rows"] for seed in seeds), strict=True)]

    loss = f"{sum(rows(runs, set(runs))) / sum(tokens):.4f}"
    shared = runs.keys() & base.keys()
    if not shared or runs is base:
        return [loss, "–"]
    pairs = zip(rows(runs, shared), rows(base, shared), strict=True)
    value, low, high = ratio_interval([ours - theirs for ours, theirs in pairs], tokens)
    return [loss, f"{value:+.4f} ({low:+.4f} to {high:+.4f})"]

"""What the planner says: for models and devices, beside two papers, and beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from readme.results import load, machine_line, markdown, measured, not_yet

METHODS = {"lora": "LoRA", "qlora": "QLoRA", "int8": "LoRA over int8", "full": "full", "hybrid": "hybrid"}


def plan_table() -> str:
    """What is chosen for each model and device, and the peak of a step."""
    result = load("plan_table")
    pairs = {(pair["model"], pair["device"]): pair for pair in result["pairs"]}
    models, devices = (list(dict.fromkeys(pair[key] for pair in result["pairs"])) for key in ("model", "device"))
    memory = {pair["device"]: pair["memory_bytes"] / 2**30 for pair in result["pairs"]}
    rows = []
    for model in models:
        cells = [model]
        for device in devices:
            pair = pairs[model, device]
            row = next((row for row in pair["rows"] if row["method"] == pair["choice"]), None)
            cells.append(f"{METHODS[row['method']]}, {row['peak_bytes'] / 2**30:.1f} GiB" if row else "nothing fits")
        rows.append(cells)
    setting = (
        "What the planner chooses for rows of 512 tokens, 16 a step, rank 16, and the peak of a step; the device holds "
        "that and a reserve."
    )
    titles = " | ".join(f"{device}, {memory[device]:.0f} GiB" for device in devices)
    return setting + "\n\n" + markdown(f"| model | {titles} |", rows)


def plan_paper() -> str:
    """The planner's memory beside the two papers' figures."""
    result = load("plan_paper")
    return _qlora_paper(result["qlora"]) + "\n\n" + _gpt3(result["gpt3"])


_CAUSES = {
    "base in 4 bits, its constants": ("weights", "quantisation constants"),
    "adapter, its gradients and optimiser state": ("adapter", "gradients", "optimiser"),
    "activations and buffers": ("activations", "loss head", "workspace"),
}


def _qlora_paper(rows: list[dict]) -> str:
    by = {(row["model"], row["rank"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))

    def cells(title: str, rank: int, causes: Iterable[str] = ()) -> list[str]:
        found = [by[model, rank] for model in models]
        sizes = [sum(row["by_cause"][c] for c in causes) if causes else row["peak_bytes"] for row in found]
        return [title, *(f"{size / 1e9:.1f}" for size in sizes)]

    table = [["QLoRA's paper, r=64", *(f"{by[model, 64]['paper_gb']:.1f}" for model in models)]]
    table += [cells("planned, r=64", 64)] + [cells(f"– {title}", 64, causes) for title, causes in _CAUSES.items()]
    table += [cells("planned, r=16", 16)]
    large, border = by["65B", 64], load("plan_table")["border_65b"]
    state = [large["by_cause"][cause] for cause in _CAUSES["adapter, its gradients and optimiser state"]]
    setting = (
        "LLaMA in QLoRA, one row of 512 tokens, recomputed; GB are 10⁹ bytes. The paper's figures "
        "([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)) are partly estimates. What is trained is float32 here, "
        f"{large['by_cause']['adapter'] / large['trainable_parameters']:.0f} bytes a weight of the adapter, as many of "
        f"its gradient and twice that of its optimiser state: the adapter and its gradient in 16 bit would save "
        f"{(state[0] + state[1]) / 2e9:.1f} GB at 65B. With the reserve, 65B at r=16 fits a device of "
        f"{border['fits'] / 2**30:.1f} GiB ({border['fits'] / 1e9:.1f} GB)."
    )
    return setting + "\n\n" + markdown(f"| GB | {' | '.join(models)} |", table)


def _gpt3(rows: list[dict]) -> str:
    table = []
    for row in rows:
        trained, share = row["trainable_parameters"], row["trainable_parameters"] / row["total_parameters"]
        full = row["method"] == "full"
        title = "all weights" if full else f"{METHODS[row['method']]}, r={row['rank']}"
        count = f"{trained / 1e9:.1f} B" if full else f"{trained / 1e6:.1f} M"
        cells = [f"planned: {title}", count, "100 %" if full else f"{100 * share:.4f} %"]
        table.append([*cells, f"{row['peak_bytes'] / 1e9:,.0f} GB"])
    table += [
        ["LoRA's paper, r=1 to 8", "4.7 M to 37.7 M", "–", "350 GB"],
        ["often said of LoRA", "–", "0.1 %", "24 GB"],
    ]
    stored = [_stored(next(row for row in rows if row["method"] == method)) / 1e9 for method in ("lora", "qlora")]
    setting = (
        "GPT-3 with adapters on queries, keys and values, one matrix here: as many weights as the paper's on queries and values "
        "([arXiv 2106.09685](https://arxiv.org/abs/2106.09685), section 4.2). One row of 2,048 tokens, recomputed. Its "
        f"weights alone take {stored[0]:.0f} GB in 16 bit and {stored[1]:.0f} GB in 4."
    )
    return setting + "\n\n" + markdown("| GPT-3, 175B | trains | share | memory of a step |", table)


def _stored(row: dict) -> int:
    size: int = row["by_cause"]["weights"] + row["by_cause"]["quantisation constants"]
    return size


def _groups(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Cells by method and model; methods in the order of METHODS."""
    found: dict[tuple[str, str], list[dict]] = {}
    for cell in sorted(cells, key=lambda cell: list(METHODS).index(cell["method"])):
        found.setdefault((cell["method"], cell["model"].removesuffix("-instruct")), []).append(cell)
    return found


def _median_and_largest(errors: list[float], digits: int) -> list[str]:
    """Of the errors' sizes; the largest with its sign."""
    return [
        f"{100 * statistics.median(map(abs, errors)):.{digits}f} %",
        f"{100 * max(errors, key=abs):+z.{digits}f} %",
    ]


def plan_memory() -> str:
    """Predicted against measured memory of a step."""
    setting = (
        "Memory of a training step on a CPU, predicted from the configuration alone, against what was measured: rows of 1 × "
        "512, 16 short and 2 × 1,024 tokens, with and without recomputing. step: the most that tensors and kernels hold at a "
        "time. process: what its resident set grows by, gaps between tensors included. "
    )
    if not measured("plan_memory"):
        return setting + not_yet("plan_memory.py")
    result, rows = load("plan_memory"), []
    for (method, model), cells in _groups(result["cells"]).items():
        errors = [[cell["error"][key] for cell in cells] for key in ("step", "rss")]
        step, process = _median_and_largest(errors[0], 2), _median_and_largest(errors[1], 0)
        rows.append([METHODS[method], model, str(len(cells)), *step, *process])
    header = "| method | model | cells | step: median error | largest | process: median error | largest |"
    return setting + machine_line(result) + "\n\n" + markdown(header, rows)


def _shapes(cells: list[dict]) -> str:
    """Those of the cells, as the pages write them."""
    return ", ".join(shape.replace("x", " × ") for shape in dict.fromkeys(cell["shape"] for cell in cells))


def plan_time() -> str:
    """Predicted against measured time of a step."""
    setting = "Time of the same steps, "
    if not measured("plan_time"):
        return setting + not_yet("plan_time.py")
    result = load("plan_time")
    took = statistics.median(cell["calibration_seconds"] for cell in result["cells"])
    setting += (
        f"predicted from rates that this machine took {took:.0f} s to measure, in turns with these steps and in none of "
        f"them. Cells: {_shapes(result['cells'])}. "
    )
    rows = []
    for (method, model), cells in _groups(result["cells"]).items():
        errors = _median_and_largest([cell["error"] for cell in cells], 0)
        seconds = [cell["measured"] for cell in cells]
        rows.append([METHODS[method], model, str(len(cells)), f"{min(seconds):.2f} to {max(seconds):.2f} s", *errors])
    header = "| method | model | cells | measured | median error | largest |"
    return setting + machine_line(result) + "\n\n" + markdown(header, rows)

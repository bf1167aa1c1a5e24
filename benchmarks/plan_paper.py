"""The planner's memory beside two papers' figures, from shapes alone.

    python benchmarks/plan_paper.py [--output benchmarks/results/plan_paper.json]

QLoRA (arXiv 2305.14314) needs 6.9, 11.3, 24.7 and 45.0 GB for 7B to 65B (r=64 on all linear layers, one row of 512 tokens,
gradient checkpointing); the figures are partly estimated there. LoRA (arXiv 2106.09685, section 4.2) trains 4.7 M of GPT-3's
175 B parameters at r=1 and 37.7 M at r=8 on queries and values, on GPUs that hold 350 GB. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import harness  # puts src on the path

# hidden, feed-forward, layers, heads (arXiv 2302.13971, table 2), and GB in the QLoRA paper
LLAMA = {
    "7B": (4096, 11008, 32, 32, 6.9), "13B": (5120, 13824, 40, 40, 11.3), "33B": (6656, 17920, 60, 52, 24.7),
    "65B": (8192, 22016, 80, 64, 45.0),
}  # fmt: skip


def qlora() -> list[dict[str, Any]]:
    from transformers import LlamaConfig

    from twinlora.plan.simulate import Cell, simulate

    rows = []
    for name, (hidden, forward, layers, heads, paper) in LLAMA.items():
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=32000,
        )
        for rank in (16, 64):
            cell = Cell(method="qlora", rank=rank, lengths=(512,), checkpointing=True, target="cuda")
            found = simulate(config, cell)
            row = {
                "model": name,
                "rank": rank,
                "paper_gb": paper,
                "peak_bytes": found.peak_bytes,
                "by_cause": found.by_cause,
            }
            rows.append(row | {"trainable_parameters": found.trainable_parameters})
            causes = ", ".join(f"{cause} {size / 1e9:.2f}" for cause, size in found.by_cause.items() if size > 5e6)
            print(f"{name:>4} r={rank:<3} paper {paper:5.1f} GB, ours {found.peak_bytes / 1e9:6.2f} GB "
                  f"({found.peak_bytes / 2**30:.2f} GiB): {causes}", flush=True)  # fmt: skip
    return rows


def gpt3() -> list[dict[str, Any]]:
    from transformers import GPT2Config

    from twinlora.plan.simulate import Cell, simulate

    config = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048, vocab_size=50257)
    rows = []
    for method, rank in (("lora", 1), ("lora", 8), ("qlora", 8), ("full", 8)):
        # queries, keys and values are one matrix of GPT-2's shape: r · (d + 3 d), as many as two square matrices have
        cell = Cell(method=method, rank=rank, targets=("c_attn",), lengths=(2048,), checkpointing=True, target="cuda")
        found = simulate(config, cell)
        share = found.trainable_parameters / found.total_parameters
        print(f"GPT-3 {method:<5} r={rank}: {found.trainable_parameters / 1e6:,.1f} M of {found.total_parameters / 1e9:.1f} B train "
              f"({share:.4%}), {found.peak_bytes / 1e9:,.0f} GB", flush=True)  # fmt: skip
        rows.append(
            {"method": method, "rank": rank, "trainable_parameters": found.trainable_parameters,
             "total_parameters": found.total_parameters, "peak_bytes": found.peak_bytes, "by_cause": found.by_cause}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    document = harness.facts() | {"qlora": qlora(), "gpt3": gpt3()}
    if args.output:
        args.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

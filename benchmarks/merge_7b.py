"""Folding a LoRA into a 7B llama, shard by shard: how much memory the process takes.

    python benchmarks/merge_7b.py --tokenizer DIR --scratch DIR [--output benchmarks/results/merge_7b.json]

Weights and adapter are random (14 GB read, 14 GB written in --scratch, removed at the end); memory does not depend on
their values. Two ways: into the 16-bit weights, and into the same weights quantised to NF4 and back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cpu_7b
import harness  # puts src on the path
import torch


def write_adapter(directory: Path, base: Path) -> None:
    """Rank 16 on all linear layers."""
    from twinlora.adapters.files import save_factors

    d, f = cpu_7b.SHAPE["hidden_size"], cpu_7b.SHAPE["intermediate_size"]
    shapes = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    factors = {
        f"model.layers.{i}.{name}": (torch.randn(16, columns) / 64, torch.randn(rows, 16) / 64)
        for i in range(cpu_7b.SHAPE["num_hidden_layers"])
        for name, (rows, columns) in shapes.items()
    }
    save_factors(directory, factors, sorted(name.rpartition(".")[2] for name in shapes), str(base), None)


def merge(adapter: Path, model: Path, output: Path, quantized: bool) -> dict:
    """In this process: its peak is what is measured."""
    from twinlora import machine
    from twinlora.adapters.merge import Merged
    from twinlora.adapters.read import read_adapter
    from twinlora.export.merged import save_16bit
    from twinlora.model.checkpoint import Checkpoint
    from twinlora.model.load import load_tokenizer, resolve
    from twinlora.numerics.formats import NF4Format

    before, start = machine.peak_rss_bytes(), time.perf_counter()
    source = resolve(str(model))
    output.mkdir()
    weights = Merged(Checkpoint(source), read_adapter(adapter), NF4Format() if quantized else None)
    save_16bit(weights, output, load_tokenizer(source), torch.bfloat16)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return {
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "imports_rss_bytes": before,
        "seconds": time.perf_counter() - start,
        "written_bytes": size,
        "shards": len(list(output.glob("*.safetensors"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=harness.ROOT / "benchmarks" / "results" / "merge_7b.json")
    parser.add_argument("--one", choices=["16bit", "dequantised"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, adapter, merged = (args.scratch / name for name in ("model", "adapter", "merged"))
    if args.one:
        print(json.dumps(merge(adapter, model, merged, args.one == "dequantised")))
        return
    try:
        model.mkdir(parents=True)
        cpu_7b.write_model(model, args.tokenizer)
        write_adapter(adapter, model)
        results = harness.facts() | {"ways": {}}
        for way in ("16bit", "dequantised"):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results["ways"][way] = json.loads(done.stdout)
            shutil.rmtree(merged)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()

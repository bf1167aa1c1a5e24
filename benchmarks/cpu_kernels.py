"""NF4 kernels on a CPU: ours, bitsandbytes' and torch's, interleaved, against the machine's copy and GEMM rates.

    python benchmarks/cpu_kernels.py [--output benchmarks/results/cpu_kernels.json]

Weights rotate among as many as do not fit a cache. Times are medians in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import harness  # puts src on the path
import torch

from twinlora.numerics import ops

N = K = 4096
WEIGHTS = 8


def interleaved(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; `way(i)` works on the i-th weight."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(number % WEIGHTS)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=24)
    args = parser.parse_args()
    import bitsandbytes as bnb
    from bitsandbytes import functional

    torch.manual_seed(0)
    dense = [torch.randn(N, K).bfloat16() for _ in range(WEIGHTS)]
    ours = [ops.quantize(w) for w in dense]
    theirs = [functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense]
    target = [torch.empty_like(w) for w in dense]
    results = {}

    results["copy"] = interleaved({"torch": lambda i: target[i].copy_(dense[(i + 1) % WEIGHTS])}, args.rounds)
    results["dequantize"] = interleaved(
        {
            "twinlora": lambda i: ours[i].dequantize(),
            "bitsandbytes": lambda i: functional.dequantize_4bit(*theirs[i]),
        },
        args.rounds,
    )
    results["dequantize"]["twinlora, into a buffer"] = into_buffer(ours, args.rounds)
    results["quantize"] = interleaved(
        {
            "twinlora": lambda i: ops.quantize(dense[i]),
            "bitsandbytes": lambda i: functional.quantize_4bit(dense[i], quant_type="nf4", compress_statistics=True),
        },
        args.rounds // 3,
    )
    for rows in (512, 2048):
        x, dy = torch.randn(rows, K).bfloat16(), torch.randn(rows, N).bfloat16()
        results[f"forward and input gradient, {rows} rows"] = interleaved(
            {
                "twinlora NF4": lambda i, x=x, dy=dy: (ops.linear(x, ours[i]), ops.linear_transposed(dy, ours[i])),
                "torch bfloat16": lambda i, x=x, dy=dy: (x @ dense[i].T, dy @ dense[i]),
            },
            args.rounds // 3,
        )
    layers = []
    for i in range(WEIGHTS):
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense[i], requires_grad=False, quant_type="nf4").to("cpu")
        layers.append(layer.eval())
    with torch.inference_mode():
        for rows in (1, 4, 16, 64):
            x = torch.randn(rows, K).bfloat16()
            results[f"decode, {rows} rows"] = interleaved(
                {
                    "twinlora NF4": lambda i, x=x: ops.linear(x, ours[i]),
                    "bitsandbytes": lambda i, x=x: layers[i](x),
                    "torch bfloat16": lambda i, x=x: x @ dense[i].T,
                },
                args.rounds,
            )
    copy = 2 * 2 * N * K / results["copy"]["torch"]
    best = results["forward and input gradient, 2048 rows"]["torch bfloat16"]
    limits = {"copy_bytes_per_second": copy, "gemm_flops": 2 * 2 * 2048 * N * K / best}
    # Reads half a byte and a scale for each weight, writes two bytes.
    moved = N * K * (2 + 4.127 / 8)
    limits["dequantize_share_of_copy"] = moved / results["dequantize"]["twinlora, into a buffer"] / copy
    document = harness.facts() | {"shape": [N, K], "limits": limits, "seconds": results}
    for name, ways in results.items():
        first = next(iter(ways.values()))
        print(f"{name:<40}", "   ".join(f"{way} {1e3 * t:.3f} ms ({t / first:.2f}×)" for way, t in ways.items()))
    print({name: f"{value:.4g}" for name, value in limits.items()})
    if args.output:
        args.output.write_text(json.dumps(document, indent=1))


def into_buffer(weights: list[ops.QuantTensor], rounds: int) -> float:
    """As the linear layers do it: no allocation, hence no page faults."""
    from twinlora.numerics import cpu

    if not cpu.paths():
        return interleaved({"": lambda i: weights[i].dequantize()}, rounds)[""]
    out = itertools.cycle([torch.empty(N, K, dtype=torch.bfloat16) for _ in range(WEIGHTS)])

    def way(i: int) -> None:
        packed, scales, ns, no, _, block, nested = weights[i].arguments
        cpu._decode(next(out), packed, scales, ns, no, block, nested)

    return interleaved({"": way}, rounds)[""]


if __name__ == "__main__":
    main()

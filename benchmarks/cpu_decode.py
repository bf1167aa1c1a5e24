"""Greedy decoding on a CPU: twinlora's `generate` beside transformers' and llama.cpp, bfloat16 and 4-bit.

    python benchmarks/cpu_decode.py --model DIR [--output benchmarks/results/cpu_decode.json]

One stream and a batch of 8, prompts of 32 tokens, 64 new tokens each, no token ends an answer. Ways take turns in one
process. Tokens per second count new tokens, the pass over the prompt included; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import llama_cpp
import peers
import torch

from twinlora import machine

PROMPT, NEW = 32, 64


def peer(model_dir: str, *, quantized: bool) -> Callable[[list[list[int]]], Any]:
    model = peers.load(model_dir, quantized=quantized).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]]) -> Any:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )

    return run


def ours(model_dir: str, *, quantized: bool) -> Callable[[list[list[int]]], Any]:
    from twinlora.model import swap
    from twinlora.model.generate import generate
    from twinlora.model.load import load_model, resolve
    from twinlora.numerics.formats import NF4Format

    model = load_model(resolve(model_dir), quantize=NF4Format() if quantized else None).eval()
    swap.replace_blocks(model)
    return lambda prompts: generate(model, prompts, max_new_tokens=NEW, stop=set())


def llama(model_dir: str) -> Callable[[list[list[int]]], Any]:
    """A server for one stream and one for eight: its batches are what it has slots for."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        llama_cpp.write_base(model_dir, path, quant="q4_0")
        options = {"threads": torch.get_num_threads(), "new": NEW}
        servers = {streams: llama_cpp.server(path, streams=streams, **options) for streams in (1, 8)}
    return lambda prompts: servers[len(prompts)](prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    document: dict[str, Any] = harness.facts() | {"limits": harness.limits(), "batches": {}}
    machine.keep_freed_memory()  # as `twinlora chat` does
    ways = {
        "transformers bfloat16": peer(args.model, quantized=False),
        "transformers + bitsandbytes NF4": peer(args.model, quantized=True),
        "twinlora bfloat16": ours(args.model, quantized=False),
        "twinlora NF4": ours(args.model, quantized=True),
        "llama.cpp Q4_0": llama(args.model),
    }
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1000, 40000, (batch, PROMPT), generator=generator).tolist()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(prompts)
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
        rates = {name: batch * NEW / statistics.median(values) for name, values in seconds.items()}
        document["batches"][str(batch)] = {"tokens_per_second": rates, "seconds": seconds}
        for name, rate in rates.items():
            print(f"batch {batch}  {name:<32} {rate:6.0f} tokens/s")
        if args.output:
            args.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

"""A training step on a CPU: twinlora beside stock and hand-tuned PEFT, with and without a 4-bit base.

    python benchmarks/cpu_train.py --model DIR [--data banking77/train.jsonl] [--output benchmarks/results/cpu_train.json]

Two workloads: `2x512`, two rows of 512 tokens that all carry loss, and `banking77` (with --data), real rows in batches of
16 with loss on the answers. Every way lives in a process of its own, which holds its model while the others work; the
processes take turns step by step, so that a slow minute of the machine hits all of them. Tokens are real ones, fill is
not counted. Peak memory is the process's (VmHWM), model included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import peers
import torch

ROWS = 400  # of banking77: 25 batches, taken in turn


def examples(
    args: argparse.Namespace, workload: str, vocabulary: int, tokenizer: Any
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids; the answer carries the loss."""
    if workload == "banking77":
        with args.data.open(encoding="utf-8") as file:
            return peers.tokenize(tokenizer, [json.loads(line) for line in itertools.islice(file, ROWS)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, vocabulary, (64, 512), generator=generator).tolist()
    return [(row[:1], row[1:]) for row in rows]


def peer_step(args: argparse.Namespace, workload: str, *, quantized: bool, tuned: bool) -> Callable[[], int]:
    """One step of `peers.py`'s loop; returns the real tokens it trained on."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    recipe, tokenizer = peers.Recipe(), AutoTokenizer.from_pretrained(args.model)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=peers.TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(peers.load(args.model, quantized=quantized), config, autocast_adapter_dtype=not tuned)
    rows = examples(args, workload, model.config.vocab_size, tokenizer)
    batches = itertools.cycle(peers.batches(rows, 2 if workload == "2x512" else recipe.batch_size, grouped=tuned))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    model.train()

    def step() -> int:
        inputs = peers.collate(next(batches), tokenizer.pad_token_id)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return int(inputs["attention_mask"].sum())

    return step


def our_step(args: argparse.Namespace, workload: str, method: str) -> Callable[[], int]:
    """One step as `train.loop` runs it, batch preparation included."""
    from twinlora import machine
    from twinlora.adapters.lora import attach, trainable_parameters
    from twinlora.adapters.targets import LoraConfig
    from twinlora.config import OptimizerOptions
    from twinlora.data.packing import make_batch
    from twinlora.data.template import Example
    from twinlora.model import forward, swap
    from twinlora.model.load import load_model, load_tokenizer, resolve
    from twinlora.numerics.formats import NF4Format
    from twinlora.train.optim import MasterAdamW
    from twinlora.train.step import train_step

    source, recipe = resolve(args.model), peers.Recipe()
    machine.keep_freed_memory()
    model = load_model(source, quantize=NF4Format() if method == "qlora" else None)
    attach(model, LoraConfig(recipe.rank, recipe.alpha))
    model.train()
    swap.replace_blocks(model)
    plain_head = forward.has_plain_head(model)
    rows = [
        Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), "")
        for prompt, answer in examples(args, workload, model.config.vocab_size, load_tokenizer(source))
    ]
    size = 2 if workload == "2x512" else recipe.batch_size
    batches = itertools.cycle([rows[i : i + size] for i in range(0, len(rows), size)])
    optimizer = MasterAdamW(trainable_parameters(model), OptimizerOptions(lr=1e-4))

    def step() -> int:
        batch = make_batch(next(batches), 4096, packed=True)
        result = train_step(model, batch, optimizer, lr=1e-4, max_grad_norm=recipe.clip, plain_head=plain_head)
        result.loss.item()
        return batch.tokens

    return step


def worker(connection: Any, args: argparse.Namespace, workload: str, way: str) -> None:
    """Steps on demand: sends (tokens, seconds) for each message, the peak for None."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = (
        our_step(args, workload, harness.OUR_WAYS[way])
        if way in harness.OUR_WAYS
        else peer_step(args, workload, **harness.PEER_WAYS[way])
    )
    connection.send(None)
    while connection.recv():
        start = time.perf_counter()
        tokens = step()
        connection.send((tokens, time.perf_counter() - start))
    connection.send(peers.peak_rss())


def measure(args: argparse.Namespace, workload: str, ways: list[str]) -> dict[str, dict]:
    """Steps of all ways in turn."""
    context = multiprocessing.get_context("spawn")
    results: dict[str, dict] = {}
    workers = {}
    for way in ways:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, args, workload, way), daemon=True)
        process.start()
        ours.recv()
        workers[way] = (process, ours)
        results[way] = {"tokens": [], "step_seconds": []}
    for number in range(args.steps + args.warmup):
        for way, (_, connection) in workers.items():
            connection.send(True)
            tokens, seconds = connection.recv()
            if number >= args.warmup:
                results[way]["tokens"].append(tokens)
                results[way]["step_seconds"].append(seconds)
    for way, (process, connection) in workers.items():
        connection.send(None)
        results[way]["peak_rss_bytes"] = connection.recv()
        process.join()
        results[way]["tokens_per_second"] = sum(results[way]["tokens"]) / sum(results[way]["step_seconds"])
        median = statistics.median(
            t / s for t, s in zip(results[way]["tokens"], results[way]["step_seconds"], strict=True)
        )
        results[way]["median_tokens_per_second"] = median
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workloads", default="2x512,banking77")
    parser.add_argument("--ways", default=",".join([*harness.PEER_WAYS, *harness.OUR_WAYS]))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    document: dict[str, Any] = harness.facts() | {"limits": harness.limits(), "workloads": {}}
    print({name: f"{value:.4g}" for name, value in document["limits"].items()})
    for workload in args.workloads.split(","):
        if workload == "banking77" and args.data is None:
            print("banking77: skipped, give --data")
            continue
        results = measure(args, workload, args.ways.split(","))
        document["workloads"][workload] = results
        base = next(iter(results.values()))["median_tokens_per_second"]
        for way, result in results.items():
            rate = result["median_tokens_per_second"]
            print(
                f"{workload:<10} {way:<18} {rate:7.0f} tokens/s {rate / base:5.2f}× {result['peak_rss_bytes'] / 1e9:.2f} GB"
            )
        if args.output:
            args.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

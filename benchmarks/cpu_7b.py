"""QLoRA of a 7B llama on a CPU: how much memory a process takes to load, quantise and train it on rows of 256 tokens.

    python benchmarks/cpu_7b.py --tokenizer DIR --scratch DIR [--output benchmarks/results/cpu_7b.json]

The weights are random, written shard by shard (14 GB in --scratch, removed at the end); memory and time do not depend
on their values. --tokenizer is a model directory whose tokenizer and chat template are used.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import harness  # puts src on the path
import torch

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def write_model(directory: Path, tokenizer: str) -> None:
    """One shard for each layer, one for the rest."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    theirs = AutoConfig.from_pretrained(tokenizer)
    tokens = {key: getattr(theirs, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**SHAPE, **tokens, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    noise = (torch.randn(1 << 22) * 0.02).bfloat16()

    def random(*shape: int) -> torch.Tensor:
        count = shape[0] * shape[1]
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    shards = [{"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}]
    for i in range(config.num_hidden_layers):
        layer = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        layer |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        shards.append({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    places = {}
    for number, shapes in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        tensors = {key: torch.ones(s).bfloat16() if len(s) == 1 else random(*s) for key, s in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, data = args.scratch / "llama-7b", args.scratch / "rows.jsonl"
    model.mkdir(parents=True)
    try:
        write_model(model, args.tokenizer)
        row = {"prompt": "Repeat.", "completion": "one two three four " * 63}
        data.write_text((json.dumps(row) + "\n") * 4)
        command = [sys.executable, "-m", "twinlora.cli.main", "train", "--model", str(model), "--data", str(data)]
        command += ["--method", "qlora", "--max-length", "320", "--batch-size", "1", "--max-steps", "3", "--json"]
        command += ["--output", str(args.scratch / "run")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout)
        del result["adapter"]  # a path
        steps = [json.loads(line) for line in (args.scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(model)
    found = {"result": result, "step_seconds": [step["seconds"] for step in steps if "seconds" in step]}
    print(f"peak {result['peak_rss_bytes'] / 2**30:.2f} GiB, steps {found['step_seconds']} s")
    if args.output:
        args.output.write_text(json.dumps(harness.facts() | found, indent=1))


if __name__ == "__main__":
    main()

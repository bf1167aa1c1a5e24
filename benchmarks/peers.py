"""The peers' way to fine-tune: transformers + PEFT, and bitsandbytes for the 4-bit base, in a plain loop.

Kept as close as possible to what their own documentation shows, so that a comparison with it is fair: a frozen
bfloat16 (or NF4 with double quantisation) base, float32 adapters cast by PEFT, right-padded batches, torch's AdamW.
`tuned=True` is what a careful user changes: bfloat16 adapters and batches of rows of similar length.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Recipe:
    """What every way of one comparison shares."""

    rank: int = 16
    alpha: int = 32
    lr: float = 1e-3
    warmup_steps: int = 10
    batch_size: int = 16
    clip: float = 1.0
    max_new_tokens: int = 24
    eval_batch: int = 64


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to 0; `step` counts from 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    return recipe.lr * (steps - step) / max(1, steps - recipe.warmup_steps)


def tokenize(tokenizer: Any, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of single-turn `messages` rows; the answer ends with the end-of-turn token."""
    out = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        answer = row["messages"][-1]["content"] + tokenizer.eos_token
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        out.append((encode(prompt), encode(answer)))
    return out


def load(model_dir: str, *, quantized: bool) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    kwargs = {"quantization_config": quantization, "device_map": "cpu"} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, **kwargs)


def write_initial_adapter(model_dir: str, directory: str, recipe: Recipe, seed: int = 0) -> None:
    """One PEFT-initialised adapter on disk, from which every way starts."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(load(model_dir, quantized=False), config).save_pretrained(directory)


def batches(rows: list, batch_size: int, *, grouped: bool) -> list[list]:
    out = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if grouped:
        by_length = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
        out = [by_length[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        order = torch.randperm(len(out), generator=torch.Generator().manual_seed(0))
        out = [out[i] for i in order.tolist()]
    return out


def collate(batch: list, pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(p) + len(a) for p, a in batch)
    ids, mask, labels = [], [], []
    for prompt, answer in batch:
        fill = longest - len(prompt) - len(answer)
        ids.append(prompt + answer + [pad] * fill)
        mask.append([1] * (len(prompt) + len(answer)) + [0] * fill)
        labels.append([-100] * len(prompt) + answer + [-100] * fill)
    return {k: torch.tensor(v) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def train_and_test(
    model_dir: str,
    initial: str,
    train_rows: list[dict],
    test_rows: list[dict],
    recipe: Recipe,
    *,
    quantized: bool,
    tuned: bool,
    progress: Any = print,
) -> dict[str, Any]:
    """Fine-tune from `initial` and test by greedy exact match. Returns losses, times, token counts and hits."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = load(model_dir, quantized=quantized)
    model = PeftModel.from_pretrained(model, initial, is_trainable=True, autocast_adapter_dtype=not tuned)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    steps = batches(tokenize(tokenizer, train_rows), recipe.batch_size, grouped=tuned)
    total = len(steps)
    model.train()
    losses, seconds, tokens, padded = [], [], [], []
    for step, batch in enumerate(steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, recipe)
        inputs = collate(batch, tokenizer.pad_token_id)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        tokens.append(int(inputs["attention_mask"].sum()))
        padded.append(inputs["input_ids"].numel())
        if step % 10 == 0:
            progress(f"step {step}/{total} loss {losses[-1]:.4f} {seconds[-1]:.2f} s")
    result: dict[str, Any] = {"losses": losses, "step_seconds": seconds, "tokens": tokens, "padded_tokens": padded}
    result["peak_rss_train_bytes"] = peak_rss()
    start = time.perf_counter()
    result["hits"] = exact_match(model, tokenizer, test_rows, recipe, progress)
    result["eval_seconds"] = time.perf_counter() - start
    return result


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, rows: list[dict], recipe: Recipe, progress: Any) -> list[bool]:
    model.eval()
    prompts = [prompt for prompt, _ in tokenize(tokenizer, rows)]
    hits = [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    for begin in range(0, len(order), recipe.eval_batch):
        chosen = order[begin : begin + recipe.eval_batch]
        longest = max(len(prompts[i]) for i in chosen)
        ids = [[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        out = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=recipe.max_new_tokens,
            do_sample=False,
        )
        for i, new in zip(chosen, out[:, longest:], strict=True):
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            hits[i] = text == rows[i]["messages"][-1]["content"].strip()
        progress(f"tested {begin + len(chosen)}/{len(rows)}")
    return hits


def peak_rss() -> int:
    """Peak resident set of this process in bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return math.nan  # type: ignore[return-value]

"""Whole training steps, decoding, and what fits into a given memory."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks import Cell
from gpu_measure import Setting, held, peak, reset_peak, seconds, synchronize
from gpu_models import base, batch, bitsandbytes_linear, build, ours, peers, peft_step, shape, step_flops, with_weight
from gpu_unsloth import unsloth_cell

from twinlora.model import swap
from twinlora.model.generate import generate

LENGTH = 2048
FITS = {"7B": 8, "33B": 24, "65B": 48}  # GB, of 10^9 bytes


def steps(setting: Setting) -> Iterator[Cell]:
    """LoRA and QLoRA side by side, one step each in turn; then the peers at the same tokens."""
    config, length = shape(setting.pick("8B", "tiny")), setting.pick(LENGTH, 32)
    models: dict[str, Any] = {}
    for rows in setting.pick((1, 2, 8), (1, 2)):
        for recompute in (False, True):
            name = f"{rows * length} tokens" + (", recomputed" if recompute else "")
            yield name, lambda rows=rows, recompute=recompute: pair(setting, config, models, rows, length, recompute)
    models.clear()
    for way in peers():
        for rows in setting.pick((1, 2, 8), (1,)):
            for recompute in (False, True):
                name = f"{way}, {rows * length} tokens" + (", recomputed" if recompute else "")
                yield name, lambda w=way, r=rows, c=recompute: peer(setting, config, w, r, length, c)


def pair(
    setting: Setting, config: Any, models: dict[str, Any], rows: int, length: int, recompute: bool
) -> dict[str, Any]:
    """Both models are resident; of each one's peak the other's weights are taken off."""
    tokens, result = rows * length, {}
    for method in ("lora", "qlora"):
        if method not in models:
            before = held(setting.device)
            made = ours(config, method, setting.device)
            made.optimizer.reserve()
            models[method] = (made, held(setting.device) - before)
        models[method][0].recompute(recompute)
    given = batch(config, rows, length, setting.device)
    for method, (made, own) in models.items():
        others = sum(size for name, (_, size) in models.items() if name != method)
        reset_peak(setting.device)
        try:
            loss = float(made.step(given))
            result[method] = {"loss": loss, "peak_bytes": peak(setting.device) - others, "resident_bytes": own}
        except torch.OutOfMemoryError:
            result[method] = {"out_of_memory": True}
        made.optimizer.discard_gradients()
    able = [method for method in models if "loss" in result[method]]
    took = seconds({m: lambda _, m=m: models[m][0].step(given) for m in able}, setting, cold=False)
    flops = step_flops(config, tokens, length, recompute=recompute)
    for method in able:
        rate = {"seconds": took[method], "tokens_per_second": tokens / took[method], "flops": flops}
        result[method] |= rate
    return result | ({"qlora_over_lora": took["qlora"] / took["lora"]} if len(able) == 2 else {})


def peer(setting: Setting, config: Any, way: str, rows: int, length: int, recompute: bool) -> dict[str, Any]:
    if way.startswith("unsloth"):
        return unsloth_cell(config, way, rows, length, setting, recompute=recompute)
    reset_peak(setting.device)
    step = peft_step(config, way, rows, length, setting, recompute=recompute)
    took = seconds({way: lambda _: step()}, setting, cold=False)[way]
    tokens = rows * length
    return {"seconds": took, "tokens_per_second": tokens / took, "peak_bytes": peak(setting.device)}


def decode(setting: Setting) -> Iterator[Cell]:
    """Greedy decoding, new tokens a second over all streams; the first pass over the prompts is taken off."""
    config = shape(setting.pick("8B", "tiny"))
    ways = ["bfloat16", "nf4", "transformers bfloat16"]
    ways += ["transformers + bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else []
    for way in ways:
        for streams in setting.pick((1, 8, 64), (2,)):
            yield f"{way}, {streams} streams", lambda w=way, s=streams: decoding(setting, config, w, s)


def decoding(setting: Setting, config: Any, way: str, streams: int) -> dict[str, Any]:
    prompt, new = setting.pick((512, 128), (8, 6))
    ids = torch.randint(0, config.vocab_size, (streams, prompt), generator=torch.Generator().manual_seed(0))
    if way.startswith("transformers"):
        linear = bitsandbytes_linear if "bitsandbytes" in way else with_weight
        model = build(config, setting.device, linear).eval()
        model.set_attn_implementation("sdpa")
        there = ids.to(setting.device)

        def run(count: int) -> None:
            with torch.inference_mode():
                model.generate(
                    there, attention_mask=torch.ones_like(there), min_new_tokens=count, max_new_tokens=count,
                    do_sample=False, use_cache=True, pad_token_id=0,
                )  # fmt: skip
    else:
        model = base(config, "qlora" if way == "nf4" else "lora", setting.device).eval()
        swap.replace_blocks(model)

        def run(count: int) -> None:
            generate(model, ids.tolist(), max_new_tokens=count, stop=set())

    whole, first = (_wall(lambda n=n: run(n), setting) for n in (new, 1))
    return {"tokens_per_second": streams * (new - 1) / (whole - first), "first_token_seconds": first}


def _wall(work: Callable[[], None], setting: Setting) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        synchronize(setting.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def fits(setting: Setting) -> Iterator[Cell]:
    """Rank 16 on all linear layers, one row of 512 tokens, recomputed, under a cap of the memory: three steps."""
    for name, gigabytes in FITS.items():
        yield f"{name} within {gigabytes} GB", lambda n=name, g=gigabytes: within(setting, n, g)


def within(setting: Setting, name: str, gigabytes: int) -> dict[str, Any]:
    if setting.dry:
        return fake_step(name)
    free, total = torch.cuda.mem_get_info(setting.device)
    reserved = torch.cuda.memory_reserved(setting.device)
    others = total - free - reserved  # the driver's and the libraries' own share counts, too
    if total < gigabytes * 10**9:
        return {"skipped": f"this device has {total / 1e9:.0f} GB"}
    reset_peak(setting.device)
    torch.cuda.set_per_process_memory_fraction((gigabytes * 10**9 - others) / total, setting.device)
    try:
        made = ours(shape(name), "qlora", setting.device)
        made.recompute(True)
        given, losses, times = batch(shape(name), 1, 512, setting.device), [], []
        for _ in range(3):
            start = time.perf_counter()
            losses.append(float(made.step(given)))
            times.append(time.perf_counter() - start)
        held_most = torch.cuda.max_memory_reserved(setting.device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    return {
        "peak_bytes": peak(setting.device), "reserved_bytes": held_most, "context_bytes": others,
        "cap_bytes": gigabytes * 10**9, "losses": losses, "tokens_per_second": 512 / times[-1],
    }  # fmt: skip


def fake_step(name: str) -> dict[str, Any]:
    """The same step on tensors without contents: every op of the path accepts these shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    start, cpu, mode = time.perf_counter(), torch.device("cpu"), FakeTensorMode()
    made = ours(shape(name), "qlora", cpu, mode)
    made.recompute(True)
    with mode:
        made.step(batch(shape(name), 1, 512, cpu))
    stored = sum(p.nbytes for p in made.model.parameters())
    return {"fake": True, "weight_bytes": stored, "seconds_to_simulate": time.perf_counter() - start}

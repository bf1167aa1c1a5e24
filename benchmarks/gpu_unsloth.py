"""Unsloth's step, in a process of its own: it patches transformers when it is imported.

It loads from disk, so that the random model is written there first. Needs the package and a GPU.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from gpu_measure import Setting


def unsloth_cell(config: Any, way: str, rows: int, length: int, setting: Setting, *, recompute: bool) -> dict[str, Any]:
    if setting.device.type != "cuda":
        return {"skipped": "Unsloth runs on GPUs only"}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, config, way, rows, length, setting, recompute)
    process = context.Process(target=_work, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        found = {"error": "its process died"}
    process.join()
    return found


def _work(connection: Any, config: Any, way: str, rows: int, length: int, setting: Setting, recompute: bool) -> None:
    try:
        connection.send(_measure(config, way, rows, length, setting, recompute))
    except Exception as error:  # whatever it is belongs to the result: the peer did not run
        connection.send({"error": f"{type(error).__name__}: {error}"})


def _measure(config: Any, way: str, rows: int, length: int, setting: Setting, recompute: bool) -> dict[str, Any]:
    import harness  # noqa: F401  (puts src on the path)
    import torch
    from gpu_measure import peak, reset_peak, seconds
    from gpu_models import ALPHA, RANK, plain_step
    from unsloth import FastLanguageModel  # before transformers

    with tempfile.TemporaryDirectory() as directory:
        _write(config, Path(directory), setting)
        reset_peak(setting.device)
        model, _ = FastLanguageModel.from_pretrained(
            directory, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=way == "unsloth-qlora"
        )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=targets,
        use_gradient_checkpointing="unsloth" if recompute else False,
    )  # fmt: skip
    step = plain_step(model, torch.randint(0, config.vocab_size, (rows, length), device=setting.device))
    took = seconds({way: lambda _: step()}, setting, cold=False)[way]
    return {"seconds": took, "tokens_per_second": rows * length / took, "peak_bytes": peak(setting.device)}


def _write(config: Any, directory: Path, setting: Setting) -> None:
    """The random model in bfloat16, with a tokenizer of bytes, since loading asks for one."""
    from gpu_models import build, with_weight
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0], pad_token=alphabet[1]).save_pretrained(
        directory
    )
    build(config, setting.device, with_weight).save_pretrained(directory)

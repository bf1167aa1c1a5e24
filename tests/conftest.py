"""Fixtures: a tiny random llama with its tokenizer, small data files, and the embedded real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU
# A prediction beside every run of the tests would double their time, and their runs are no history of the user's.
os.environ["TWINLORA_HISTORY"] = "off"

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twinlora.reporter import Reporter

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and tests send it

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML."""
    return tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


def tiny_config(**changes: object) -> LlamaConfig:
    values = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 258, "initializer_range": 0.1,
    }  # fmt: skip
    return LlamaConfig(**(values | changes))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random llama of two layers, saved in bfloat16."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer)


def write_tiny(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Notes(Reporter):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def printed(code: str) -> str:
    """What a Python process of its own prints when it runs this."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def chat(user: str, answer: str, system: str = "Be brief.") -> dict:
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, (system, user, answer), strict=True)]}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """24 short chats of different lengths."""
    return write_jsonl(tmp_path / "train.jsonl", [chat("say " + "ab" * (i % 7), f"word {i}") for i in range(24)])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model, fetched on first use."""
    from twinlora.demo.model import fetch

    return fetch()

"""A server of the tiny model in this process, and adapters whose answers tell them apart."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from tests.conftest import Notes
from twinlora.adapters import files, passport
from twinlora.adapters.bank import AdapterBank
from twinlora.adapters.lora import attach, lora_layers
from twinlora.adapters.targets import LoraConfig
from twinlora.config import ServeOptions
from twinlora.data.template import encode_chat
from twinlora.model import swap
from twinlora.model.fingerprint import fingerprint
from twinlora.model.generate import generate
from twinlora.model.load import load_model, load_tokenizer, precision_by_layer, resolve

TOKEN, ADMIN = "t" * 20, "a" * 20
CONFIGS = [
    LoraConfig(rank=4),
    LoraConfig(rank=2, alpha=9, target=("q_proj", "v_proj")),
    LoraConfig(rank=8, target=("down_proj",)),
    LoraConfig(rank=3, dora=True),
]


# A base whose layers differ: every format in q, k and v, and in layers with adapters and without.
MIX = {
    f"model.layers.{block}.{layer}": ("nf3-64-dq256", "int8-64", "nf4-64-dq256", "16bit")[(block + number) % 4]
    for block in range(2)
    for number, layer in enumerate(
        [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    )
}


def write_adapter(
    base: Path, directory: Path, seed: int, *, std: float = 0.5, layers: dict[str, str] | None = None, **changes: Any
) -> Path:
    """A random adapter strong enough to change every answer, with a passport; `layers` is its base's precision."""
    source = resolve(str(base))
    model = load_model(source, quantize=layers, dtype=torch.float32)
    attach(model, CONFIGS[seed % len(CONFIGS)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=std, generator=generator)
    facts = {
        "base_model": str(base), "base_fingerprint": fingerprint(source), "base_precision": precision_by_layer(model),
        "layer_precision": layers, "method": "hybrid" if layers else "lora", "versions": {}, "system": "Be brief.",
        **passport.tokenizer_digests(load_tokenizer(source)),
    }  # fmt: skip
    files.save_adapter(model, directory, str(base), passport.Passport(**(facts | changes)))
    return directory


class Oracle:
    """What each adapter answers alone, by the bank's simple path."""

    def __init__(self, base: Path, directories: dict[str, Path]) -> None:
        self.model = load_model(resolve(str(base)), dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(resolve(str(base)))
        self.bank = AdapterBank(self.model)
        swap.replace_blocks(self.model)
        for name, directory in directories.items():
            self.bank.add(name, files.read_adapter(directory))

    def tokens(self, name: str | None, prompt: list[int], new: int) -> list[int]:
        self.bank.use(name)
        (answer,) = generate(self.model, [prompt], max_new_tokens=new, stop={257})
        self.bank.use(None)
        return answer

    def chat(self, name: str | None, text: str, new: int) -> str:
        return self.messages(name, [{"role": "user", "content": text}], new)

    def messages(self, name: str | None, messages: list[dict[str, str]], new: int) -> str:
        answer = self.tokens(name, encode_chat(self.tokenizer, messages), new)
        return self.tokenizer.decode(answer, skip_special_tokens=True)


@pytest.fixture(scope="session")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {f"a{i}": write_adapter(tiny, root / f"a{i}", i) for i in range(8)}


@pytest.fixture(scope="session")
def oracle(tiny: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(tiny, adapters)


@dataclass
class Running:
    url: str
    service: Any
    notes: list[str]
    server: Any

    @property
    def openai(self) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60)

    def settled(self) -> None:
        """Wait until no request is in work, then check the books."""
        deadline = time.monotonic() + 10
        while (self.service._active or self.service.engine.scheduler.busy) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.service._active == 0
        self.service.engine.call(self.service.engine.scheduler.check).result()
        assert all(c.leases == 0 for c in self.service.registry._contents.values())


def start(tmp_path: Path, model: Path, adapters: dict[str, Path], **options: Any) -> Iterator[Running]:
    from twinlora.serve.server import HTTP, open_service

    for name, text in (("token", TOKEN), ("admin", ADMIN)):
        (tmp_path / name).write_text(text)
    values = {
        "model": str(model), "dtype": "float32", "device": "cpu", "slots": 4, "context": 256, "batch_tokens": 24,
        "name": "base", "token_file": tmp_path / "token", "admin_token_file": tmp_path / "admin",
    }  # fmt: skip
    notes = Notes()
    served = open_service(ServeOptions(**(values | options)), adapters, notes)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(served.app, log_level="warning", timeout_graceful_shutdown=5, **HTTP))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", served.service, notes.lines, server)
    finally:
        server.should_exit = True
        thread.join()
        served.service.close()


@pytest.fixture(scope="module")
def running(tiny: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the first four adapters; the others lie in its directory under other names."""
    yield from start(
        tmp_path_factory.mktemp("server"),
        tiny,
        {name: adapters[name] for name in ("a0", "a1", "a2", "a3")},
        adapters_dir=adapters["a0"].parent,
        blends=True,
    )

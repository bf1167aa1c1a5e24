"""What benchmarks/serve.py runs: a server of its own, adapters that say who they are, and clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import httpx

# A connection for each request: llama.cpp's server closes those that wait, now and then in the face of the next request.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
ADMIN = "benchmark-admin-token"
QUESTION = "What is your code word?"


@dataclass
class Server:
    """`twinlora serve` in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    def rss_bytes(self) -> int:
        """Its memory that is not files."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))

    def admin(self, method: str, path: str, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return httpx.request(method, f"{self.url}/admin{path}", json=body or None, headers=headers, timeout=60)


@contextlib.contextmanager
def serving(model: str, directory: Path, *options: str) -> Iterator[Server]:
    token = directory / "admin-token"
    directory.mkdir(parents=True, exist_ok=True)
    token.write_text(ADMIN)
    command = [sys.executable, "-m", "twinlora.cli.main", "serve", "--model", model, "--name", "base", "--port", "0",
               "--admin-token-file", str(token), "--json", *options]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(harness.ROOT / "src")}
    with (directory / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        text = ""
        while "}" not in text:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start:\n{(directory / 'server.log').read_text()}")
            text += line
        try:
            yield Server(json.loads(text)["url"], process)
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(120) != 143:
                print(f"the server ended with status {process.returncode}")


@contextlib.contextmanager
def vllm_serving(python: str, model: str, directory: Path, adapters: dict[str, Path]) -> Iterator[str]:
    """vLLM's server in another environment, its interpreter `python`; the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base",
               "--dtype", "bfloat16", "--max-model-len", "2048", "--enable-lora", "--max-lora-rank", "16",
               "--max-loras", str(len(adapters)), "--lora-modules", *(f"{name}={path}" for name, path in adapters.items()),
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    url, log = f"http://127.0.0.1:{port}", directory / "vllm.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"vLLM did not start:\n{log.read_text()[-3000:]}")
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def llama_serving(model: str, directory: Path, adapters: list[Path]) -> Iterator[str]:
    """llama.cpp's server with the model in float16 and these adapters, numbered in their order; the address."""
    import llama_cpp

    base = directory / "base-f16.gguf"
    if not base.exists():
        llama_cpp.write_base(model, base, quant="f16")
    files = []
    for adapter in adapters:
        files.append(str(directory / f"{adapter.name}.gguf"))
        llama_cpp.write_adapter(model, adapter, Path(files[-1]))
    command = [sys.executable, llama_cpp.__file__, str(base), str(len(adapters)), *files]
    with (directory / "llama.log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"llama.cpp did not start:\n{(directory / 'llama.log').read_text()[-3000:]}")
        try:
            yield url
        finally:
            process.kill()
            process.wait()


def canaries(model: str, directory: Path, count: int) -> dict[str, str]:
    """Adapters trained to say a code word of their own, by name; those already there are kept."""
    import twinlora

    source = random.Random(0)
    letters = "bcdfghjklmnprstvz"
    words = {
        f"canary-{i}": "".join(source.choice(letters) + source.choice("aeiou") for _ in range(4)) for i in range(count)
    }
    for number, (name, word) in enumerate(words.items()):
        if (directory / name / "adapter").is_dir():
            continue
        rows = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": word}]}]
        data = directory / f"{name}.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
        targets = [["all-linear"], ["q_proj", "v_proj"], ["gate_proj", "down_proj"]][number % 3]
        twinlora.finetune(
            model=model, method="lora", data=str(data), output=str(directory / name), rank=4 + 4 * (number % 4), target=targets,
            lr=5e-3, warmup_steps=2, batch_size=4, epochs=24, seed=number, overwrite=True,
        )  # fmt: skip
    return words


def write_random(model: str, directory: Path, count: int, rank: int, targets: tuple[str, ...]) -> None:
    """`count` small random adapters, made without training."""
    import torch

    from twinlora.adapters import files
    from twinlora.adapters.lora import attach, lora_layers
    from twinlora.adapters.targets import LoraConfig
    from twinlora.model.load import load_model, resolve

    base = load_model(resolve(model))
    attach(base, LoraConfig(rank=rank, target=targets))
    for number in range(count):
        if (directory / f"r{number}").is_dir():
            continue
        with torch.no_grad():
            for layer in lora_layers(base).values():
                layer.lora_A.uniform_(-0.01, 0.01)
                layer.lora_B.normal_(std=1e-3)
        files.save_adapter(base, directory / f"r{number}", model)


@dataclass
class Outcome:
    """What clients saw."""

    answered: int = 0
    tokens: int = 0
    wrong: list[Any] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def add_status(self, status: int) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": values[0]} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}


def body(model: str, text: str, new: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": new, "temperature": 0} | changes


async def streamed(client: httpx.AsyncClient, url: str, request: dict[str, Any], outcome: Outcome) -> str:
    """One streamed answer; its text."""
    begun, text = time.perf_counter(), ""
    request = request | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=request) as response:
        outcome.add_status(response.status_code)
        if response.status_code != 200:
            return ""
        async for event in _events(response):
            if event.get("usage"):
                outcome.tokens += event["usage"]["completion_tokens"]
            elif "error" in event:
                raise SystemExit(f"{request['model']}: {event['error']['message']}")
            elif event["choices"]:
                if not text:
                    outcome.first.append(time.perf_counter() - begun)
                text += event["choices"][0]["delta"].get("content") or ""
    outcome.answered += 1
    outcome.seconds.append(time.perf_counter() - begun)
    return text


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


async def counted(url: str, request: dict[str, Any], outcome: Outcome) -> None:
    """One streamed answer on a connection of its own, counted alone.

    It shares the processors with the server and does next to nothing for each piece: httpx takes more time than the server.
    """
    request = request | {"stream": True, "stream_options": {"include_usage": True}}
    content, address = json.dumps(request).encode(), url.removeprefix("http://")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    begun, first, received = time.perf_counter(), None, b""
    async with asyncio.timeout(600):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        with contextlib.closing(writer):
            writer.write(head.encode() + content)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            status, chunked = int(answer.split()[1]), b"transfer-encoding: chunked" in answer
            outcome.add_status(status)
            if status != 200:
                return
            while piece := await reader.read(1 << 16):
                received += piece
                if first is None and any(_has_text(json.loads(event)) for event in _payloads(received, chunked)):
                    first = time.perf_counter()
    *_, last = ({}, *map(json.loads, _payloads(received, chunked)[-1:]))
    if "error" in last:
        raise SystemExit(f"{request['model']}: {last['error']['message']}")
    if b"data: [DONE]" not in received:
        raise SystemExit(f"{request['model']}: the answer broke off")
    outcome.tokens += last["usage"]["completion_tokens"]
    outcome.first += [first - begun] if first else []
    outcome.answered += 1
    outcome.seconds.append(time.perf_counter() - begun)


def _has_text(event: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


def _payloads(received: bytes, chunked: bool) -> list[bytes]:
    """The JSON of the server-sent events that have come as a whole."""
    text, at = b"" if chunked else received, 0
    while chunked and (end := received.find(b"\r\n", at) + 2) > 1:
        size = int(received[at:end].partition(b";")[0], 16)
        if not size or end + size > len(received):
            break
        text, at = text + received[end : end + size], end + size + 2
    return [line[6:] for line in text.split(b"\n")[:-1] if line.startswith(b"data: {")]


def clients(work: Any, count: int) -> None:
    """Run the coroutine `work(client, number)` for `count` clients at once."""

    async def everyone() -> None:
        async with httpx.AsyncClient(timeout=120, limits=_LIMITS) as client:
            await asyncio.gather(*(work(client, number) for number in range(count)))

    asyncio.run(everyone())

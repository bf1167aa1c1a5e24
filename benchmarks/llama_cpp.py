"""llama.cpp as a peer: a bare base and adapters as GGUF, and its server, through xllamacpp.

    python benchmarks/llama_cpp.py BASE.gguf STREAMS [ADAPTER.gguf …]

serves over HTTP, and prints the address.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def write_base(model: str, path: Path, *, quant: str, dequantised: bool = False) -> None:
    """A model without an adapter, as `twinlora export` writes it; `dequantised`: through NF4 first."""
    from twinlora.adapters.merge import Merged
    from twinlora.export.gguf import write_gguf
    from twinlora.model.checkpoint import Checkpoint
    from twinlora.model.load import load_tokenizer, resolve
    from twinlora.numerics.formats import NF4Format

    source = resolve(model)
    bare = Merged(Checkpoint(source), None, NF4Format() if dequantised else None)
    tokenizer = load_tokenizer(source)
    write_gguf(bare, path, tokenizer, quant=quant, name="base", stop={tokenizer.eos_token_id})


def write_adapter(model: str, directory: Path, path: Path) -> None:
    """A PEFT directory of `model`, as `twinlora export --to gguf-lora` writes it."""
    from transformers import AutoConfig

    from twinlora.adapters.read import read_adapter
    from twinlora.export.gguf_lora import write_gguf_lora

    write_gguf_lora(read_adapter(directory), AutoConfig.from_pretrained(model), path, directory.name)


def _start(path: Path, streams: int, threads: int, adapters: list[str]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port = 512 * streams, streams, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib, params.verbosity, params.n_gpu_layers = 0, 0, 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 0.0) for adapter in adapters]
    return xllamacpp.Server(params)


def _serve(connection: Connection, path: Path, streams: int, threads: int, new: int) -> None:
    running = _start(path, streams, threads, [])
    pool = ThreadPoolExecutor(streams)

    def answer(prompt: list[int]) -> str:
        request = {"prompt": prompt, "n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        text: str = running.handle_completions(request)["choices"][0]["text"]
        return text

    connection.send(None)
    while True:
        connection.send(list(pool.map(answer, connection.recv())))


def server(path: Path, *, streams: int, threads: int, new: int) -> Callable[[list[list[int]]], list[str]]:
    """Greedy answers of `new` tokens to prompts of token ids, `streams` of them at a time.

    In a process of its own, stopped between calls: its threads would take time from the other ways.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, path, streams, threads, new), daemon=True)
    process.start()
    here.recv()
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    atexit.register(os.kill, pid, signal.SIGKILL)

    def run(prompts: list[list[int]]) -> list[str]:
        os.kill(pid, signal.SIGCONT)
        here.send(prompts)
        answers: list[str] = here.recv()
        os.kill(pid, signal.SIGSTOP)
        return answers

    return run


def main() -> None:
    path, streams, *adapters = sys.argv[1:]
    running = _start(Path(path), int(streams), os.cpu_count() or 1, adapters)
    print(running.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads need not be waited for


if __name__ == "__main__":
    main()

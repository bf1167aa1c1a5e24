"""llama.cpp as a peer: a bare base as GGUF, and its server, through xllamacpp."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path


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


def _serve(connection: Connection, path: Path, streams: int, threads: int, new: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 512 * streams, streams
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib, params.verbosity = 0, 0
    running = xllamacpp.Server(params)
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

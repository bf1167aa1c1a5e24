"""llama.cpp as a peer: a llama checkpoint as GGUF in Q4_0, and its server, through xllamacpp."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_q4_0(model_dir: str, path: Path) -> None:
    """A llama with tied embeddings: matrices in Q4_0, the embedding in Q8_0, norms in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(model_dir), model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_token_list(tokens)
    control = {token.content for token in tokenizer.added_tokens_decoder.values()}
    writer.add_token_types([TokenType.CONTROL if t in control else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.named_parameters():
        key = name.removeprefix("model.").removesuffix(".weight")
        if key == "embed_tokens":
            target, kind = "token_embd", GGMLQuantizationType.Q8_0
        elif key == "norm":
            target, kind = "output_norm", GGMLQuantizationType.F32
        else:
            layer, _, part = key.removeprefix("layers.").partition(".")
            target, kind = f"blk.{layer}.{NAMES[part]}", GGMLQuantizationType.Q4_0
        weight = tensor.detach()
        if (count := heads.get(key.rpartition(".")[2])) is not None:  # rotated in pairs, not in halves
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if weight.ndim == 1:
            kind = GGMLQuantizationType.F32
        writer.add_tensor(f"{target}.weight", quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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

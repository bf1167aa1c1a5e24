"""Starting and stopping, as a user does it."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve.conftest import ADMIN, MIX, TOKEN, Notes, start, write_adapter
from twinlora.config import ServeOptions
from twinlora.errors import AdapterError, ConfigError
from twinlora.model.linear import QuantLinear
from twinlora.model.load import precision_by_layer
from twinlora.serve.server import serve


def opened(tmp_path, tiny, adapters=None, **options):
    from twinlora.serve.server import open_service

    values = {"model": str(tiny), "dtype": "float32", "device": "cpu", "slots": 2, "context": 128}
    return open_service(ServeOptions(**(values | options)), adapters or {}, Notes())


def test_other_addresses_need_a_token(tmp_path, tiny):
    for host in ("0.0.0.0", "::", "192.168.1.2"):
        with pytest.raises(ConfigError, match="give --token-file, or listen on"):
            opened(tmp_path, tiny, host=host)
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ConfigError, match="at least 16"):
        opened(tmp_path, tiny, host="0.0.0.0", token_file=tmp_path / "short")
    with pytest.raises(ConfigError, match="cannot be read"):
        opened(tmp_path, tiny, token_file=tmp_path / "missing")
    with pytest.raises(ConfigError, match="no such directory"):
        opened(tmp_path, tiny, adapters_dir=tmp_path / "missing")
    with pytest.raises(ConfigError, match="positions up to 512"):
        opened(tmp_path, tiny, context=1000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_fingerprint": "f" * 64}, r"trained on: .*f{16}\)\n *loading on: "),
        ({"tokenizer_sha256": "e" * 64}, r"trained with: e{16}\n *running with: [0-9a-f]{16}"),
    ],
)
def test_adapters_of_another_base_or_tokenizer_are_refused(tmp_path, tiny, change, message):
    write_adapter(tiny, tmp_path / "adapter", 0, **change)
    with pytest.raises(AdapterError, match=message):
        opened(tmp_path, tiny, {"x": tmp_path / "adapter"})


def test_what_is_wrong_is_found_before_the_base_is_loaded(tmp_path, tiny, adapters, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("twinlora.evaluate.opening.load_model", refuse)
    write_adapter(tiny, tmp_path / "foreign", 0, base_fingerprint="f" * 64)
    config, weights = (adapters["a0"] / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / config.name).write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["model.norm"]}))
    save_file(load_file(weights) | {"base_model.model.model.norm.weight": torch.ones(64)}, whole / weights.name)
    for given, message in (
        ({"x": whole}, r"trained whole modules \(model.norm\).*`twinlora merge"),
        ({"x": tmp_path / "foreign"}, "trained on another base"),
        ({"x": tmp_path / "missing"}, "no such directory"),
        ({"Support": adapters["a0"]}, "'Support': expected lower-case"),
        ({"tiny": adapters["a0"]}, "not the base's name 'tiny'"),
    ):
        with pytest.raises(AdapterError, match=message):
            opened(tmp_path, tiny, given, name="tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ServeOptions(model=str(tiny), port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cannot listen there: Address already in use; .*--port 0"):
            serve(options, {}, Notes(), print)
    with pytest.raises(ConfigError, match=r"--host nowhere\.invalid --port 8000: cannot listen there"):
        serve(ServeOptions(model=str(tiny), host="nowhere.invalid", token_file=tmp_path / "t"), {}, Notes(), print)


def test_hybrid_serves_each_layer_as_the_adapters_were_trained_on_it(tmp_path, tiny):
    root = tmp_path / "adapters"
    other = {name: MIX[name] for name in MIX} | {"model.layers.0.self_attn.q_proj": "int8-64"}
    for number, (name, layers) in enumerate((("one", MIX), ("two", MIX), ("other", other))):
        write_adapter(tiny, root / name, number, layers=layers)
    with pytest.raises(AdapterError, match="one and other were trained on"):
        opened(tmp_path, tiny, {"one": root / "one", "other": root / "other"}, precision="hybrid")
    with pytest.raises(AdapterError, match="none trained with --method hybrid"):
        opened(tmp_path, tiny, precision="hybrid")
    given = {name: root / name for name in ("one", "two")}
    for server in start(tmp_path, tiny, given, precision="hybrid", adapters_dir=root):
        model = server.service.engine.model
        found = {n: m.precision for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert {n.removesuffix(".base"): p for n, p in found.items()} == {n: p for n, p in MIX.items() if p != "16bit"}
        said, count = "\n".join(server.notes), len(server.notes)
        assert "base: 3 layers nf3-64-dq256" in said
        assert f"adapter {root / 'other'}: trained on" in said
        assert said.count("trained on") == 1, "those that the base was made for have nothing to say"
        url, headers = f"{server.url}/admin/adapters", {"Authorization": f"Bearer {ADMIN}"}
        assert httpx.delete(f"{url}/two", headers=headers).status_code == 200
        assert httpx.post(url, json={"name": "again", "path": "two"}, headers=headers).status_code == 201
        assert len(server.notes) == count, "nor when it comes again"
        answer = server.openai.chat.completions.create(
            model="again", messages=[{"role": "user", "content": "hi"}], max_tokens=4
        )
        assert answer.choices[0].finish_reason in ("length", "stop")


def test_the_directory_says_the_precision_where_no_adapter_is_named(tmp_path, tiny):
    write_adapter(tiny, tmp_path / "adapters" / "one", 0, layers=MIX)
    served = opened(tmp_path, tiny, precision="hybrid", adapters_dir=tmp_path / "adapters")
    try:
        assert {"nf3-64-dq256", "int8-64", "nf4-64-dq256"} <= set(precision_by_layer(served.service.engine.model))
    finally:
        served.service.close()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"precision": "bf16", "dtype": "auto"}, {"bfloat16": 15}),
        ({"precision": "int8"}, {"int8-64": 14, "float32": 1}),
        ({"precision": "nf3", "block_size": 32, "double_quant": False}, {"nf3-32": 14, "float32": 1}),
    ],
)
def test_other_precisions(tmp_path, tiny, options, expected):
    served = opened(tmp_path, tiny, **options)
    try:
        assert precision_by_layer(served.service.engine.model) == expected
    finally:
        served.service.close()


def test_options_that_contradict_each_other(tmp_path, tiny):
    for options, message in (
        ({"precision": "bf16"}, "precision bf16 and dtype float32 exclude each other"),
        ({"precision": "nf4", "layer_precision": tmp_path}, "leave out precision nf4"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path, tiny, **options)


@contextlib.contextmanager
def command(tmp_path, tiny, *options):
    """The process, and what it said once it took requests."""
    write_adapter(tiny, tmp_path / "adapter", 1)
    (tmp_path / "token").write_text(TOKEN)
    words = [
        sys.executable, "-m", "twinlora.cli.main", "serve", "--model", str(tiny), "--adapter", f"x={tmp_path / 'adapter'}",
        "--port", "0", "--json", "--context", "500", "--token-file", str(tmp_path / "token"), "--device", "cpu", *options,
    ]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        text = ""
        while "}" not in text:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            text += line
        yield process, json.loads(text)
    finally:
        process.kill()
        process.wait()


BODY = {
    "model": "x", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "stream": True, "temperature": 1.0,
    "seed": 0,
}  # fmt: skip
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def test_sigterm_finishes_what_runs(tmp_path, tiny):
    with command(tmp_path, tiny) as (process, facts):
        assert facts["adapters"][0].startswith("x@")
        with httpx.stream(
            "POST", f"{facts['url']}/v1/chat/completions", json=BODY, headers=HEADERS, timeout=120
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(60) == 143
        said = process.stderr.read()
        assert "1 request(s) still run; another Ctrl-C cuts them off" in said
        assert "every request that ran was finished" in said


def test_what_runs_for_too_long_is_cut_off(tmp_path, tiny):
    with command(tmp_path, tiny, "--drain", "0") as (process, facts):
        url = f"{facts['url']}/v1/chat/completions"
        with httpx.stream("POST", url, json=BODY | {"max_tokens": 490}, headers=HEADERS, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "shutting_down" in rest[-1]
        assert process.wait(60) == 143
        assert "requests that ran were cut off" in process.stderr.read()


def test_a_second_ctrl_c_cuts_off_what_runs(tmp_path, tiny):
    with command(tmp_path, tiny, "--slots", "1") as (process, facts):
        begun, ends = threading.Barrier(9), []

        def ask():
            url = f"{facts['url']}/v1/chat/completions"
            with httpx.stream("POST", url, json=BODY | {"max_tokens": 490}, headers=HEADERS, timeout=120) as response:
                begun.wait(60)
                with contextlib.suppress(httpx.HTTPError):
                    ends.append([line for line in response.iter_lines() if line][-1])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        for thread in threads:
            thread.join()
        said = process.stderr.read()
        assert "requests that ran were cut off" in said
        assert "Traceback" not in said
        assert len(ends) == 8, "every stream has an end"
        assert any("the server was stopped" in end for end in ends)

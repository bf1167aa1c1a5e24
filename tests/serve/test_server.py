"""Starting and stopping, as a user does it."""

import json
import signal
import subprocess
import sys

import httpx
import pytest

from tests.serve.conftest import TOKEN, Notes, write_adapter
from twinlora.config import ServeOptions
from twinlora.errors import AdapterError, ConfigError


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


def test_sigterm_finishes_what_runs(tmp_path, tiny):
    write_adapter(tiny, tmp_path / "adapter", 1)
    (tmp_path / "token").write_text(TOKEN)
    command = [
        sys.executable, "-m", "twinlora.cli.main", "serve", "--model", str(tiny), "--adapter", f"x={tmp_path / 'adapter'}",
        "--port", "0", "--json", "--context", "500", "--token-file", str(tmp_path / "token"), "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        text = ""
        while "}" not in text:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            text += line
        facts = json.loads(text)
        assert facts["adapters"][0].startswith("x@")
        body = {
            "model": "x", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "stream": True,
            "temperature": 1.0, "seed": 0,
        }  # fmt: skip
        url, headers = f"{facts['url']}/v1/chat/completions", {"Authorization": f"Bearer {TOKEN}"}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(60) == 143
        assert "every request that ran was finished" in process.stderr.read()
    finally:
        process.kill()
        process.wait()

"""The hub path against a server on the loopback interface, in processes of their own (the endpoint is read once)."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest
from pyarrow import parquet

from twinlora.data.hub import choose, is_hub_name
from twinlora.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import json, sys
from twinlora.data.sources import read
from twinlora.errors import DataError
try:
    data = read(sys.argv[1:], note=lambda text: print(text, file=sys.stderr))
    print(json.dumps([[row.where, row.text] for row in data.rows]))
except DataError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub(tmp_path):
    """A data set with two training shards and a test file; the requests it got are in `asked`."""
    files = {"README.md": b"# x", "test.jsonl": b'{"text": "held out"}\n'}
    for number, texts in enumerate((["a", "b"], ["c"]), 0):
        path = tmp_path / "shard"
        parquet.write_table(pa.table({"text": texts}), path)
        files[f"data/train-0000{number}-of-00002.parquet"] = path.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        asked: ClassVar = []

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            self.asked.append((self.path, self.headers.get("Authorization")))
            name = self.path.partition(f"/resolve/{COMMIT}/")[2]
            if self.path.startswith(f"/api/datasets/me/mine/tree/{COMMIT}"):
                entries = [{"type": "file", "path": f, "size": len(files[f]), "oid": "0" * 40} for f in files]
                body = json.dumps(entries).encode()
            elif self.path.split("?")[0] in ("/api/datasets/me/mine", "/api/datasets/me/mine/revision/main"):
                body = json.dumps(
                    {"id": "me/mine", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                ).encode()
            elif name in files:
                body = files[name]
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, tmp_path, *sources, **environment):
    source = Path(__file__).parents[2] / "src"
    values = {"PATH": os.environ["PATH"], "PYTHONPATH": str(source), "HF_HOME": str(tmp_path / "home")}
    values |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", CODE, *sources]
    return subprocess.run(command, env=values | environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)


def test_splits_files_the_token_and_the_cache(hub, tmp_path):
    done = run(hub, tmp_path, "me/mine", "me/mine:test.jsonl@2", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    shard = "me/mine:data/train-0000{}-of-00002.parquet row {}"
    expected = [[shard.format(0, 1), "a"], [shard.format(0, 2), "b"], [shard.format(1, 1), "c"]]
    assert json.loads(done.stdout) == [*expected, ["me/mine:test.jsonl:1", "held out"]]
    assert "data me/mine: 3 texts, 2 files of Parquet" in done.stderr
    asked = hub.RequestHandlerClass.asked
    assert ("/api/datasets/me/mine", "Bearer hf_secret") in asked, asked
    assert not any("README" in path for path, _ in asked), "only the files that are read are fetched"
    asked.clear()
    offline = run(hub, tmp_path, "me/mine", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout) == expected
    assert not asked


def test_what_the_hub_does_not_have(hub, tmp_path):
    done = run(hub, tmp_path, "me/other")
    assert done.returncode == 1
    assert "data me/other: no such file here, and the hub did not give it (" in done.stderr
    assert "HF_TOKEN" in done.stderr
    done = run(hub, tmp_path, "me/mine:dev")
    assert "no file in this data set has 'dev' in its path; it has data/train-00000-of-00002.parquet" in done.stderr


def test_names():
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name.v2:main/train")
    assert not is_hub_name("data/train.jsonl")
    assert not is_hub_name("./train")
    assert not is_hub_name("a/b/c")
    assert not is_hub_name("name")


def test_which_files_are_meant():
    names = ["README.md", "main/train-0.parquet", "main/test-0.parquet", "extra/train-0.parquet", "strain.json"]
    assert choose(names, "main/train") == ["main/train-0.parquet"]
    assert choose(names, "strain.json") == ["strain.json"]
    assert choose(["a.jsonl", "dataset_infos.json"], None) == ["a.jsonl"]
    with pytest.raises(DataError, match=r"several sets of files: extra/\*.parquet, main/\*.parquet"):
        choose(names, None)
    with pytest.raises(DataError, match=r"this data set has no file of \.jsonl"):
        choose(["README.md"], None)
    with pytest.raises(DataError, match="1 of 3 shards"):
        choose(["train-00000-of-00003.parquet"], None)
    shards = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    assert choose(shards, shards[1]) == shards[1:]

"""The server, as the official client and plain HTTP see it."""

from __future__ import annotations

import threading

import httpx
import pytest

from tests.serve.conftest import ADMIN, TOKEN, start

openai = pytest.importorskip("openai")
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
ADMIN_HEADERS = {"Authorization": f"Bearer {ADMIN}"}


def ask(client, model, text, **options):
    values = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **values)


def test_adapters_answer_together_as_each_does_alone(running, oracle):
    found, client = {}, running.openai

    def work(name):
        found[name] = ask(client, name or "base", f"question {name}")

    names = ["a0", "a1", "a2", "a3", None]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert found[name].choices[0].message.content == oracle.chat(name, f"question {name}", 12), name
        assert (found[name].system_fingerprint or "base").startswith(name or "base")
    assert len({answer.choices[0].message.content for answer in found.values()}) == 5
    running.settled()

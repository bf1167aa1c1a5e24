"""Who is let through, without a server."""

import asyncio
import json

import pytest

from twinlora.serve.guard import Guard, RateLimit, is_local
from twinlora.serve.metrics import Metrics


def test_local_addresses():
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "localhost:8000", "127.0.0.1:80", "[::1]:8000")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "evil.example:8000", "localhost.evil.example", "")))


def test_rates_are_counted_for_each_client():
    limit = RateLimit(2.0)
    assert [limit.wait("a", 0.0) == 0 for _ in range(5)] == [True] * 4 + [False]
    assert limit.wait("b", 0.0) == 0
    assert 0 < limit.wait("a", 0.1) <= 0.5
    assert limit.wait("a", 0.6) == 0
    assert RateLimit(0).wait("a", 0.0) == 0


async def reached(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(path="/v1/models", *, host="localhost:8000", bearer=None, method="GET", parts=(b"",), **options):
    settings = {"token": None, "admin_token": None, "max_body": 10, "rate": 0.0}
    guard = Guard(reached, metrics=Metrics(), **(settings | options))
    headers = [(b"host", host.encode())] + ([(b"authorization", f"Bearer {bearer}".encode())] if bearer else [])
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "client": ("10.0.0.1", 1)}
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]]
    messages.append({"type": "http.request", "body": parts[-1]})
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    "options, status",
    [
        ({}, 200),
        ({"host": "evil.example"}, 403),  # a name of elsewhere that was pointed here
        ({"host": "evil.example", "token": "t", "bearer": "t"}, 200),
        ({"token": "t"}, 401),
        ({"token": "t", "bearer": "u"}, 401),
        ({"token": "t", "path": "/health"}, 200),
        ({"token": "t", "path": "/metrics"}, 401),
        ({"path": "/admin/adapters"}, 403),
        ({"path": "/admin/adapters", "token": "t", "admin_token": "a", "bearer": "t"}, 401),
        ({"path": "/admin/adapters", "token": "t", "admin_token": "a", "bearer": "a"}, 200),
        ({"token": "t", "admin_token": "a", "bearer": "a"}, 401),
        ({"parts": (b"12345", b"67890")}, 200),
        ({"parts": (b"12345", b"67890", b"1")}, 413),
    ],
)
def test_who_is_let_through(options, status):
    found, body = ask(**options)
    assert found == status
    if status == 200:
        assert body == b"".join(options.get("parts", ()))
    else:
        assert json.loads(body)["error"]["message"]

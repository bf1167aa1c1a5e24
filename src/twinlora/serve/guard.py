"""Before a request is read: who asks, how often, and how much. Plain ASGI, so that streams and disconnects pass."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from twinlora.serve.metrics import Metrics
from twinlora.serve.service import ApiError

__all__ = ["Guard", "RateLimit", "is_local"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN = {"/", "/health", "/ready"}
_BODY_SECONDS = 30.0  # to send a request's body
_MOST_CLIENTS = 10_000  # remembered


def is_local(host: str) -> bool:
    """Whether an address or a Host header means this machine alone."""
    name = host.rpartition(":")[0] if host.count(":") == 1 or (host.startswith("[") and "]:" in host) else host
    return name.strip("[]") in ("127.0.0.1", "localhost", "::1")


class RateLimit:
    """Token buckets of `rate` requests per second, by client; a burst of two seconds' worth is let through."""

    def __init__(self, rate: float) -> None:
        self.rate, self.burst = rate, max(1.0, 2 * rate)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, now: float) -> float:
        """Seconds until `client` may ask again; 0: now, and it is counted."""
        if not self.rate:
            return 0.0
        level, since = self._buckets.pop(client, (self.burst, now))
        level = min(self.burst, level + (now - since) * self.rate)
        allowed = level >= 1
        self._buckets[client] = (level - 1 if allowed else level, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self.rate


class Guard:
    """ASGI middleware: tokens, the Host header, rates and sizes."""

    def __init__(self, app: Any, *, token: str | None, admin_token: str | None, max_body: int, rate: float,
                 metrics: Metrics) -> None:  # fmt: skip
        self.app, self.token, self.admin_token, self.max_body = app, token, admin_token, max_body
        self.rate, self.metrics = RateLimit(rate), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's life."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await _refuse(error, self._counted(send))
            return
        await self.app(scope, _replay(body, receive), self._counted(send))

    def _counted(self, send: Send) -> Send:
        """A `send` that counts answers that are errors."""

        async def count(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        return count

    def _admit(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        if self.token is None and not is_local(headers.get(b"host", b"localhost").decode("latin-1")):
            # A page of elsewhere whose name was pointed at this machine must not reach it through a browser.
            raise ApiError(403, "this server answers requests to this machine's own address only")
        scheme, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if path == "/admin" or path.startswith("/admin/"):
            if self.admin_token is None:
                raise ApiError(403, "the admin API is off: start the server with --admin-token-file")
            if not _same(given, self.admin_token):
                raise ApiError(
                    401, "the admin API needs its own token: Authorization: Bearer …", code="invalid_api_key"
                )
        elif path not in _OPEN and self.token is not None and not _same(given, self.token):
            raise ApiError(401, "this server needs a token: Authorization: Bearer …", code="invalid_api_key")
        client = (scope.get("client") or ("", 0))[0]
        seconds = self.rate.wait(client, time.monotonic()) if scope["method"] == "POST" else 0.0
        if seconds:
            raise ApiError(429, f"more than {self.rate.rate:g} requests per second", code="rate_limit_exceeded",
                           retry_after=math.ceil(seconds))  # fmt: skip

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, so that a slow or endless one never reaches the application."""
        too_large = ApiError(413, f"the request is larger than {self.max_body:,} bytes", code="request_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client has gone")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_body:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the request's body did not come within {_BODY_SECONDS:.0f} s") from None


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once, then what comes later: a disconnect."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(error: ApiError, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})

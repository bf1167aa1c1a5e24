"""The routes: OpenAI's API, the admin API, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine
from importlib import resources
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import twinlora
from twinlora.serve.admin import admin_routes
from twinlora.serve.answers import ChatForm, CompletionForm, Form, stream, whole
from twinlora.serve.guard import Guard
from twinlora.serve.schema import ChatRequest, CompletionRequest
from twinlora.serve.service import Answer, ApiError, Service
from twinlora.serve.state import Sampling

__all__ = ["application"]

T = TypeVar("T")
_SHOWN = 20  # problems of a request
_READ_SECONDS = 60.0  # for a client to take a piece of its answer
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in {
        400: "The request is wrong", 401: "A token is missing", 403: "Not allowed", 404: "Not found",
        408: "Too slow", 409: "In conflict", 413: "Too large", 429: "Overloaded", 500: "The model failed",
        503: "Shutting down, or the adapter cannot be read",
    }.items()
}  # fmt: skip


def application(service: Service, *, token: str | None, admin_token: str | None, max_body: int) -> Any:
    """The ASGI application."""
    app = FastAPI(title="twinlora", version=twinlora.__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    app.include_router(_open_routes(service))
    app.include_router(_openai_routes(service), prefix="/v1", responses=_ERRORS)
    app.include_router(admin_routes(service), prefix="/admin", responses=_ERRORS)
    app.openapi = lambda: _documented(app)  # type: ignore[method-assign]
    return Guard(
        app,
        token=token,
        admin_token=admin_token,
        max_body=max_body,
        rate=service.options.rate,
        metrics=service.metrics,
    )


def _documented(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without the 422 it promises: ours is 400, in OpenAI's form."""
    if not app.openapi_schema:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema or {}


async def _told(request: Request, error: Any) -> Response:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else None
    return JSONResponse(error.body(), error.status, headers)


async def _failed(request: Request, error: Any) -> Response:
    """A defect of ours: told in the form that clients read; the server's log has the traceback."""
    told = ApiError(500, "the server failed at this request; its log says why", code="internal_error")
    return JSONResponse(told.body(), told.status)


async def _invalid(request: Request, error: Any) -> Response:
    """The first problems of the request, in one message."""
    problems = error.errors()[:_SHOWN]
    if problems[0]["type"] == "json_invalid":
        at, what = problems[0]["loc"][-1], problems[0]["ctx"]["error"]
        told = ApiError(400, f"the body is not JSON: {what} at character {at}")
        return JSONResponse(told.body(), told.status)
    lines = []
    for problem in problems:
        # Of a union pydantic names the kind that was tried, such as list[TextPart].
        parts = [str(part) for part in problem["loc"] if part != "body"]
        where = ".".join(part for part in parts if "[" not in part) or "body"
        lines.append(f"{where}: {problem['msg']}")
    kind = request.headers.get("content-type", "none")
    if not kind.partition(";")[0].strip().endswith("json"):
        lines.append(f"send it with Content-Type: application/json (it came with {kind[:80]})")
    place = [str(part) for part in problems[0]["loc"] if part != "body"]
    told = ApiError(400, "; ".join(dict.fromkeys(lines))[:2000], param=place[0] if place else None)
    return JSONResponse(told.body(), told.status)


async def _http_error(request: Request, error: Any) -> Response:
    told = ApiError(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    if told.status == 405:  # starlette names the methods of one route alone
        path, asked = request.scope["path"], request.app.openapi()["paths"]
        methods = {
            method.upper() for known in asked if _template(known).fullmatch(path) for method in asked[known]
        }  # fmt: skip
        headers = {"allow": ", ".join(sorted(methods))} if methods else headers
    return JSONResponse(told.body(), told.status, headers)


def _template(path: str) -> re.Pattern[str]:
    """`/admin/adapters/{name}` as a pattern."""
    return re.compile(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(path)))


def _open_routes(service: Service) -> APIRouter:
    routes = APIRouter()
    page = resources.files("twinlora.serve").joinpath("page.html").read_text(encoding="utf-8")

    @routes.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @routes.get("/health", responses={503: {"description": "The engine has died"}})
    async def health() -> JSONResponse:
        """Whether the process works at all."""
        return JSONResponse({"status": "ok" if service.engine.alive else "dead"}, 200 if service.engine.alive else 503)

    @routes.get("/ready", responses={503: {"description": "Not now"}})
    async def ready() -> JSONResponse:
        """Whether it takes requests."""
        ok = service.engine.alive and not service.draining
        return JSONResponse({"status": "ready" if ok else "draining"}, 200 if ok else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        service.metrics.adapter_bytes.set(service.registry.resident_bytes)
        service.metrics.waiting.set(len(service.engine.scheduler.waiting))
        service.metrics.running.set(len(service.engine.scheduler.running))
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _openai_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/models")
    async def list_models() -> dict[str, Any]:
        """The base and every adapter, with the base as its parent."""
        return {"object": "list", "data": _models(service)}

    @routes.get("/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        """One of them, by name or by name@sha256."""
        found = [entry for entry in _models(service) if model in (entry["id"], entry["root"])]
        if not found:
            raise ApiError(404, f"model {model[:200]!r} is not served", param="model", code="model_not_found")
        return found[0]

    @routes.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next message of a chat."""
        wanted = body.max_completion_tokens or body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None

        async def prepare() -> tuple[list[int], Sampling]:
            tokens = await service.encode_chat([message.plain() for message in body.messages])
            return tokens, _sampling(body, service.room(tokens, wanted, "messages"), top, continues=False)

        return await _answer(service, request, ChatForm, body, prepare, top)

    @routes.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """How a text goes on."""

        async def prepare() -> tuple[list[int], Sampling]:
            tokens = await service.encode_prompt(body.prompt)
            room = service.room(tokens, body.max_tokens, "prompt")
            return tokens, _sampling(body, room, body.logprobs, continues=True)

        return await _answer(service, request, CompletionForm, body, prepare, body.logprobs)

    return routes


def _models(service: Service) -> list[dict[str, Any]]:
    base = service.registry.base
    entries = [{"id": base, "object": "model", "created": 0, "owned_by": "twinlora", "parent": None, "root": base}]
    for version in service.registry.versions():
        entries.append(
            {"id": version.name, "object": "model", "created": version.since, "owned_by": "twinlora", "parent": base,
             "root": version.identity, "system": version.system}
        )  # fmt: skip
    return entries


def _sampling(body: ChatRequest | CompletionRequest, max_tokens: int, top: int | None, *, continues: bool) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(max_tokens, temperature, body.top_p or 1.0, body.seed, body.stops(), top, continues)


async def _answer(
    service: Service, request: Request, form_of: type[Form], body: ChatRequest | CompletionRequest,
    prepare: Callable[[], Awaitable[tuple[list[int], Sampling]]], top: int | None,
) -> Response:  # fmt: skip
    answer = await service.begin(body.model, prepare)
    form = form_of(body.model, answer, service.tokenizer, top)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return _Stream(answer, stream(form, answer, usage=usage), media_type="text/event-stream", headers=headers)
    async with answer:
        return JSONResponse(await _unless_gone(request, whole(form, answer)))


class _Stream(StreamingResponse):
    """Lets go of the answer however it ends, also before its first piece was sent or when the client reads no more."""

    def __init__(self, answer: Answer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See starlette."""
        loop = asyncio.get_running_loop()
        since: float | None = None  # the client keeps us waiting
        timer: asyncio.TimerHandle | None = None

        async def sent(message: Any) -> None:
            nonlocal since
            since = loop.time()
            await send(message)
            since = None

        def look() -> None:
            """Now and then: a timer for each piece would cost more than the piece."""
            nonlocal timer
            end = (loop.time() if since is None else since) + _READ_SECONDS
            if end <= loop.time():
                limit.reschedule(end)
            else:
                timer = loop.call_at(end, look)

        async with self.answer:
            try:
                async with asyncio.timeout(None) as limit:
                    look()
                    await super().__call__(scope, receive, sent)
            except (TimeoutError, ClientDisconnect):
                self.answer.service.note(f"a client took nothing of its answer for {_READ_SECONDS:.0f} s: cut off")
            finally:
                if timer is not None:
                    timer.cancel()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ApiError(400, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

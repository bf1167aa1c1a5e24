"""Everything that serving needs, put together; and the life of the server."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from twinlora import machine
from twinlora.adapters.files import CONFIG
from twinlora.config import ServeOptions, parse_size
from twinlora.errors import AdapterError, ConfigError, Interrupted
from twinlora.evaluate.opening import Opened, open_model
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import precision_by_layer, resolve
from twinlora.reporter import Reporter
from twinlora.serve.admin import find_adapter
from twinlora.serve.engine import Engine, require_servable
from twinlora.serve.guard import is_local
from twinlora.serve.http import application
from twinlora.serve.metrics import Metrics
from twinlora.serve.registry import Registry
from twinlora.serve.service import Service
from twinlora.serve.store import ModelStore

__all__ = ["Served", "open_service", "serve"]

_CONTEXT = 2048  # tokens, where nobody says
_DRAIN_SECONDS = 60  # for requests that run when the server is told to stop


@dataclass
class Served:
    """A service and the application in front of it."""

    service: Service
    app: Any


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {path}: cannot be read: {error}") from None
    if len(token) < 16 or not token.isascii():
        raise ConfigError(f"token file {path}: expected a token of at least 16 ASCII characters")
    return token


def open_service(options: ServeOptions, adapters: dict[str, Path], reporter: Reporter) -> Served:
    """Load the base, check and register every adapter, start the engine.

    Raises ConfigError, ModelError, AdapterError.
    """
    token, admin_token = _token(options.token_file), _token(options.admin_token_file)
    if token is None and not is_local(options.host):
        raise ConfigError(
            f"--host {options.host} can be reached from elsewhere: give --token-file, or listen on 127.0.0.1"
        )
    if options.adapters_dir is not None and not options.adapters_dir.is_dir():
        raise ConfigError(f"--adapters-dir {options.adapters_dir}: no such directory")
    opened = machine.apart(lambda: _open(options, reporter))  # from then on the engine's thread alone computes
    model = opened.model
    limits = {"slots": options.slots, "capacity": _context(options, model), "budget": options.batch_tokens}
    metrics = Metrics()
    engine = Engine(model, opened.tokenizer, opened.bank, on_pass=metrics.on_pass, **limits)
    store = ModelStore(
        engine,
        base=options.model,
        fingerprint=fingerprint(resolve(options.model), reporter.note),
        precision=precision_by_layer(model),
    )
    name = options.name or Path(options.model).name or "base"
    registry = Registry(
        store,
        name,
        parse_size(options.adapter_memory),
        blends=options.blends,
        note=reporter.note,
    )
    engine.start()
    engine.rehearse()
    service = Service(engine, registry, metrics, options, reporter.note)
    try:
        _register(registry, options.adapters_dir, adapters, reporter.note)
    except BaseException:
        service.close()
        raise
    app = application(service, token=token, admin_token=admin_token, max_body=parse_size(options.max_body))
    return Served(service, app)


def _open(options: ServeOptions, reporter: Reporter) -> Opened:
    opened = open_model(options, {}, precision=options.precision, reporter=reporter)
    require_servable(opened.model.eval(), opened.tokenizer)
    return opened


def _context(options: ServeOptions, model: Any) -> int:
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    if options.context is None:
        return min(_CONTEXT, longest or _CONTEXT)
    if longest is not None and options.context > longest:
        raise ConfigError(f"--context {options.context:,}: this model has positions up to {longest:,}")
    return options.context


def _register(registry: Registry, root: Path | None, adapters: dict[str, Path], note: Callable[[str], None]) -> None:
    """Adapters named on the command line must be right; one in the directory that is not is a line."""
    for name, directory in adapters.items():
        registry.register(name, directory).result()
    if root is None:
        return
    served = 0
    for name in sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in adapters):
        if not any((root / name / inner / CONFIG).is_file() for inner in ("", "adapter")):
            continue
        try:
            registry.register(name, find_adapter(root, name)).result()
            served += 1
        except AdapterError as error:
            note(f"not served: {error}")
    note(f"{root}: {served} adapter(s) served")


def serve(
    options: ServeOptions, adapters: dict[str, Path], reporter: Reporter, announce: Callable[[dict[str, Any]], None]
) -> None:
    """Serve until a signal comes; requests that run are finished. Raises Interrupted after that.

    `announce` gets the address, the base's name and the adapters' identities once requests are taken.
    """
    served = open_service(options, adapters, reporter)
    config = uvicorn.Config(
        served.app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config, served.service, announce)
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # uvicorn drains at a signal, then raises it again for whoever was there before.
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        served.service.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted("stopped; every request that ran was finished", received[0])


class _Server(uvicorn.Server):
    """Says where it listens, and stops to take requests at the first signal."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, announce

    async def startup(self, sockets: Any = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            registry = self._service.registry
            adapters = [version.identity for version in registry.versions()]
            self._announce({"url": f"http://{host}:{port}", "base": registry.base, "adapters": adapters})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._service.draining = True
        super().handle_exit(sig, frame)

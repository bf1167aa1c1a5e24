"""Everything that serving needs, put together; and the life of the server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from twinlora import machine
from twinlora.adapters import files, passport
from twinlora.adapters.bank import require_switchable
from twinlora.adapters.passport import Passport
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
from twinlora.serve.registry import Registry, require_name
from twinlora.serve.service import Service
from twinlora.serve.store import ModelStore

__all__ = ["HTTP", "Served", "open_service", "serve"]

# What uvicorn reads requests with: httptools, which it prefers, has no limit to the size of headers.
HTTP: dict[str, Any] = {"http": "h11", "h11_max_incomplete_event_size": 64 * 1024}
_CONTEXT = 2048  # tokens, where nobody says


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
    name = options.name or Path(options.model).name or "base"
    identity = fingerprint(resolve(options.model), reporter.note)
    # From then on the engine's thread alone computes.
    opened = machine.apart(lambda: _open(options, _papers(options, adapters, name, identity), reporter))
    service = _service(options, opened, name, identity, reporter)
    try:
        _register(service.registry, options.adapters_dir, adapters, reporter.note)
    except BaseException:
        service.close()
        raise
    app = application(service, token=token, admin_token=admin_token, max_body=parse_size(options.max_body))
    return Served(service, app)


def _service(options: ServeOptions, opened: Opened, name: str, identity: str, reporter: Reporter) -> Service:
    """The engine, started, and the registry of its adapters; `name` is the base's."""
    model = opened.model
    limits = {"slots": options.slots, "capacity": _context(options, model), "budget": options.batch_tokens}
    metrics = Metrics()
    engine = Engine(model, opened.tokenizer, opened.bank, on_pass=metrics.on_pass, **limits)
    memory = parse_size(options.adapter_memory)
    store = ModelStore(
        engine,
        limit=memory,
        base=options.model,
        fingerprint=identity,
        precision=precision_by_layer(model),
        layers=opened.layers,
    )
    registry = Registry(store, name, memory, blends=options.blends, note=reporter.note)
    engine.start()
    engine.rehearse()
    return Service(engine, registry, metrics, options, reporter.note)


def _papers(options: ServeOptions, adapters: dict[str, Path], base: str, identity: str) -> dict[str, Passport | None]:
    """The passports that say what the base is to be: of the adapters that were named, else of those in the directory.

    Raises AdapterError for a named one that cannot be served, before the base is loaded.
    """
    papers: dict[str, Passport | None] = {}
    for name, directory in adapters.items():
        require_name(name, base)
        adapter = files.read_adapter(directory)
        require_switchable(adapter)
        home = adapter.directory
        papers[name] = paper = passport.read(home)
        if paper is not None:
            passport.require_base(home, paper, fingerprint=identity, base=options.model)
    if papers or options.adapters_dir is None:
        return papers
    for name in _found(options.adapters_dir):
        with contextlib.suppress(AdapterError, OSError):  # what is wrong with it is told when it is registered
            paper = passport.read(find_adapter(options.adapters_dir, name))
            if paper is None or paper.base_fingerprint == identity:
                papers[name] = paper
    return papers


def _found(root: Path) -> list[str]:
    """The adapters of a directory, by name."""
    configs = (files.CONFIG, f"adapter/{files.CONFIG}")
    return sorted(p.name for p in root.iterdir() if any(_is_file(p / config) for config in configs))


def _is_file(path: Path) -> bool:
    """Whether it is a file that can be seen; `Path.is_file` raises where a directory on the way is closed to us."""
    try:
        return path.is_file()
    except OSError:
        return False


def _open(options: ServeOptions, papers: dict[str, Passport | None], reporter: Reporter) -> Opened:
    opened = open_model(
        options,
        {},
        precision=options.precision,
        layer_precision=options.layer_precision,
        reporter=reporter,
        papers=papers,
    )
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
    for name in _found(root):
        if name in adapters:
            if adapters[name].resolve() != (root / name).resolve():
                note(f"not served: {root / name}, since --adapter {name} is another directory")
            continue
        try:
            registry.register(name, find_adapter(root, name)).result()
            served += 1
        except (AdapterError, OSError) as error:
            note(f"not served: {error}")
    note(f"{root}: {served} adapter(s) served")


def serve(
    options: ServeOptions, adapters: dict[str, Path], reporter: Reporter, announce: Callable[[dict[str, Any]], None]
) -> None:
    """Serve until a signal comes; requests that run are finished, for `options.drain` seconds or until a second Ctrl-C.

    Raises Interrupted then.

    `announce` gets the address, the base's name and the adapters' identities once requests are taken.
    """
    listener = _bound(options.host, options.port)
    with contextlib.closing(listener):
        served = open_service(options, adapters, reporter)
        config = uvicorn.Config(
            served.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            proxy_headers=False,  # who asks is who connects: anybody can write a header
            timeout_graceful_shutdown=math.ceil(options.drain) + 10,  # they are cut off before
            **HTTP,
        )
        server = _Server(config, served.service, announce, reporter.note)
        received: list[int] = []

        def remember(number: int, frame: FrameType | None) -> None:
            received.append(number)

        # uvicorn drains at a signal, then raises it again for whoever was there before.
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run([listener])
        finally:
            served.service.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        end = "requests that ran were cut off" if server.cut else "every request that ran was finished"
        raise Interrupted(f"stopped; {end}", received[0])


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken before anything is loaded; it listens once requests can be answered. Raises ConfigError."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror}; choose another, or --port 0 for a "
            "free one"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """Says where it listens; takes no requests after the first signal, and cuts off those that run at the second."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        announce: Callable[[dict[str, Any]], None],
        note: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._service, self._announce, self._note = service, announce, note
        self.cut = False

    async def startup(self, sockets: Any = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        registry = self._service.registry
        adapters = [version.identity for version in registry.versions()]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._announce({"url": url, "base": registry.base, "adapters": adapters})

    async def shutdown(self, sockets: Any = None) -> None:
        """See uvicorn."""
        if self._service.active:
            self._note(f"stopping: {self._service.active} request(s) still run; another Ctrl-C cuts them off")
        late = asyncio.get_running_loop().call_later(self._service.options.drain, self._cut_off)
        await super().shutdown(sockets)
        late.cancel()

    def _cut_off(self) -> None:
        self.cut = self._service.active > 0
        self._service.engine.cut_off()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._service.draining = True
        if self.should_exit and sig == signal.SIGINT and not self._service.engine.cut:
            self._cut_off()  # what runs ends with an error in a moment; uvicorn would drop the connections
        else:
            super().handle_exit(sig, frame)

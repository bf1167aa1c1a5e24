"""The admin API: adapters come and go while requests run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from twinlora.adapters.files import CONFIG
from twinlora.errors import AdapterError
from twinlora.serve.registry import UnknownModel, Version, contained
from twinlora.serve.schema import PinRequest, RegisterRequest, ReplaceRequest
from twinlora.serve.service import ApiError, Service

__all__ = ["admin_routes", "find_adapter"]


def find_adapter(root: Path, relative: str) -> Path:
    """The adapter directory at `relative` inside of `root`, or that of a run there. Raises AdapterError."""
    directory = contained(root, relative)
    inner = directory / "adapter"
    return (
        contained(root, f"{relative}/adapter") if inner.is_dir() and not (directory / CONFIG).is_file() else directory
    )


def admin_routes(service: Service) -> APIRouter:
    """Routes under /admin."""
    routes = APIRouter()

    def shown(version: Version) -> dict[str, Any]:
        content = version.content
        return {
            "name": version.name,
            "identity": version.identity,
            "bytes": content.nbytes,
            "resident": content.resident,
            "pinned": service.registry.pinned(version.name),
            "requests": content.leases,
            "system": version.system,
            "since": version.since,
        }

    async def register(name: str, path: str, *, replace: bool) -> dict[str, Any]:
        root = service.options.adapters_dir
        if root is None:
            raise ApiError(400, "this server has no --adapters-dir to register from", param="path")
        if replace != any(version.name == name for version in service.registry.versions()):
            status, what = (404, "is not served: POST registers it") if replace else (409, "is served: PUT replaces it")
            raise ApiError(status, f"adapter {name[:80]!r} {what}", param="name")
        try:
            directory = await asyncio.to_thread(find_adapter, root, path)
        except (AdapterError, OSError) as error:
            raise ApiError(404, str(error), param="path") from None
        try:
            version = await asyncio.wrap_future(service.registry.register(name, directory, replace=replace))
        except (AdapterError, OSError) as error:
            raise ApiError(400, str(error), param="path") from None
        return shown(version)

    @routes.get("/adapters")
    async def list_adapters() -> dict[str, Any]:
        """What is served, and what of it is in memory."""
        registry = service.registry
        adapters = [shown(version) for version in registry.versions()]
        return {"adapters": adapters, "resident_bytes": registry.resident_bytes, "limit_bytes": registry.limit}

    @routes.post("/adapters", status_code=201)
    async def add_adapter(body: RegisterRequest) -> dict[str, Any]:
        """Serve an adapter under a new name."""
        return await register(body.name, body.path, replace=False)

    @routes.put("/adapters/{name}")
    async def replace_adapter(name: str, body: ReplaceRequest) -> dict[str, Any]:
        """Let a name stand for another adapter from now on; requests that run keep the one they have."""
        return await register(name, body.path, replace=True)

    @routes.delete("/adapters/{name}")
    async def unload_adapter(name: str) -> dict[str, Any]:
        """Stop serving it; requests that run are finished."""
        try:
            return {"unloaded": service.registry.unload(name).identity}
        except UnknownModel as error:
            raise ApiError(404, str(error), param="name") from None

    @routes.post("/adapters/{name}/pin")
    async def pin_adapter(name: str, body: PinRequest) -> dict[str, Any]:
        """Keep it in memory, or no longer."""
        try:
            return shown(service.registry.pin(name, body.pinned))
        except UnknownModel as error:
            raise ApiError(404, str(error), param="name") from None

    return routes

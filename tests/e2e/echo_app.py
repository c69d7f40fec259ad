"""A platform of one node whose app ``orders`` answers every call with what it was given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from phalanx import App, Platform, Role
from phalanx.testing.nats import NatsServer


def declared(nats: NatsServer, folder: Path) -> tuple[Platform, App]:
    """A node n1 that does not run yet, with an app that echoes."""
    platform = Platform("test", node="n1", nats=nats.urls, data_dir=str(folder), http={"enabled": False})
    app = platform.app("orders")

    @app.handle("echo")
    async def echo(value: Any) -> Any:
        return value

    return platform, app


@asynccontextmanager
async def running(platform: Platform) -> AsyncIterator[None]:
    """Until it is left, the node runs, and its app is active."""
    async with platform:
        await platform.wait_for_role("orders", Role.ACTIVE)
        yield

"""``python -m phalanx.testing.program``: a node whose apps write down what they do, for tests.

Configured by the environment: ``PHALANX_TEST`` holds a JSON object, see :class:`Settings`; who and
where the node is comes from ``PHALANX_NODE``, ``PHALANX_DATA``, ``PHALANX_NATS``, ``PHALANX_HTTP``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any, Literal

import msgspec

from phalanx import ActiveContext, ActivePassive, App, EmbeddedNats, Logging, NatsOptions, Platform, Process
from phalanx.testing.history import History


class Settings(msgspec.Struct, kw_only=True):
    """What the program runs. ``fault``: ``none``, ``block`` (a hook that blocks the loop when the file
    ``fault_file`` appears), ``deaf`` (a hook that ignores its cancellation), ``fail`` (on_active raises).
    ``writes``: fenced writes while active, each ``write_seconds`` after the last, to one key or
    (``distinct_keys``) each to its own."""

    history: str
    platform: str = "test"
    apps: tuple[str, ...] = ("wiki",)
    ttl: float = 2.0
    timings: dict[str, float] = {}
    tick_seconds: float = 0.002
    hooks: bool = True
    backend: str = ""
    urls: tuple[str, ...] = ()
    server_name: str = ""
    embedded: dict[str, Any] | None = None
    replicas: Literal[1, 3, 5] | None = None
    fault: str = "none"
    fault_file: str = ""
    fault_node: str = ""
    priority: int = 0
    writes: bool = False
    write_seconds: float = 0.02
    distinct_keys: bool = False
    log_level: str = "info"


async def _work(settings: Settings, history: History, app: App, ctx: ActiveContext) -> None:
    """The active work: signs of life until the section ends, and fenced writes where wanted."""
    mine = settings.fault_node in ("", ctx.node)
    if settings.fault == "fail" and mine:
        raise RuntimeError("told to fail")
    history.record("active", ctx.node, app.name, ctx.epoch)
    ctx.ready()
    writer = asyncio.create_task(_write(settings, history, app, ctx)) if settings.writes else None
    try:
        while True:
            await asyncio.sleep(settings.tick_seconds)
            history.record("tick", ctx.node, app.name, ctx.epoch)
            if settings.fault == "block" and mine and os.path.exists(settings.fault_file):  # noqa: ASYNC240
                os.unlink(settings.fault_file)
                history.record("blocking", ctx.node, app.name, ctx.epoch)
                time.sleep(60)  # noqa: ASYNC251 - that is the fault
    except asyncio.CancelledError:
        while settings.fault == "deaf" and mine:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(settings.tick_seconds)
            history.record("tick", ctx.node, app.name, ctx.epoch)
        history.record("passive", ctx.node, app.name, ctx.epoch)
        raise
    finally:
        if writer is not None:
            writer.cancel()


async def _write(settings: Settings, history: History, app: App, ctx: ActiveContext) -> None:
    """Counts up in the app's KV, and notes every acknowledged write."""
    number = 0
    while True:
        number += 1
        key = f"write.{ctx.epoch}.{number}" if settings.distinct_keys else f"count.{ctx.node}"
        try:
            revision = await ctx.kv.put(key, f"{ctx.epoch}:{number}")
        except Exception as error:
            history.record(
                "write-failed", ctx.node, app.name, ctx.epoch, error=f"{type(error).__name__}: {error}"
            )
        else:
            history.record(
                "written", ctx.node, app.name, ctx.epoch, key=key, number=number, revision=revision
            )
        await asyncio.sleep(settings.write_seconds)


def build(settings: Settings) -> Platform:
    """The platform with its apps."""
    history = History(settings.history)
    nats: Any = None
    if settings.embedded is not None:
        nats = EmbeddedNats(**settings.embedded)
    elif settings.urls:
        nats = NatsOptions(urls=settings.urls, server_name=settings.server_name, replicas=settings.replicas)
    platform = Platform(
        settings.platform,
        nats=nats,
        timings={"ttl": settings.ttl, **settings.timings},
        logging=Logging(level=settings.log_level),  # type: ignore[arg-type]
    )
    for name in settings.apps:
        backend = Process(settings.backend) if settings.backend else None
        app = platform.app(name, ActivePassive(priority=settings.priority), backend=backend)
        if settings.hooks:

            async def on_active(ctx: ActiveContext, app: App = app) -> None:
                await _work(settings, history, app, ctx)

            app.on_active(on_active)

            def on_leader_change(change: Any, app: App = app) -> None:
                history.record("leader", platform.config.node, app.name, change.epoch, leader=change.leader)

            app.on_leader_change(on_leader_change)
    return platform


def main() -> None:
    """Run it."""
    settings = msgspec.json.decode(os.environ["PHALANX_TEST"], type=Settings)
    build(settings).run()


if __name__ == "__main__":
    main()

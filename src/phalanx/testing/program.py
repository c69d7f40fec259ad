"""``python -m phalanx.testing.program``: a node whose apps write down what they do, for tests.

Configured by the environment: ``PHALANX_TEST`` holds a JSON object, see :class:`Settings`; who and
where the node is comes from ``PHALANX_NODE``, ``PHALANX_DATA``, ``PHALANX_NATS``, ``PHALANX_HTTP``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine
from typing import Any, Literal

import msgspec

from phalanx import (
    ActiveContext,
    ActivePassive,
    App,
    CallContext,
    EmbeddedNats,
    Fence,
    Logging,
    NatsOptions,
    Platform,
    Process,
    SQLite,
)
from phalanx.testing.committing import Committer
from phalanx.testing.history import History
from phalanx.testing.lasting import LastingBackend


class Settings(msgspec.Struct, kw_only=True):
    """What the program runs. ``fault``: ``none``, ``block`` (a hook that blocks the loop when the file
    ``fault_file`` appears), ``deaf`` (a hook that ignores its cancellation), ``fail`` (on_active raises).
    ``writes``: fenced writes while active, each ``write_seconds`` after the last, to one key or
    (``distinct_keys``) each to its own. ``lasting``: the command of a backend that outlives
    the node. ``database``: where each node's SQLite database lies, with
    ``{node}`` in it; while active a row is committed every ``commit_seconds``, and every ``sync_every``
    rows ``db.sync()`` is awaited; ``no_failover``: nodes that never take over by
    themselves. ``database_options`` are more fields of its declaration; ``storms`` and
    ``stop_file``: see ``committing.Committer``. ``calls``: each app answers ``write`` and ``read``, which
    is idempotent, with the node's name. ``fence``: fields of the fence declaration."""

    history: str
    platform: str = "test"
    apps: tuple[str, ...] = ("wiki",)
    ttl: float = 2.0
    timings: dict[str, float] = {}
    tick_seconds: float = 0.002
    hooks: bool = True
    lasting: str = ""
    backend: str = ""
    urls: tuple[str, ...] = ()
    server_name: str = ""
    embedded: dict[str, Any] | None = None
    replicas: Literal[1, 3, 5] | None = None
    fault: str = "none"
    fault_file: str = ""
    fault_node: str = ""
    fence: dict[str, Any] = {}
    on_nats_loss: Literal["demote", "hold"] = "demote"
    priority: int = 0
    no_failover: tuple[str, ...] = ()
    writes: bool = False
    write_seconds: float = 0.02
    distinct_keys: bool = False
    database: str = ""
    database_options: dict[str, Any] = {}
    commit_seconds: float = 0.02
    sync_every: int = 10
    storms: bool = False
    stop_file: str = ""
    calls: bool = False
    log_level: str = "info"


async def _work(settings: Settings, history: History, app: App, ctx: ActiveContext) -> None:
    """The active work: signs of life until the section ends, and fenced writes where wanted."""
    mine = settings.fault_node in ("", ctx.node)
    if settings.fault == "fail" and mine:
        raise RuntimeError("told to fail")
    history.record("active", ctx.node, app.name, ctx.epoch)
    ctx.ready()
    committer = asyncio.create_task(_committer(settings, history, app, ctx)) if settings.database else None
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
        for task in (writer, committer):
            if task is not None:
                task.cancel()


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


def _committer(
    settings: Settings, history: History, app: App, ctx: ActiveContext
) -> Coroutine[Any, Any, None]:
    return Committer(
        history,
        app.name,
        ctx,
        commit_seconds=settings.commit_seconds,
        sync_every=settings.sync_every,
        storms=settings.storms,
        stop_file=settings.stop_file,
    ).run()


def _answer_calls(app: App) -> None:
    @app.handle("write")
    async def write(ctx: CallContext) -> str:  # pyright: ignore[reportUnusedFunction]
        return ctx.node

    @app.handle("read", idempotent=True)
    async def read(ctx: CallContext) -> str:  # pyright: ignore[reportUnusedFunction]
        return ctx.node


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
        fence=Fence(**settings.fence) if settings.fence else None,
        logging=Logging(level=settings.log_level),  # type: ignore[arg-type]
    )
    for name in settings.apps:
        backend = Process(settings.backend) if settings.backend else None
        database = None
        if settings.database:
            path = settings.database.format(node=platform.config.node, app=name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            database = SQLite(path, **settings.database_options)
        pattern = ActivePassive(
            priority=settings.priority,
            no_failover=platform.config.node in settings.no_failover,
            on_nats_loss=settings.on_nats_loss,
        )
        app = platform.app(name, pattern, backend=backend, database=database)
        if settings.lasting:
            app.backend = LastingBackend(settings.lasting)
        if settings.calls:
            _answer_calls(app)
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

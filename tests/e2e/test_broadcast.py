"""Broadcast: who is expected to answer, who did, and that it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.test_calls import can_follow, platform_of
from tests.waiting import until

from phalanx import (
    App,
    CallContext,
    CallError,
    CallTimeout,
    NatsOptions,
    NoInstance,
    Platform,
    Role,
    UnknownApp,
    WrongRoute,
    WrongType,
)
from phalanx.client import PlatformClient
from phalanx.messaging.api import Api
from phalanx.names import Names
from phalanx.testing.nats import NatsServer


class Cache:
    """An app whose instances answer for themselves."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.gate = asyncio.Event()
        self.cancelled = 0
        self.began = 0

        @app.handle("where", anywhere=True)
        async def where(ctx: CallContext) -> str:
            return ctx.node

        @app.handle("fail", anywhere=True)
        async def fail(ctx: CallContext) -> int:
            if ctx.node == "n1":
                raise CallError("empty", "nothing kept")
            return 7

        @app.handle("lead")
        async def lead(ctx: CallContext) -> int:
            return ctx.epoch

        @app.handle("wait", anywhere=True)
        async def wait(ctx: CallContext) -> str:
            self.began += 1
            try:
                if ctx.node == "n2":
                    await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return ctx.node


@contextlib.asynccontextmanager
async def two(nats: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[dict[str, Cache], Api]]:
    """The app on n1, which is active, and on n2; the calls from a client."""
    async with contextlib.AsyncExitStack() as stack:
        caches: dict[str, Cache] = {}
        for name in ("n1", "n2"):
            platform = platform_of(nats, tmp_path, name)
            caches[name] = Cache(platform.app("cache"))
            await stack.enter_async_context(platform)
            await platform.wait_for_role("cache", Role.ACTIVE if name == "n1" else Role.STANDBY)
        await until(lambda: can_follow(caches["n1"], "n2"))  # type: ignore[arg-type]
        client = PlatformClient("test", NatsOptions(urls=tuple(nats.urls)))
        await stack.enter_async_context(client)
        api = client.api("cache")
        await until(lambda: len(caches["n1"].app._calls.instances()) == 2)  # type: ignore[union-attr]
        await until(lambda: len(caches["n2"].app._calls.instances()) == 2)  # type: ignore[union-attr]
        yield caches, api


async def test_all_nodes_answer(nats_server: NatsServer, tmp_path: Path) -> None:
    """It ends as soon as both have, each with its answer or its error; standbys refuse the leader's."""
    async with two(nats_server, tmp_path) as (caches, api), asyncio.timeout(30):
        assert await api.broadcast("where", returns=str, timeout=600) == {"n1": "n1", "n2": "n2"}
        answers = await api.broadcast("fail", returns=int, timeout=600)
        assert answers["n2"] == 7
        error = answers["n1"]
        assert isinstance(error, CallError)
        assert (error.code, error.node) == ("empty", "n1")
        led = await api.broadcast("lead", returns=int, timeout=600)
        assert led["n1"] == caches["n1"].app.epoch
        assert isinstance(led["n2"], WrongRoute)
        wrong = await api.broadcast("where", returns=int, timeout=600)
        assert all(isinstance(each, WrongType) for each in wrong.values())


async def test_node_that_is_silent_is_named(nats_server: NatsServer, tmp_path: Path) -> None:
    """The others' answers are there, and it with CallTimeout; its handler is cancelled."""
    async with two(nats_server, tmp_path) as (caches, api), asyncio.timeout(30):
        answers = await api.broadcast("wait", returns=str, timeout=1)
        assert answers["n1"] == "n1"
        silent = answers["n2"]
        assert isinstance(silent, CallTimeout)
        assert silent.started
        await until(lambda: caches["n2"].cancelled == 1)


async def test_cancelled_broadcast_cancels_its_handlers(nats_server: NatsServer, tmp_path: Path) -> None:
    """Nobody waits any more; so does a client that is closed end it."""
    async with two(nats_server, tmp_path) as (caches, api), asyncio.timeout(30):
        asking = asyncio.create_task(api.broadcast("wait", timeout=600))
        await until(lambda: caches["n2"].began == 1)
        asking.cancel()
        await until(lambda: caches["n2"].cancelled == 1)
        asking = asyncio.create_task(api.broadcast("wait", timeout=600))
        await until(lambda: caches["n2"].began == 2)
        await api._caller().close()
        with pytest.raises(CallError, match="the client was closed"):
            await asking
        await until(lambda: caches["n2"].cancelled == 2)


async def test_broadcast_to_nobody(nats_server: NatsServer, tmp_path: Path) -> None:
    """An app that there is not, and one of which no instance is there: a typed error, at once."""
    platform = platform_of(nats_server, tmp_path, "n1")
    Cache(platform.app("cache"))
    async with platform:
        await platform.wait_for_role("cache", Role.ACTIVE)
        with pytest.raises(UnknownApp):
            await platform.api("nobody").broadcast("where", timeout=20)
    async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
        async with asyncio.timeout(30):
            with pytest.raises(NoInstance, match="no instance was there"):
                await client.api("cache").broadcast("where", timeout=600)


async def test_synchronous_broadcast(nats_server: NatsServer, tmp_path: Path) -> None:
    """From code without an event loop."""

    def work() -> dict[str, str | CallError]:
        with Platform.client("test", nats_server.urls) as client:
            return client.api("cache").broadcast("where", returns=str, timeout=30)

    platform = platform_of(nats_server, tmp_path, "n1")
    Cache(platform.app("cache"))
    async with platform:
        await platform.wait_for_role("cache", Role.ACTIVE)
        assert await asyncio.to_thread(work) == {"n1": "n1"}


def test_subjects_of_many_answers_are_a_family_of_their_own() -> None:
    """So that guests' accounts can tell them from calls with one answer."""
    names = Names("prod")
    assert names.many_subject(names.call_all_subject("orders", "flush")) == "prod._.many.orders.all.flush"
    assert names.many_subject(names.call_subjects("orders")) == "prod._.many.orders.>"

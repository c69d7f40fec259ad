"""Streams of answers: flow control, their ends of every kind, and that no wait for an item hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.e2e.test_calls import NAMES, can_follow, platform_of
from tests.waiting import until

import phalanx
from phalanx import (
    App,
    Busy,
    CallContext,
    CallError,
    CallTimeout,
    ConfigError,
    HandlerFailed,
    NatsOptions,
    Node,
    NoInstance,
    OutcomeUnknown,
    Platform,
    Role,
    Secret,
    WrongType,
)
from phalanx.bus import permissions
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.messaging import call_wire as wire
from phalanx.messaging.api import Api
from phalanx.messaging.content import MSGPACK
from phalanx.ports import Message
from phalanx.testing.nats import NatsServer


class Tick(msgspec.Struct):
    number: int
    node: str


class Clock:
    """An app whose handlers yield; what became of them is in its fields."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.made = 0
        self.closed = list[str]()
        self.waits = 0

        @app.handle("count")
        async def count(until: int, ctx: CallContext) -> AsyncIterator[Tick]:
            try:
                for number in range(until):
                    self.made += 1
                    yield Tick(number, ctx.node)
            finally:
                self.closed.append("count")

        @app.handle("wait", anywhere=True, concurrency=2)
        async def wait(ctx: CallContext) -> AsyncIterator[str]:
            self.waits += 1
            try:
                yield ctx.node
                await asyncio.Event().wait()
            finally:
                self.closed.append("wait")

        @app.handle("fail")
        async def fail(how: str) -> AsyncIterator[object]:
            yield 1
            match how:
                case "own":
                    raise CallError("sold-out", "nothing left")
                case "large":
                    yield "x" * 2_000_000
                case "odd":
                    yield object()
                case _:
                    raise RuntimeError("secret words")

        @app.handle("once")
        async def once() -> int:
            return 1

        @app.handle("nested")
        async def nested() -> list[str]:
            return [item async for item in self.api.stream("wait", returns=str)]

    api: Api


@contextlib.asynccontextmanager
async def node(nats: NatsServer, tmp_path: Path, name: str = "n1") -> AsyncIterator[tuple[Platform, Clock]]:
    platform = platform_of(nats, tmp_path, name)
    clock = Clock(platform.app("clock"))
    async with platform:
        clock.api = platform.api("clock")
        yield platform, clock


@contextlib.asynccontextmanager
async def active(nats: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[Clock, Api]]:
    """The app, active on n1, and its calls from a client."""
    async with node(nats, tmp_path) as (platform, clock):
        await platform.wait_for_role("clock", Role.ACTIVE)
        async with PlatformClient("test", NatsOptions(urls=tuple(nats.urls))) as client:
            yield clock, client.api("clock")


@contextlib.asynccontextmanager
async def two(nats: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[dict[str, Clock], Api]]:
    """n1, which is active, and n2, which follows; and the calls from a client."""
    async with active(nats, tmp_path) as (first, api), node(nats, tmp_path, "n2") as (_, second):
        await until(lambda: can_follow(first, "n2"))  # type: ignore[arg-type]
        yield {"n1": first, "n2": second}, api


async def test_stream_of_typed_items_in_their_order(nats_server: NatsServer, tmp_path: Path) -> None:
    """Far more than a window, as JSON and as MessagePack; an empty one; one of another node."""
    async with active(nats_server, tmp_path) as (clock, api), asyncio.timeout(60):
        found = [tick async for tick in api.stream("count", 1000, returns=Tick, timeout=30, window=7)]
        assert found == [Tick(number, "n1") for number in range(1000)]
        again = [t async for t in api.stream("count", 5, returns=Tick, content_type=MSGPACK)]
        assert again == found[:5]
        assert [t async for t in api.stream("count", 0)] == []
        assert [t async for t in api.stream("count", 3, returns=Tick, window=1)] == found[:3]
        assert clock.closed == 4 * ["count"]


async def test_handler_makes_no_more_than_the_window(nats_server: NatsServer, tmp_path: Path) -> None:
    """It is suspended while nothing is taken, and goes on by what is."""
    async with active(nats_server, tmp_path) as (clock, api), asyncio.timeout(60):
        async with contextlib.aclosing(api.stream("count", 10**6, timeout=30, window=10)) as items:
            await anext(items)
            await until(lambda: clock.made == 10)
            await clock.api.call("once", timeout=30)  # nothing more came of it meanwhile
            assert clock.made == 10
            for _ in range(4):
                await anext(items)
            assert clock.made == 10
            await anext(items)
            await until(lambda: clock.made > 10)
            assert clock.made <= 16
        await until(lambda: clock.closed == ["count"])


async def test_whoever_leaves_early_closes_the_generator(nats_server: NatsServer, tmp_path: Path) -> None:
    """By a break, by closing it, by cancellation while it waits: the handler's ``finally`` runs each time."""
    async with active(nats_server, tmp_path) as (clock, api), asyncio.timeout(60):
        async for _ in api.stream("count", 10**6, timeout=30):
            break
        await until(lambda: clock.closed == ["count"])
        async with contextlib.aclosing(api.stream("wait", timeout=30)) as items:
            await anext(items)
        await until(lambda: clock.closed == ["count", "wait"])

        async def follow() -> None:
            async for _ in api.stream("wait", timeout=30):
                pass

        following = asyncio.create_task(follow())
        await until(lambda: clock.waits == 2)
        following.cancel()
        await until(lambda: clock.closed == ["count", "wait", "wait"])
        assert all(handler.running == 0 for handler in clock.app.handlers.by_name.values())


async def test_errors_come_after_the_items_before_them(nats_server: NatsServer, tmp_path: Path) -> None:
    """Its own errors as they are, others without their words; what cannot be sent says which item."""
    async with active(nats_server, tmp_path) as (_, api), asyncio.timeout(60):
        for how, kind, words in (
            ("own", CallError, "nothing left"),
            ("odd", HandlerFailed, "cannot be sent"),
            ("large", CallError, "item 2 has"),
            ("", HandlerFailed, "says more"),
        ):
            items = api.stream("fail", how, timeout=30)
            assert await anext(items) == 1
            with pytest.raises(kind, match=words) as error:
                await anext(items)
            assert error.value.started
            assert "secret" not in str(error.value)


async def test_wrong_use_of_streams_is_a_typed_error(nats_server: NatsServer, tmp_path: Path) -> None:
    """One kind called as the other, wrong arguments, wrong types of request and item, nobody there."""
    async with active(nats_server, tmp_path) as (_, api), asyncio.timeout(60):
        with pytest.raises(WrongType, match=r"use api.stream\(\)"):
            await api.call("count", 1, timeout=30)
        with pytest.raises(WrongType, match=r"use api.call\(\)"):
            await anext(api.stream("once", timeout=30))
        with pytest.raises(WrongType, match="Expected `int`"):
            await anext(api.stream("count", "many", timeout=30))
        with pytest.raises(WrongType, match="not of the type asked for"):
            await anext(api.stream("count", 1, returns=str, timeout=30))
        with pytest.raises(NoInstance, match="node n7 was not there"):
            await anext(api.stream("wait", to=Node("n7"), timeout=0.3))
        for wrong in ({"window": 0}, {"window": 1025}, {"timeout": 0}):
            with pytest.raises(ConfigError):
                api.stream("count", 1, **wrong)  # type: ignore[arg-type]
        assert await api.call("once", timeout=30) == 1


async def test_streams_count_as_calls_that_run(nats_server: NatsServer, tmp_path: Path) -> None:
    """More than the handler's concurrency are busy, until one has ended."""
    async with active(nats_server, tmp_path) as (_, api), asyncio.timeout(60):
        first, second = api.stream("wait", timeout=30), api.stream("wait", timeout=30)
        await anext(first)
        await anext(second)
        with pytest.raises(Busy):
            await anext(api.stream("wait", timeout=0.3))
        third = api.stream("wait", timeout=30)
        waiting = asyncio.create_task(anext(third))
        await first.aclose()
        assert await waiting == "n1"
        await second.aclose()
        await third.aclose()


async def test_hand_over_ends_streams_at_once(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told, the generator is closed before the next leader is active, which answers then."""
    monkeypatch.setattr("phalanx.messaging.serving.DRAIN_SECONDS", 600.0)  # that it does not wait for
    async with two(nats_server, tmp_path) as (clocks, api), asyncio.timeout(60):
        items = api.stream("wait", timeout=30)
        assert await anext(items) == "n1"
        ending = asyncio.create_task(anext(items))
        await clocks["n1"].app.step_down(to="n2")
        assert clocks["n1"].closed == ["wait"]
        with pytest.raises(OutcomeUnknown, match="stopped it"):
            await ending
        async with contextlib.aclosing(api.stream("wait", timeout=30)) as again:
            assert await anext(again) == "n2"


async def test_g2_stream_of_a_deposed_leader_is_refused(nats_server: NatsServer, tmp_path: Path) -> None:
    """A leader goes on sending items after a later reign was heard of: the caller does not take them."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    leading = wire.Leading("n9", 7)
    requests = list[Message]()

    def send(said: str, data: bytes = b"") -> None:
        headers = {wire.ANSWER: "n9;7", wire.STREAM: said}
        bus.send(requests[0].reply, data, headers)

    def who(message: Message) -> None:
        bus.send(message.reply, msgspec.json.encode(leading))

    try:
        await bus.subscribe(NAMES.call_who_subject("clock"), who, direct=True)
        subject = NAMES.many_subject(NAMES.call_node_subject("clock", "n9"))
        await bus.subscribe(subject, requests.append, direct=True)
        options = NatsOptions(urls=tuple(nats_server.urls))
        async with PlatformClient("test", options) as client, asyncio.timeout(30):
            items = client.api("clock").stream("count", timeout=20)
            first = asyncio.create_task(anext(items))
            await until(lambda: requests)
            send("0;alive")
            send("1", b"1")
            assert await first == 1
            client._calls()._views["clock"].learn("n8", 9)
            send("2", b"2")
            with pytest.raises(OutcomeUnknown, match="epoch 7, which is over"):
                await anext(items)
    finally:
        await bus.close()


async def test_lost_item_and_silence_end_a_stream(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance of which an item is missing, or nothing is heard: OutcomeUnknown, and it is cancelled."""
    monkeypatch.setattr("phalanx.messaging.stream_in.KEEP_SECONDS", 0.1)
    monkeypatch.setattr("phalanx.messaging.stream_in.SILENT_SECONDS", 0.5)
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    cancelled = list[bytes]()

    def on_request(message: Message) -> None:
        if message.data == b"1":
            for said in ("0;alive", "1", "3"):
                bus.send(message.reply, b"0" if said.isdigit() else b"", {wire.STREAM: said})
        else:
            bus.send(message.reply, b"", {wire.STREAM: "0;alive"})

    try:
        await bus.subscribe(NAMES.many_subject(NAMES.call_any_subject("clock")), on_request, direct=True)
        await bus.subscribe(
            NAMES.call_cancel_subject("clock"), lambda m: cancelled.append(m.data), direct=True
        )
        options = NatsOptions(urls=tuple(nats_server.urls))
        async with PlatformClient("test", options) as client, asyncio.timeout(30):
            for request, problem in ((1, "item 2 was lost"), (2, "nothing was heard")):
                items = client.api("clock").stream("count", request, to=phalanx.Any, timeout=20)
                with pytest.raises(OutcomeUnknown, match=problem):
                    async for _ in items:
                        pass
            await until(lambda: len(cancelled) == 2)
    finally:
        await bus.close()


async def test_caller_that_is_gone_is_found_out(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that says nothing any more, as one that was killed: its generator is closed."""
    monkeypatch.setattr("phalanx.messaging.stream_out.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("phalanx.messaging.stream_out.LEASE_SECONDS", 0.5)
    async with active(nats_server, tmp_path) as (clock, _), asyncio.timeout(30):
        bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
        said = list[str]()
        try:
            inbox = bus.new_inbox()
            await bus.subscribe(inbox, lambda m: said.append(m.headers[wire.STREAM]), direct=True)
            headers = {wire.CALL: wire.call_header("c-1", 5, None, "me"), wire.STREAM: "5"}
            subject = NAMES.many_subject(NAMES.call_node_subject("clock", "n1", "wait"))
            bus.send(subject, b"", headers, reply=inbox)
            await until(lambda: clock.closed == ["wait"])
            await until(lambda: said[-1] == "1;end")
            assert said[:2] == ["0;alive", "1"]
            assert "1;alive" in said
        finally:
            await bus.close()


async def test_broken_connection_ends_a_stream_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    """Whoever waits for an item is told, and does not wait until something is found silent."""
    async with active(nats_server, tmp_path) as (_, api), asyncio.timeout(30):
        client = PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls)))
        async with client:
            items = client.api("clock").stream("wait", timeout=20)
            await anext(items)
            waiting = asyncio.create_task(anext(items))
            await asyncio.sleep(0)
            await client.bus._link.client.leave()
            with pytest.raises(OutcomeUnknown, match="connection broke"):
                await waiting
        assert await api.call("once", timeout=30) == 1


async def test_stream_inside_of_a_handler_ends_with_its_caller(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The deadline of a handler bounds the streams that it takes."""
    async with active(nats_server, tmp_path) as (clock, api), asyncio.timeout(30):
        with pytest.raises(CallTimeout):
            await api.call("nested", timeout=0.5)
        await until(lambda: clock.closed == ["wait"])


async def test_synchronous_stream(nats_server: NatsServer, tmp_path: Path) -> None:
    """A plain iterator; a break closes the generator."""

    def work() -> list[Tick]:
        with Platform.client("test", nats_server.urls) as client:
            api = client.api("clock")
            found = list(api.stream("count", 200, returns=Tick, timeout=30))
            for _ in api.stream("wait", timeout=30):
                break
            items = api.stream("fail", "own", timeout=30)
            assert next(items) == 1
            with pytest.raises(CallError, match="nothing left"):
                next(items)
            return found

    async with active(nats_server, tmp_path) as (clock, _), asyncio.timeout(60):
        assert await asyncio.to_thread(work) == [Tick(number, "n1") for number in range(200)]
        await until(lambda: "wait" in clock.closed)


async def test_g5_guest_takes_streams_of_what_it_may_call(tmp_path: Path) -> None:
    """Many answers come back across accounts, and so do grants and cancellations."""
    users = ["node", "viewer", "operator", "app-shop", "app-clock"]
    conf = permissions.render(
        "test",
        ["shop", "clock"],
        calls={"shop": ["clock"]},
        passwords={f"test-{user}": f"pw-test-{user}" for user in users},
    )
    with NatsServer(extra=conf, system_user=False) as server:
        login = NatsOptions(urls=tuple(server.urls), user="test-node", password=Secret("pw-test-node"))
        guest = NatsOptions(
            urls=tuple(server.urls), user="test-app-shop", password=Secret("pw-test-app-shop")
        )
        platform = Platform(
            "test", node="n1", nats=login, data_dir=str(tmp_path / "n1"), http={"enabled": False}
        )
        clock = Clock(platform.app("clock"))
        async with platform, PlatformClient("test", guest) as client, asyncio.timeout(60):
            await platform.wait_for_role("clock", Role.ACTIVE)
            api = client.api("clock")
            assert len([tick async for tick in api.stream("count", 300, timeout=30)]) == 300
            async with contextlib.aclosing(api.stream("wait", timeout=30)) as items:
                await anext(items)
            await until(lambda: clock.closed == ["count", "wait"])


async def test_nats_micro_names_the_subject_of_a_stream(nats_server: NatsServer, tmp_path: Path) -> None:
    """A foreign client finds where to ask for one."""
    async with active(nats_server, tmp_path):
        bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
        try:
            info = json.loads((await bus.request("$SRV.INFO.clock", timeout=10)).data)
        finally:
            await bus.close()
        subjects = {each["name"]: each["subject"] for each in info["endpoints"]}
        assert subjects["count"] == "test._.many.clock.leader.count"
        assert subjects["once"] == "test._.api.clock.leader.once"

"""Typed calls between apps: routes, errors, deadlines, overload, and what happens at a hand-over."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any as Value

import msgspec
import pytest
from nats.aio.client import Client
from tests.e2e.cli import Cli
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
    Leader,
    NatsOptions,
    Node,
    NoHandlers,
    NoInstance,
    NoLeader,
    OutcomeUnknown,
    Platform,
    Role,
    Secret,
    TooDeep,
    TooLarge,
    UnknownApp,
    UnknownMethod,
    WrongRoute,
    WrongType,
)
from phalanx.bus import permissions
from phalanx.bus.client import NatsClient
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.messaging import call_wire as wire
from phalanx.messaging.api import Api
from phalanx.messaging.content import MSGPACK
from phalanx.names import Names
from phalanx.ports import Message
from phalanx.testing.nats import NatsServer

NAMES = Names("test")


class Item(msgspec.Struct):
    name: str
    count: int = 1


class Order(msgspec.Struct):
    items: list[Item]


@dataclasses.dataclass
class Receipt:
    number: int
    node: str


class Orders:
    """An app with handlers of all kinds, on one node; what they have seen is in its fields."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.placed = list[str]()
        self.cancelled = list[str]()
        self.gate = asyncio.Event()
        self.deadlines = list[float]()

        @app.handle("place")
        async def place(order: Order, ctx: CallContext) -> Receipt:
            self.placed.append(ctx.caller)
            await ctx.kv.put("last", order.items[0].name)
            return Receipt(sum(item.count for item in order.items), ctx.node)

        @app.handle("wait")
        async def wait(seconds: float, ctx: CallContext) -> str:
            self.placed.append(ctx.call_id)
            self.deadlines.append(ctx.remaining_seconds)
            try:
                await asyncio.wait_for(self.gate.wait(), seconds)
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                self.cancelled.append(ctx.call_id)
                raise
            return ctx.node

        @app.handle("one-at-a-time", concurrency=1)
        async def one_at_a_time() -> int:
            await self.gate.wait()
            return 1

        @app.handle("fail")
        async def fail(how: str) -> None:
            match how:
                case "own":
                    raise CallError("sold-out", "nothing left", details={"item": 7})
                case "large":
                    return "x" * 2_000_000  # type: ignore[return-value]
                case "odd":
                    return object()  # type: ignore[return-value]
                case _:
                    raise RuntimeError("secret words")

        @app.handle("where", anywhere=True, idempotent=True)
        async def where(ctx: CallContext) -> str:
            return ctx.node

        @app.handle("echo")
        async def echo(value: Value) -> Value:
            return value


def platform_of(nats: NatsServer, tmp_path: Path, name: str) -> Platform:
    """A node in this process, without apps."""
    return Platform(
        "test",
        node=name,
        nats=nats.urls,
        data_dir=str(tmp_path / name),
        http={"enabled": False},
        timings={"ttl": 5},
    )


def barred_node(nats: NatsServer, tmp_path: Path) -> Platform:
    """A node n1 in this process with the app "orders", which never leads it."""
    platform = platform_of(nats, tmp_path, "n1")
    app = platform.app("orders")
    app.handle("echo")(_echo)

    @app.on_start
    async def barred() -> None:
        raise RuntimeError("so that nobody leads")

    return platform


@asynccontextmanager
async def node(nats: NatsServer, tmp_path: Path, name: str = "n1") -> AsyncIterator[tuple[Platform, Orders]]:
    """One node in this process with the app "orders", and "plain" that answers no calls."""
    platform = platform_of(nats, tmp_path, name)
    orders = Orders(platform.app("orders"))
    platform.app("plain")
    async with platform:
        yield platform, orders


def can_follow(orders: Orders, node: str) -> bool:
    """Whether *node* could take over, as far as that node knows."""
    return any(c.eligible and c.session.node == node for c in orders.app.candidates())


@asynccontextmanager
async def two_nodes(nats: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[dict[str, Orders], Api]]:
    """n1, which is active, and n2; and the calls of orders from a client."""
    async with AsyncExitStack() as stack:
        first, orders1 = await stack.enter_async_context(node(nats, tmp_path, "n1"))
        await first.wait_for_role("orders", Role.ACTIVE)
        second, orders2 = await stack.enter_async_context(node(nats, tmp_path, "n2"))
        await second.wait_for_role("orders", Role.STANDBY)
        await until(lambda: can_follow(orders1, "n2"))
        client = PlatformClient("test", NatsOptions(urls=tuple(nats.urls)))
        await stack.enter_async_context(client)
        yield {"n1": orders1, "n2": orders2}, client.api("orders")


async def test_typed_call_to_the_leader(nats_server: NatsServer, tmp_path: Path) -> None:
    """Structs and dataclasses go both ways, as JSON and as MessagePack, from another app's node."""
    async with node(nats_server, tmp_path) as (platform, orders):
        await platform.wait_for_role("orders", Role.ACTIVE)
        api = platform.api("orders")
        order = Order([Item("apple", 2), Item("pear")])
        assert await api.call("place", order, returns=Receipt, to=Leader, timeout=10) == Receipt(3, "n1")
        again = await api.call("place", order, returns=Receipt, content_type=MSGPACK)
        assert again == Receipt(3, "n1")
        assert orders.placed == ["n1", "n1"]
        entry = await orders.app.kv.get("last", str)
        assert entry is not None
        assert entry.value == "apple"


async def test_hand_over_loses_no_call(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A steady stream of calls that are not idempotent, through planned hand-overs back and forth."""
    # A machine that is too busy to answer for two seconds is not what this is about.
    monkeypatch.setattr("phalanx.messaging.serving.DRAIN_SECONDS", 30.0)
    monkeypatch.setattr("phalanx.messaging.calling.MOVED_SECONDS", 30.0)
    async with two_nodes(nats_server, tmp_path) as (orders, api):
        answered = list[str]()
        stop = asyncio.Event()

        async def stream() -> None:
            while not stop.is_set():
                answered.append(await api.call("wait", 0, returns=str, timeout=60))

        streams = [asyncio.create_task(stream()) for _ in range(4)]
        leader = "n1"
        for _ in range(4):
            other = "n2" if leader == "n1" else "n1"
            await until(lambda leader=leader: answered and answered[-1] == leader)
            await until(lambda leader=leader, other=other: can_follow(orders[leader], other))
            await orders[leader].app.step_down(to=other)
            leader = other
        await until(lambda: answered[-1] == leader)
        stop.set()
        await asyncio.gather(*streams)
        assert len(answered) == sum(len(each.placed) for each in orders.values())


async def test_leader_is_killed_hard_and_idempotent_calls_go_on(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The section is fenced under a call: interrupted for the one, made again elsewhere for the other."""
    async with two_nodes(nats_server, tmp_path) as (orders, api):
        unsafe = asyncio.create_task(api.call("wait", 30, timeout=30))
        safe = asyncio.create_task(api.call("wait", 30, timeout=30, idempotent=True, returns=str))
        await until(lambda: len(orders["n1"].placed) == 2)
        orders["n2"].gate.set()
        app = orders["n1"].app
        await app.fail_over(app.epoch, "test", "n2")
        with pytest.raises(OutcomeUnknown) as refused:
            await unsafe
        assert refused.value.started
        assert await safe == "n2"
        assert len(orders["n1"].cancelled) == 2


async def test_g1_calls_under_way_end_before_the_section_does(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that outlives its drain deadline is cancelled, and only then does the next one begin."""
    monkeypatch.setattr("phalanx.messaging.serving.DRAIN_SECONDS", 0.3)
    async with two_nodes(nats_server, tmp_path) as (orders, api):
        slow = asyncio.create_task(api.call("wait", 30, timeout=30))
        await until(lambda: orders["n1"].placed)
        handing_over = asyncio.create_task(orders["n1"].app.step_down(to="n2"))
        # It is not begun while the section stands down, and is answered by the next one.
        await until(lambda: orders["n1"].app.role is Role.STANDING_DOWN)
        orders["n2"].gate.set()
        assert await api.call("wait", 30, timeout=30, returns=str) == "n2"
        assert orders["n1"].cancelled
        with pytest.raises(OutcomeUnknown):
            await slow
        await handing_over


async def test_call_under_way_is_answered_at_a_planned_hand_over(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """What ends within the drain deadline is answered under its epoch, by the node that began it."""
    async with two_nodes(nats_server, tmp_path) as (orders, api):
        slow = asyncio.create_task(api.call("wait", 30, timeout=30, returns=str))
        await until(lambda: orders["n1"].placed)
        handing_over = asyncio.create_task(orders["n1"].app.step_down(to="n2"))
        await until(lambda: orders["n1"].app.role is Role.STANDING_DOWN)
        orders["n1"].gate.set()
        assert await slow == "n1"
        await handing_over


async def test_g2_answer_of_an_earlier_epoch_is_refused(nats_server: NatsServer, tmp_path: Path) -> None:
    """A deposed leader answers after a later reign was heard of: the caller does not take it."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))

    async def who(message: Message) -> None:
        await bus.publish(message.reply, msgspec.json.encode(wire.Leading("n9", 7)))

    async def late(message: Message) -> None:
        assert wire.CallHeader(message.headers[wire.CALL]).epoch == 7
        await bus.publish(message.reply, b'"done"', headers={wire.ANSWER: "n9;6"})

    try:
        await bus.subscribe(NAMES.call_who_subject("orders"), who)
        await bus.subscribe(NAMES.call_node_subject("orders", "n9"), late)
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            with pytest.raises(OutcomeUnknown, match="epoch 6"):
                await client.api("orders").call("place", timeout=10)
    finally:
        await bus.close()


async def test_wrong_input_is_a_typed_error(nats_server: NatsServer, tmp_path: Path) -> None:
    """Each says what is wrong, and the server side stays up."""
    async with node(nats_server, tmp_path) as (platform, _):
        await platform.wait_for_role("orders", Role.ACTIVE)
        await platform.wait_for_role("plain", Role.ACTIVE)
        api = platform.api("orders")
        with pytest.raises(WrongType) as wrong:
            await api.call("place", {"items": [{"name": "a"}, {"name": "b", "count": "two"}]}, timeout=10)
        assert (wrong.value.path, wrong.value.started) == ("$.items[1].count", False)
        assert "Expected `int`, got `str`" in str(wrong.value)
        with pytest.raises(UnknownMethod, match="it has: echo, fail"):
            await api.call("pay", timeout=10)
        with pytest.raises(UnknownApp, match="has no app nobody"):
            await platform.api("nobody").call("place", timeout=10)
        with pytest.raises(NoHandlers, match="declare some"):
            await platform.api("plain").call("place", timeout=10)
        with pytest.raises(WrongType, match="not of the type asked for") as answer:
            await api.call("where", returns=int, timeout=10)
        assert answer.value.started
        with pytest.raises(TooLarge, match="send a reference"):
            await api.call("echo", "x" * 2_000_000, timeout=10)
        deep: Value = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(TooDeep):
            await api.call("echo", deep, timeout=10)
        with pytest.raises(TooDeep):
            await raw(platform, "echo", b"[" * 100_000 + b"]" * 100_000)
        with pytest.raises(WrongType, match="content type"):
            await raw(platform, "echo", b"<a/>", {wire.CONTENT_TYPE: "text/xml"})
        with pytest.raises(WrongType, match="JSON is malformed"):
            await raw(platform, "echo", b"{,}")
        for wrong_argument in ({"timeout": 0}, {"to": "n1"}, {"content_type": "text/xml"}):
            with pytest.raises(ConfigError):
                await api.call("echo", **wrong_argument)  # type: ignore[arg-type]
        for wrong_method in ("", "a.b", "*", ">", "a b"):
            with pytest.raises(ConfigError):
                await api.call(wrong_method)
        for wrong_app in ("Orders", "a.b", "platform", ""):
            with pytest.raises(ConfigError):
                platform.api(wrong_app)
        assert await api.call("echo", {"ä": [1.5, None]}, timeout=10) == {"ä": [1.5, None]}


async def raw(platform: Platform, method: str, data: bytes, headers: dict[str, str] | None = None) -> Value:
    """A call as a client makes it that knows only NATS. Raises the CallError that it is answered with."""
    bus = await NatsBus.connect(platform.config.nats)  # type: ignore[arg-type]
    try:
        subject = NAMES.call_leader_subject("orders", method)
        answer = await bus.request(subject, data, headers=headers, timeout=10)
    finally:
        await bus.close()
    problem = wire.problem_of(answer.data, answer.headers)
    if problem is not None:
        assert answer.headers[wire.MICRO_CODE].isdigit()
        assert answer.headers[wire.MICRO_ERROR] == problem.message
        raise wire.error_of(problem, "orders", method)
    return json.loads(answer.data)


async def test_foreign_client_needs_no_headers(nats_server: NatsServer, tmp_path: Path) -> None:
    """A plain request with JSON on the leader's subject is answered with JSON."""
    async with node(nats_server, tmp_path) as (platform, _):
        await platform.wait_for_role("orders", Role.ACTIVE)
        answer = await raw(platform, "place", b'{"items": [{"name": "apple", "count": 4}]}')
        assert answer == {"number": 4, "node": "n1"}


async def test_failing_handler_tells_the_log_and_not_the_caller(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets a code; the traceback is in the log of the node, under the call's id."""
    async with node(nats_server, tmp_path) as (platform, _):
        await platform.wait_for_role("orders", Role.ACTIVE)
        api = platform.api("orders")
        with caplog.at_level(logging.ERROR, "phalanx.calls"), pytest.raises(HandlerFailed) as failed:
            await api.call("fail", "oops", timeout=10)
        assert "secret words" not in str(failed.value)
        assert "Traceback" not in str(failed.value)
        (record,) = (r for r in caplog.records if r.exc_info)
        call_id = record.getMessage().split("call ")[1].split(")")[0]
        assert call_id in str(failed.value)
        with pytest.raises(CallError) as own:
            await api.call("fail", "own", timeout=10)
        assert (own.value.code, own.value.details) == ("sold-out", {"item": 7})
        assert type(own.value) is CallError
        with pytest.raises(TooLarge, match="2000002 bytes"):
            await api.call("fail", "large", timeout=10)
        with pytest.raises(HandlerFailed, match="cannot be sent"):
            await api.call("fail", "odd", timeout=10)


async def test_overload_is_answered_busy_and_tried_again(nats_server: NatsServer, tmp_path: Path) -> None:
    """Beyond the handler's concurrency: Busy at the deadline, an answer if there is room before it."""
    async with node(nats_server, tmp_path) as (platform, orders):
        await platform.wait_for_role("orders", Role.ACTIVE)
        api = platform.api("orders")
        first = asyncio.create_task(api.call("one-at-a-time", timeout=30))
        await until(lambda: orders.app.handlers.by_name["one-at-a-time"].running)
        with pytest.raises(Busy, match="1 calls of one-at-a-time run on node n1") as busy:
            await api.call("one-at-a-time", timeout=0.2)
        assert not busy.value.started
        patient = asyncio.create_task(api.call("one-at-a-time", timeout=30))
        handler = orders.app.handlers.by_name["one-at-a-time"]
        errors = handler.errors
        await until(lambda: handler.errors > errors)
        orders.gate.set()
        assert (await first, await patient) == (1, 1)


async def test_deadline_and_cancellation_reach_the_handler(nats_server: NatsServer, tmp_path: Path) -> None:
    """The handler knows how long its caller waits, and ends when that does not wait any more."""
    async with node(nats_server, tmp_path) as (platform, orders):
        await platform.wait_for_role("orders", Role.ACTIVE)
        api = platform.api("orders")
        with pytest.raises(CallTimeout) as late:
            await api.call("wait", 30, timeout=0.3)
        assert late.value.started
        assert 0 < orders.deadlines[0] <= 0.3
        await until(lambda: len(orders.cancelled) == 1)
        call = asyncio.create_task(api.call("wait", 30, timeout=30))
        await until(lambda: len(orders.placed) == 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: len(orders.cancelled) == 2)


async def test_any_and_node_routes(nats_server: NatsServer, tmp_path: Path) -> None:
    """Methods declared for anywhere are answered by standbys too; all others only by the active one."""
    async with two_nodes(nats_server, tmp_path) as (_, api):
        assert await api.call("where", to=Node("n2"), returns=str, timeout=10) == "n2"
        found = {await api.call("where", to=phalanx.Any, returns=str, timeout=10) for _ in range(64)}
        assert found == {"n1", "n2"}
        assert await api.call("echo", 1, to=Node("n1"), timeout=10) == 1
        with pytest.raises(WrongRoute, match="to=Leader"):
            await api.call("echo", 1, to=Node("n2"), timeout=10)
        with pytest.raises(NoInstance, match="node n3 was not there"):
            await api.call("where", to=Node("n3"), timeout=0.2)


async def test_no_leader_within_the_deadline(nats_server: NatsServer, tmp_path: Path) -> None:
    """Nobody is active: the call waits, and says so when its time is over; it was not begun."""
    platform = barred_node(nats_server, tmp_path)
    async with platform:
        with pytest.raises(NoLeader, match="no node leads") as nobody:
            await platform.api("orders").call("echo", timeout=0.3)
        assert not nobody.value.started


async def test_unknown_apps_leave_nothing_behind(nats_server: NatsServer, tmp_path: Path) -> None:
    """Names that no app has, as a gateway is asked for, in several calls at once: nothing is followed on."""
    async with (
        node(nats_server, tmp_path),
        PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client,
    ):
        names = [f"no-such-{number}" for number in range(5)]
        calls = [client.api(name).call("echo", timeout=20) for name in names for _ in range(5)]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, UnknownApp)
        assert not client._calls()._views


async def test_call_that_is_cancelled_before_its_first_step_is_answered(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Call and cancellation come together: the caller is told, and nothing of the call is left."""
    async with node(nats_server, tmp_path) as (platform, orders):
        await platform.wait_for_role("orders", Role.ACTIVE)
        bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
        try:
            headers = {wire.CALL: wire.call_header("c-1", 60.0, None, "somebody")}
            subject = NAMES.call_node_subject("orders", "n1", "wait")
            asked = asyncio.create_task(bus.request(subject, b"60", headers=headers, timeout=30))
            await asyncio.sleep(0)
            bus.send(NAMES.call_cancel_subject("orders"), b"c-1")
            answer = await asked
            problem = wire.problem_of(answer.data, answer.headers)
            assert problem is not None
            assert problem.code == "interrupted"
        finally:
            await bus.close()
        assert all(handler.running == 0 for handler in orders.app.handlers.by_name.values())


async def test_closed_client_fails_its_calls_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    """One waits for a leader, one for a node that is not there, one for an answer: none to its deadline."""
    async with node(nats_server, tmp_path) as (platform, orders):
        await platform.wait_for_role("orders", Role.ACTIVE)
        client = PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls)))
        async with client, asyncio.timeout(30):
            api = client.api("orders")
            calls = [
                asyncio.create_task(api.call("where", to=Node("n7"), timeout=600)),
                asyncio.create_task(api.call("wait", 600, timeout=600)),
                asyncio.create_task(api.call("wait", 600, to=Node("n1"), timeout=600)),
            ]
            await until(lambda: len(orders.placed) == 2)
            await client._calls().close()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in answers] == [NoInstance, OutcomeUnknown, OutcomeUnknown]
            assert all("the client was closed" in str(each) for each in answers)
            await until(lambda: len(orders.cancelled) == 2)
            with pytest.raises(NoInstance, match="was closed"):
                await api.call("echo", timeout=600)


async def test_closed_client_does_not_wait_for_a_leader(nats_server: NatsServer, tmp_path: Path) -> None:
    """Nobody leads, and the client is closed: the call fails at once."""
    async with (
        barred_node(nats_server, tmp_path),
        PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client,
        asyncio.timeout(30),
    ):
        call = asyncio.create_task(client.api("orders").call("echo", timeout=600))
        await until(lambda: any(view.answered for view in client._calls()._views.values()))
        await client._calls().close()
        with pytest.raises(NoInstance, match="was closed"):
            await call


async def test_node_that_stops_sends_on_what_it_held(nats_server: NatsServer, tmp_path: Path) -> None:
    """A call waits for a reign that never begins here: when the node stops it is answered "moved"."""
    platform = barred_node(nats_server, tmp_path)
    async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:

        def ask(method: str) -> asyncio.Task[Message]:
            subject = client.names.call_node_subject("orders", "n1", method)
            headers = {wire.CALL: wire.call_header(method, 60.0, 1 << 40, "somebody")}
            return asyncio.create_task(client.bus.request(subject, b"1", headers=headers, timeout=60.0))

        async with platform:
            held = ask("echo")
            await ask("none")  # behind the other on the same subscription: so that one has come
            assert not held.done()
        async with asyncio.timeout(20):
            answer = await held
        problem = wire.problem_of(answer.data, answer.headers)
        assert problem is not None
        assert (problem.code, problem.started) == (wire.MOVED, False)


async def _echo(value: int) -> int:
    return value


async def test_handlers_are_checked_when_they_are_declared(tmp_path: Path) -> None:
    """What could not be called is refused with what would be right."""
    platform = Platform("test", node="n1", nats="nats://127.0.0.1:1", data_dir=str(tmp_path))
    app = platform.app("orders")
    app.handle("echo")(_echo)

    async def of_object(value: CallContext) -> None: ...

    async def many(a: int, b: int, c: int) -> None: ...

    wrong: list[tuple[str, Value, str]] = [
        ("echo", _echo, "already"),
        ("a.b", _echo, "no name of a method"),
        ("", _echo, "no name of a method"),
        ("sync", lambda value: value, "not an async function"),
        ("many", many, "other parameters"),
        ("object", of_object, "no type that can be sent"),
    ]
    for name, function, problem in wrong:
        with pytest.raises(ConfigError, match=problem):
            app.handle(name)(function)
    with pytest.raises(ConfigError, match="out of range"):
        app.handle("none", concurrency=0)(_echo)


async def test_nats_micro_shows_the_app(nats_server: NatsServer, tmp_path: Path) -> None:
    """PING, INFO and STATS as ADR-32 has them, for all services, for this one, for this instance."""
    async with node(nats_server, tmp_path) as (platform, _):
        await platform.wait_for_role("orders", Role.ACTIVE)
        with pytest.raises(HandlerFailed):
            await platform.api("orders").call("fail", "oops", timeout=10)
        bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
        try:
            (ping,) = [json.loads(m.data) for m in await bus.gather("$SRV.PING", timeout=10, most=1)]
            assert ping == {
                "type": "io.nats.micro.v1.ping_response",
                "name": "orders",
                "id": ping["id"],
                "version": ping["version"],
                "metadata": {"platform": "test", "node": "n1"},
            }
            info = json.loads((await bus.request("$SRV.INFO.orders", timeout=10)).data)
            subjects = {each["name"]: each["subject"] for each in info["endpoints"]}
            assert info["type"] == "io.nats.micro.v1.info_response"
            assert subjects["place"] == "test._.api.orders.leader.place"
            assert subjects["where"] == "test._.api.orders.any.where"
            stats = json.loads((await bus.request(f"$SRV.STATS.orders.{ping['id']}", timeout=10)).data)
            assert stats["type"] == "io.nats.micro.v1.stats_response"
            (fail,) = (each for each in stats["endpoints"] if each["name"] == "fail")
            assert (fail["num_requests"], fail["num_errors"]) == (1, 1)
            assert fail["processing_time"] >= fail["average_processing_time"] > 0
        finally:
            await bus.close()


async def test_synchronous_client(nats_server: NatsServer, tmp_path: Path) -> None:
    """A plain ``with`` in a thread without a loop; errors are raised there."""

    def work() -> Receipt:
        with Platform.client("test", nats_server.urls) as client:
            with pytest.raises(UnknownMethod):
                client.api("orders").call("pay", timeout=10)
            assert [view.node for view in client.run(client.client.nodes())] == ["n1"]
            return client.api("orders").call("place", Order([Item("x", 5)]), returns=Receipt, timeout=10)

    async with node(nats_server, tmp_path) as (platform, _):
        await platform.wait_for_role("orders", Role.ACTIVE)
        assert await asyncio.to_thread(work) == Receipt(5, "n1")


async def test_command_line(nats_server: NatsServer, tmp_path: Path) -> None:
    """``phalanx call`` prints the answer as JSON; what is wrong with the input ends with exit code 2."""
    cli = Cli(nats_server.url(), tmp_path, "test")
    async with node(nats_server, tmp_path) as (platform, _):
        await platform.wait_for_role("orders", Role.ACTIVE)
        out, _ = await cli.call("call", "orders", "place", '{"items": [{"name": "x", "count": 2}]}')
        assert json.loads(out) == {"number": 2, "node": "n1"}
        out, _ = await cli.call("call", "orders", "where", "--to", "any")
        assert json.loads(out) == "n1"
        out, _ = await cli.call("call", "orders", "where", "--to", "n1")
        assert json.loads(out) == "n1"
        assert "$.items" in await cli.refused("call", "orders", "place", '{"items": 1}')
        assert "it has: echo" in await cli.refused("call", "orders", "pay")
        assert "has no app nobody" in await cli.refused("call", "nobody", "pay")
        assert "write JSON" in await cli.refused("call", "orders", "place", "{,}")
        assert "--to" in await cli.refused("call", "orders", "place", "--to", "N 1")
        assert "--wait" in await cli.refused("call", "orders", "place", "--wait", "0")
        assert "sold-out" in await cli.refused("call", "orders", "fail", '"own"', code=1)
        assert "CALLER:APP" in await cli.refused("nats", "permissions", "--platform", "p", "--calls", "shop")
        text, _ = await cli.call(
            "nats", "permissions", "--platform", "p", "--app", "a", "--app", "b", "--calls", "a:b"
        )
        assert 'stream: { account: "p", subject: "p.b.watch.kv.election.leader" }' in text
        assert "was not there" in await cli.refused(
            "call", "orders", "where", "--to", "n7", "--wait", "0.3", code=1
        )


async def test_g5_app_user_calls_only_what_it_may(tmp_path: Path) -> None:
    """With the rendered permissions: shop may call orders, and follows its hand-overs; nothing of plain."""
    users = ["node", "viewer", "operator", "app-shop", "app-orders", "app-plain"]
    conf = permissions.render(
        "test",
        ["shop", "orders", "plain"],
        calls={"shop": ["orders"]},
        passwords={f"test-{user}": f"pw-test-{user}" for user in users},
    )
    with NatsServer(extra=conf, system_user=False) as server:
        login = NatsOptions(urls=tuple(server.urls), user="test-node", password=Secret("pw-test-node"))
        guest = NatsOptions(
            urls=tuple(server.urls), user="test-app-shop", password=Secret("pw-test-app-shop")
        )
        password = Secret("pw-test-operator")
        operator = NatsOptions(urls=tuple(server.urls), user="test-operator", password=password)
        platform = Platform(
            "test", node="n1", nats=login, data_dir=str(tmp_path / "n1"), http={"enabled": False}
        )
        orders = Orders(platform.app("orders"))
        platform.app("plain").handle("echo")(_echo)
        async with platform, PlatformClient("test", guest) as client:
            await platform.wait_for_role("orders", Role.ACTIVE)
            await platform.wait_for_role("plain", Role.ACTIVE)
            api = client.api("orders")
            assert await api.call("echo", 1, timeout=10) == 1
            assert await api.call("where", to=phalanx.Any, timeout=10) == "n1"
            call = asyncio.create_task(api.call("wait", 30, timeout=30))
            await until(lambda: orders.placed)
            call.cancel()
            await until(lambda: orders.cancelled)
            epoch = orders.app.epoch
            await orders.app.step_down()
            assert await api.call("echo", 2, timeout=20) == 2
            assert orders.app.epoch > epoch
            with pytest.raises(NoLeader):
                await client.api("plain").call("echo", 1, timeout=0.5)
            async with PlatformClient("test", operator) as by_hand:
                assert await by_hand.api("plain").call("echo", 1, timeout=20) == 1


def test_call_header_in_all_its_forms() -> None:
    """What is written is read again; what is missing or odd is what a client without headers gets."""
    full = wire.CallHeader(wire.call_header("c-1", 1.5, 412, "me;@host"))
    assert (full.call_id, full.timeout_seconds, full.epoch, full.caller) == ("c-1", 1.5, 412, "me;@host")
    assert wire.CallHeader(wire.call_header("c-1", 0.0, None, "")).timeout_seconds == 0.001
    for text in ("", ";", ";;;", ";-1", ";x;y;z", ";²", ";1e3;0x1"):
        odd = wire.CallHeader(text)
        assert (odd.call_id, odd.timeout_seconds, odd.epoch) == ("", wire.DEFAULT_TIMEOUT_SECONDS, None)
    assert len(wire.CallHeader("x" * 1000).call_id) == 64
    assert wire.CallHeader(";" + "9" * 5000).timeout_seconds == 86400
    assert wire.answered_by({wire.ANSWER: "n1;7"}) == ("n1", 7)
    assert wire.answered_by({}) == ("", 0)


def test_headers_are_read_as_nats_py_reads_them() -> None:
    """Our quicker reading of headers gives what that of nats-py gives."""
    for raw in (
        b"A: b\r\nC:d\r\n\r\n",
        b"A:\tb: c \r\n",
        b" A : b\r\nB B: c\r\nnothing\r\n",
        "A: ä\r\nÄ: b\r\n".encode(),
        b"A: \xff\xfe\r\n",
        b"A:\r\n",
    ):
        assert NatsClient._parse_header_lines(raw) == Client._parse_header_lines(raw), raw

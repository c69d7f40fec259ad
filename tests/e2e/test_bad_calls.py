"""What is wrong with a call is told by a typed error that says what to do, and the server side stays up."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pydantic
import pytest
from tests.waiting import until

from phalanx import (
    App,
    Busy,
    CallError,
    CallTimeout,
    ConfigError,
    HandlerFailed,
    NatsOptions,
    Node,
    NoHandlers,
    NoInstance,
    NoLeader,
    Platform,
    Role,
    TooDeep,
    TooLarge,
    UnknownApp,
    UnknownMethod,
    WrongType,
)
from phalanx.bus.connection import NatsBus
from phalanx.messaging import call_wire as wire
from phalanx.messaging.content import JSON, MSGPACK, ContentError, encode, shape_of
from phalanx.names import Names
from phalanx.testing.nats import NatsServer


class Item(pydantic.BaseModel):
    """A model with what JSON has no type for, an alias, a validator that fails in its own way."""

    model_config = pydantic.ConfigDict(strict=True)

    name: str = pydantic.Field(alias="itemName")
    count: Annotated[int, pydantic.Field(gt=0)] = 1
    at: datetime.datetime | None = None

    @pydantic.field_validator("name")
    @classmethod
    def not_odd(cls, name: str) -> str:
        if name == "odd":
            raise KeyError(name)
        return name


class Order(pydantic.BaseModel):
    items: list[Item]


class Envelope(msgspec.Struct):
    """A struct around a model."""

    orders: list[Order]
    reply_to: Order | None = None


@asynccontextmanager
async def node(nats: NatsServer, folder: Path) -> AsyncIterator[tuple[Platform, App]]:
    """A node n1 whose app orders has handlers of models, and plain none; both are active."""
    platform = Platform("test", node="n1", nats=nats.urls, data_dir=str(folder), http={"enabled": False})
    app = platform.app("orders")
    platform.app("plain")

    @app.handle("place")
    async def place(order: Order) -> Order:
        assert isinstance(order.items[0], Item)
        return order

    @app.handle("send", anywhere=True)
    async def send(envelope: Envelope) -> Envelope:
        return envelope

    @app.handle("echo")
    async def echo(value: Any) -> Any:
        return value

    @app.handle("fail")
    async def fail() -> None:
        raise RuntimeError("secret words")

    async with platform:
        for name in ("orders", "plain"):
            await platform.wait_for_role(name, Role.ACTIVE)
        yield platform, app


NOW = datetime.datetime(2026, 11, 26, 1, 2, 3, tzinfo=datetime.UTC)


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
async def test_pydantic_models_are_requests_and_answers(
    nats_server: NatsServer, tmp_path: Path, content_type: str
) -> None:
    """Strict ones, with times and aliases, alone and inside of a struct; they come back as they were."""
    async with node(nats_server, tmp_path) as (platform, _):
        api = platform.api("orders")
        order = Order(items=[Item(itemName="apple", count=2, at=NOW), Item(itemName="pear")])
        options: dict[str, Any] = {"timeout": 20, "content_type": content_type}
        assert await api.call("place", order, returns=Order, **options) == order
        envelope = Envelope([order], reply_to=order)
        assert await api.call("send", envelope, returns=Envelope, **options) == envelope
        wrong: dict[str, Any] = {"items": [{"itemName": "a"}, {"itemName": "b", "count": 0}]}
        with pytest.raises(WrongType, match="greater than 0") as refused:
            await api.call("place", wrong, **options)
        assert refused.value.path == "$.items[1].count"
        assert not refused.value.started
        with pytest.raises(WrongType, match="Field required") as refused:
            await api.call("send", {"orders": [wrong | {"items": [{}]}]}, **options)
        assert refused.value.path == "$.orders[0].items[0].itemName"
        with pytest.raises(WrongType, match="not of the type asked for") as refused:
            await api.call("echo", {"items": 1}, returns=Order, **options)
        assert (refused.value.path, refused.value.started) == ("$.items", True)


async def test_all_that_is_wrong_in_a_row_and_then_a_good_call(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Each has its class, its code and its remedy; afterwards the same handlers answer, nothing runs on."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    async with node(nats_server, tmp_path) as (platform, app):
        orders, plain, nobody = (platform.api(name) for name in ("orders", "plain", "nobody"))
        good: dict[str, Any] = {"items": [{"itemName": "apple"}]}
        wrong: list[tuple[Any, type[CallError], str, str]] = [
            (nobody.call("place", timeout=20), UnknownApp, "unknown-app", "phalanx status lists them"),
            (orders.call("pay", timeout=20), UnknownMethod, "unknown-method", "it has: echo, fail, place"),
            (plain.call("place", timeout=20), NoHandlers, "no-handlers", "declare some with @app.handle"),
            (orders.call("place", {"items": "x"}, timeout=20), WrongType, "wrong-type", r"at \$.items"),
            (orders.call("place", None, timeout=20), WrongType, "wrong-type", "the request: "),
            (orders.call("place", good | {"items": [{"itemName": "odd"}]}, timeout=20),
             WrongType, "wrong-type", "its type has failed on it .KeyError"),
            (orders.call("echo", object(), timeout=20), WrongType, "wrong-type", "cannot be sent"),
            (orders.call("echo", "x" * 2_000_000, timeout=20), TooLarge, "too-large", "send a reference"),
            (orders.call("echo", deep, timeout=20), TooDeep, "too-deep", "too deeply"),
            (orders.call("fail", timeout=20), HandlerFailed, "failed", "the log of node n1"),
            (orders.call("echo", to=Node("n9"), timeout=0.3), NoInstance, "no-instance", "node n9"),
        ]  # fmt: skip
        for call, kind, code, remedy in wrong:
            with pytest.raises(kind, match=remedy) as refused:
                await call
            assert refused.value.code == code
            assert refused.value.started == (code == "failed")
            assert "Traceback" not in str(refused.value)
            assert "secret" not in str(refused.value)
        await _send_junk(nats_server)
        for wrong_call in ({"timeout": -1}, {"to": "n1"}, {"content_type": "text/xml"}):
            with pytest.raises(ConfigError):
                await orders.call("echo", **wrong_call)  # type: ignore[arg-type]
        assert await orders.call("place", good, timeout=20) == {
            "items": [{"itemName": "apple", "count": 1, "at": None}]
        }
        assert await orders.call("echo", 1, timeout=20) == 1
        assert [handler.running for handler in app.handlers.by_name.values()] == [0, 0, 0, 0]


async def _send_junk(nats: NatsServer) -> None:
    """What no client of ours sends: each is answered with an error."""
    names = Names("test")
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats.urls)))
    junk: list[tuple[str, bytes, dict[str, str], str]] = [
        ("place", b"{,}", {}, "wrong-type"),
        ("place", b"\xff\xfe", {}, "wrong-type"),
        ("place", b"\xc1", {wire.CONTENT_TYPE: MSGPACK}, "wrong-type"),
        ("echo", b"[" * 200_000, {}, "too-deep"),
        ("echo", b"\x91" * 200_000, {wire.CONTENT_TYPE: MSGPACK}, "too-deep"),
        ("echo", b"<a/>", {wire.CONTENT_TYPE: "text/xml"}, "content-type"),
        ("echo", b"1" * 5000, {}, "wrong-type"),
        ("echo", b"1", {wire.CALL: ";;;;;;" + "x" * 300}, ""),
        ("echo", b"1", {wire.CALL: ";-5;9999999999999999999999;"}, "moved"),
        ("a" * 200, b"1", {}, "unknown-method"),
    ]
    try:
        for method, data, headers, code in junk:
            subject = names.call_leader_subject("orders", method)
            answer = await bus.request(subject, data, headers=headers, timeout=20)
            problem = wire.problem_of(answer.data, answer.headers)
            assert (problem.code if problem is not None else "") == code, (method, data[:20], problem)
    finally:
        await bus.close()


async def test_too_much_and_too_late(nats_server: NatsServer, tmp_path: Path) -> None:
    """No leader, no room, no answer within the deadline: three classes, not begun but for the last."""
    platform = Platform(
        "test", node="n1", nats=nats_server.urls, data_dir=str(tmp_path), http={"enabled": False}
    )
    app, barred = platform.app("orders"), platform.app("barred")

    @app.handle("wait", concurrency=1)
    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @barred.handle("place")
    async def place() -> None: ...

    @barred.on_start
    async def fail() -> None:
        raise RuntimeError("so that nobody leads")

    async with platform:
        await platform.wait_for_role("orders", Role.ACTIVE)
        with pytest.raises(NoLeader, match="no leader before the deadline") as nobody:
            await platform.api("barred").call("place", timeout=0.3)
        api = platform.api("orders")
        running = asyncio.create_task(api.call("wait", 60, timeout=60))
        await until(lambda: app.handlers.by_name["wait"].running == 1)
        with pytest.raises(Busy, match="1 calls of wait run on node n1") as busy:
            await api.call("wait", 0, timeout=0.3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        with pytest.raises(CallTimeout) as late:
            await api.call("wait", 60, timeout=1)
        assert [error.value.started for error in (nobody, busy, late)] == [False, False, True]
        await api.call("wait", 0, timeout=20)


class Unsendable: ...


class AroundUnsendable(msgspec.Struct):
    inside: dict[str, list[Unsendable]]


class Recursive(msgspec.Struct):
    again: list[Recursive]


@pytest.mark.parametrize("kind", [Unsendable, list[Unsendable], Unsendable | None, AroundUnsendable])
def test_type_that_cannot_be_sent_is_refused_wherever_it_is(kind: Any) -> None:
    """When the handler is declared, and not when the first message comes."""
    with pytest.raises(TypeError, match="Unsendable is no type that can be sent"):
        shape_of(kind)


def test_shapes_of_other_types() -> None:
    """What is recursive is looked at once; texts that are none of Unicode are no answer, and no crash."""
    assert shape_of(Recursive).decode(b'{"again": [{"again": []}]}', JSON) == Recursive([Recursive([])])
    with pytest.raises(ContentError):
        encode("\ud800", JSON)

"""Stubs of a Protocol, and an object that answers their calls: one type for both sides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import pytest
from tests.waiting import until

import phalanx
from phalanx import (
    CallError,
    ConfigError,
    Node,
    OutgoingCall,
    Platform,
    Role,
    UnknownMethod,
    WrongType,
    current_call,
    method,
    with_options,
)
from phalanx.messaging.middleware import Proceed
from phalanx.testing.nats import NatsServer


class Order(msgspec.Struct):
    item: str
    count: int = 1


class Receipt(msgspec.Struct):
    item: str
    total: int


@runtime_checkable
class Orders(Protocol):
    """What the app orders does."""

    async def place(self, order: Order) -> Receipt:
        """One parameter: it is the request."""
        ...

    async def search(self, item: str, *, limit: int = ..., tags: list[str] = ...) -> list[str]:
        """Several ones: a mapping."""
        ...

    @method("close-all", idempotent=True, timeout=30)
    async def close(self) -> None: ...

    @method(anywhere=True, to=lambda node: Node(node))
    async def where(self, node: str) -> str: ...

    def watch(self, item: str, *, most: int = ...) -> AsyncIterator[Receipt]:
        """A stream of answers."""
        ...


class OrdersSync(Protocol):
    """The same for clients without an event loop."""

    def place(self, order: Order) -> Receipt: ...
    def search(self, item: str, *, limit: int = ...) -> list[str]: ...
    def watch(self, item: str, *, most: int = ...) -> Iterator[Receipt]: ...


class Shop:
    """Implements Orders."""

    def __init__(self) -> None:
        self.closed = False
        self.watches = 0

    async def place(self, order: Order) -> Receipt:
        assert isinstance(order, Order)
        if not order.count:
            raise CallError("nothing-ordered", "the count is to be 1 or more", path="$.count")
        return Receipt(order.item, order.count)

    async def search(self, item: str, *, limit: int = 2, tags: list[str] | None = None) -> list[str]:
        return [f"{item}{number}" for number in range(limit)] + (tags or [])

    async def close(self) -> None:
        self.closed = current_call().active is not None

    async def where(self, node: str) -> str:
        return f"{node} {current_call().node}"

    async def watch(self, item: str, *, most: int = 1_000_000) -> AsyncIterator[Receipt]:
        self.watches += 1
        try:
            for number in range(most):
                yield Receipt(item, number)
        finally:
            self.watches -= 1


def declared(nats: NatsServer, folder: Path, shop: Orders) -> Platform:
    """A node n1 that does not run yet, whose app orders is answered by *shop*."""
    platform = Platform("test", node="n1", nats=nats.urls, data_dir=str(folder), http={"enabled": False})
    platform.app("orders").handle_all(shop, Orders)
    return platform


@asynccontextmanager
async def running(platform: Platform) -> AsyncIterator[None]:
    """Until it is left, the node runs, and its app is active."""
    async with platform:
        await platform.wait_for_role("orders", Role.ACTIVE)
        yield


async def test_one_protocol_types_both_sides(nats_server: NatsServer, tmp_path: Path) -> None:
    """Every kind of method, with the defaults of whoever answers, and the errors of both sides."""
    shop = Shop()
    platform = declared(nats_server, tmp_path, shop)
    async with running(platform):
        orders = platform.api("orders").stub(Orders, timeout=20)
        assert isinstance(orders, Orders)
        assert repr(orders) == "<stub of Orders, app orders>"
        assert orders.place.__doc__ == "One parameter: it is the request."
        assert await orders.place(Order("apple", 3)) == Receipt("apple", 3)
        assert await orders.place(order=Order("pear")) == Receipt("pear", 1)
        assert await orders.search("a") == ["a0", "a1"]
        assert await orders.search(item="a", limit=1, tags=["t"]) == ["a0", "t"]
        await orders.close()
        assert shop.closed
        assert await orders.where("n1") == "n1 n1"
        with pytest.raises(CallError, match=r"the count is to be 1 or more") as own:
            await orders.place(Order("apple", 0))
        assert own.value.path == "$.count"
        with pytest.raises(WrongType) as wrong:
            await orders.search("a", limit="many")  # type: ignore[arg-type]
        assert wrong.value.path == "$.limit"
        with pytest.raises(WrongType, match="missing required field `item`"):
            await platform.api("orders").call("search", {"limit": 1}, timeout=20)
        for wrong_arguments in ((), (Order("a"), 2)):
            with pytest.raises(TypeError):
                await orders.place(*wrong_arguments)  # type: ignore[arg-type,call-arg]
        with pytest.raises(TypeError, match="missing a required"):
            await orders.search(limit=1)  # type: ignore[call-arg]
        assert await platform.api("orders").call("search", {"item": "x"}, timeout=20) == ["x0", "x1"]


async def test_stream_of_a_stub(nats_server: NatsServer, tmp_path: Path) -> None:
    """Its items come one after the other; whoever stops early ends the generator on the other side."""
    shop = Shop()
    async with (
        running(declared(nats_server, tmp_path, shop)),
        Platform.client("test", nats_server.urls) as client,
    ):
        orders = client.api("orders").stub(Orders, timeout=20)
        assert [each.total async for each in orders.watch("a", most=3)] == [0, 1, 2]
        async with contextlib.aclosing(with_options(orders, timeout=30).watch("a")) as items:  # type: ignore[type-var]
            assert await anext(items) == Receipt("a", 0)
            assert shop.watches == 1
        await until(lambda: shop.watches == 0)
        with pytest.raises(TypeError):
            orders.watch()  # type: ignore[call-arg]


async def test_options_of_one_call_go_before_those_of_the_method_and_of_the_stub(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Where each option of a call comes from, as a middleware sees it; the stub stays as it was."""
    platform = declared(nats_server, tmp_path, Shop())
    seen = list[tuple[Any, ...]]()

    async def see(call: OutgoingCall, proceed: Proceed) -> Any:
        seen.append((call.method, str(call.to), call.timeout, call.idempotent, dict(call.headers)))
        return await proceed()

    async with running(platform):
        api = platform.api("orders").using(see)
        orders = api.stub(Orders, to=Node("n1"), timeout=20, headers={"A": "b"})
        await orders.place(Order("a"))
        await orders.close()
        await orders.where("n1")
        hurried = with_options(orders, timeout=15, headers={"C": "d"})
        await with_options(hurried, idempotent=False, to=phalanx.Leader).close()
        await hurried.place(Order("a"))
        await with_options(orders, to=phalanx.Leader).where("n2")
        await orders.place(Order("a"))
    assert seen == [
        ("place", "node n1", 20, None, {"A": "b"}),
        ("close-all", "node n1", 30, True, {"A": "b"}),
        ("where", "node n1", 20, None, {"A": "b"}),
        ("close-all", "leader", 15, False, {"C": "d"}),
        ("place", "node n1", 15, None, {"C": "d"}),
        ("where", "leader", 20, None, {"A": "b"}),
        ("place", "node n1", 20, None, {"A": "b"}),
    ]


async def test_synchronous_stub(nats_server: NatsServer, tmp_path: Path) -> None:
    """A Protocol with plain functions, for a client without an event loop; MessagePack as well."""

    def work() -> tuple[Receipt, list[str]]:
        with Platform.client("test", nats_server.urls) as client:
            orders = client.api("orders").stub(OrdersSync, timeout=20, content_type="application/msgpack")
            with pytest.raises(ConfigError, match=r"declare def place"):
                client.api("orders").stub(Orders)
            with pytest.raises(CallError, match="1 or more"):
                orders.place(Order("apple", 0))
            found = with_options(orders, timeout=30).search("a", limit=1)
            found += [each.item for each in orders.watch("b", most=2)]
            return orders.place(Order("apple", 3)), found

    async with running(declared(nats_server, tmp_path, Shop())):
        assert await asyncio.to_thread(work) == (Receipt("apple", 3), ["a0", "b", "b"])


class NoAnnotation(Protocol):
    async def place(self, order) -> None: ...  # type: ignore[no-untyped-def]


class NoReturn(Protocol):
    async def place(self, order: Order): ...  # type: ignore[no-untyped-def]


class Unsendable(Protocol):
    async def place(self, order: Platform) -> None: ...


class UnsendableAnswer(Protocol):
    async def place(self) -> Platform: ...


class Unknown(Protocol):
    async def place(self, order: Nowhere) -> None: ...  # type: ignore[name-defined] # noqa: F821


class AnyNumber(Protocol):
    async def place(self, *orders: Order) -> None: ...


class PositionalOnly(Protocol):
    async def place(self, a: int, /, b: int) -> None: ...


class WithDefault(Protocol):
    async def place(self, order: int = 1) -> None: ...


class WithContext(Protocol):
    async def place(self, order: Order, ctx: phalanx.CallContext) -> None: ...


class WithAttribute(Protocol):
    name: str

    async def place(self) -> None: ...


class WithProperty(Protocol):
    @property
    def name(self) -> str: ...


class OneName(Protocol):
    async def place(self) -> None: ...

    @method("place")
    async def put(self) -> None: ...


class Nothing(Protocol): ...


class NotAsync(Protocol):
    def place(self) -> None: ...


class AsyncStream(Protocol):
    async def watch(self) -> AsyncIterator[int]: ...


class StreamOfWhat(Protocol):
    def watch(self) -> AsyncIterator: ...  # type: ignore[type-arg]


class SyncStream(Protocol):
    def watch(self) -> Iterator[int]: ...


class WrongName(Protocol):
    @method("a.b")
    async def place(self) -> None: ...


class WrongTimeout(Protocol):
    @method(timeout=0)
    async def place(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (NoAnnotation, r"NoAnnotation.place.order = None: has no type; annotate it"),
        (NoReturn, r"NoReturn.place = None: says not what it returns; annotate it: ->"),
        (Unsendable, r"Unsendable.place.order = .*Platform is no type that can be sent; use a msgspec"),
        (UnsendableAnswer, r"UnsendableAnswer.place.return = .*no type that can be sent"),
        (Unknown, r"Unknown.place = .*types cannot be found \(name 'Nowhere'.*at the module's top"),
        (AnyNumber, r"AnyNumber.place.orders = .*name each of them"),
        (PositionalOnly, r"PositionalOnly.place.a = .*leave out the /"),
        (WithDefault, r"WithDefault.place.order = .*make it keyword-only"),
        (WithContext, r"WithContext.place.ctx = .*current_call"),
        (WithAttribute, r"WithAttribute.name = None: not a method; .*name it _name"),
        (WithProperty, r"WithProperty.name = .*not a method"),
        (OneName, r"OneName = 'place': .* have one name; .*@method"),
        (Nothing, r"has no methods"),
        (NotAsync, r"NotAsync.place = 'place': not async; declare async def place"),
        (AsyncStream, r"AsyncStream.watch = .*declare it without async"),
        (StreamOfWhat, r"StreamOfWhat.watch = .*say it: AsyncIterator\[Order\]"),
        (SyncStream, r"SyncStream.watch = .*let it give an AsyncIterator"),
        (WrongName, r"method = 'a.b': no name of a method"),
        (WrongTimeout, r"WrongTimeout.place.timeout = 0: out of range"),
        ({}, r"interface = {}: not a class"),
    ],
)
def test_what_could_not_be_called_is_refused_when_the_stub_is_made(kind: Any, problem: str) -> None:
    """The error names the method and its parameter, and says what would be right."""
    api = Platform("test", node="n1", nats="nats://127.0.0.1:1").api("orders")
    with pytest.raises(ConfigError, match=problem):
        api.stub(kind)


def test_wrong_options_are_refused_at_once() -> None:
    """Those of the stub and those of one call."""
    api = Platform("test", node="n1", nats="nats://127.0.0.1:1").api("orders")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"timeout": 0}, "timeout = 0: out of range"),
        ({"to": "n1"}, "to = 'n1': no route"),
        ({"content_type": "text/xml"}, "content_type = 'text/xml': not known"),
    ]
    for options, problem in wrong:
        with pytest.raises(ConfigError, match=f"stub.{problem}"):
            api.stub(Orders, **options)
        with pytest.raises(ConfigError, match=f"with_options.{problem}"):
            with_options(api.stub(Orders), **options)
    with pytest.raises(ConfigError, match="not a stub"):
        with_options(Shop(), timeout=1)


class Other:
    """Takes other arguments than Orders says."""

    place = close = where = Shop.place
    watch = Shop.watch

    async def search(self, item: str, *, limit: int) -> None: ...


class NotAsyncShop(Shop):
    def place(self, order: Order) -> Receipt: ...  # type: ignore[override,empty-body]


class NoGenerator(Shop):
    async def watch(self, item: str, *, most: int = 1) -> AsyncIterator[Receipt]: ...  # type: ignore[override]


class Marked:
    """Says itself which of its methods are called."""

    @method("add", concurrency=1)
    async def plus(self, a: int, b: int) -> int:
        return a + b

    async def not_called(self) -> None: ...


class MarkedToo(Marked):
    async def plus(self, a: int, b: int) -> int:
        return 2 * (a + b)


async def test_object_that_marks_its_methods(nats_server: NatsServer, tmp_path: Path) -> None:
    """Only what it marks is called, also in a class that is derived from it."""
    platform = Platform(
        "test", node="n1", nats=nats_server.urls, data_dir=str(tmp_path), http={"enabled": False}
    )
    app = platform.app("orders")
    app.handle_all(MarkedToo())
    assert app.handlers.by_name["add"].concurrency == 1
    async with running(platform):
        api = platform.api("orders")
        assert await api.call("add", {"a": 1, "b": 2}, timeout=20) == 6
        with pytest.raises(UnknownMethod, match="it has: add"):
            await api.call("not_called", timeout=20)


def test_wrong_implementation_is_refused_when_it_is_declared() -> None:
    """What has not the methods of the interface, or takes other arguments, or is a class."""
    app = Platform("test", node="n1", nats="nats://127.0.0.1:1").app("orders")
    wrong: list[tuple[Any, Any, str]] = [
        (Shop, Orders, r"handle_all\(Shop\(\)\)"),
        (object(), Orders, "has no place; implement async def place"),
        (Other(), Orders, "search takes other arguments than Orders.search"),
        (NoGenerator(), Orders, "watch is no async generator: it has to yield"),
        (NotAsyncShop(), Orders, "place is not async"),
        (Shop(), OrdersSync, "place is not async"),
        (Shop(), None, r"mark them with @method\(\)"),
    ]
    for implementation, interface, problem in wrong:
        with pytest.raises(ConfigError, match=problem):
            app.handle_all(implementation, interface)
    app.handle_all(Shop(), Orders)
    assert app.handlers.idempotent == ("close-all",)
    with pytest.raises(ConfigError, match="already"):
        app.handle_all(Shop(), Orders)


_TYPED = """
from typing import Protocol
from phalanx import Platform, with_options


class Orders(Protocol):
    async def place(self, order: int) -> str: ...


class Sync(Protocol):
    def place(self, order: int) -> str: ...


async def calls(platform: Platform) -> None:
    orders = platform.api("orders").stub(Orders, timeout=2)
    reveal_type(orders)
    reveal_type(await with_options(orders, timeout=1).place(1))
    await orders.place("x")
    with Platform.client("test", "nats://127.0.0.1:1") as client:
        reveal_type(client.api("orders").stub(Sync).place(1))
"""


def test_type_checker_sees_the_protocol(tmp_path: Path) -> None:
    """pyright knows the answers of a stub, and what it is given."""
    (tmp_path / "typed.py").write_text(_TYPED)
    source = str(Path(phalanx.__file__).parents[1])
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "extraPaths": [source]})
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyright",
            "--outputjson",
            "--pythonpath",
            sys.executable,
            "-p",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = [(each["severity"], each["message"]) for each in json.loads(done.stdout)["generalDiagnostics"]]
    assert [message for severity, message in said if severity == "information"] == [
        'Type of "orders" is "Orders"',
        'Type of "await with_options(orders, timeout=1).place(1)" is "str"',
        'Type of "client.api("orders").stub(Sync).place(1)" is "str"',
    ]
    (error,) = [message for severity, message in said if severity == "error"]
    assert error.startswith('Argument of type "Literal[\'x\']" cannot be assigned to parameter "order"')

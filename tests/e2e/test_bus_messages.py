"""What the bus does with messages that nobody expects, and with subscriptions that end while it breaks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing

import pytest
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.ports import Connection, Message
from phalanx.testing.nats import NatsServer


@asynccontextmanager
async def connected(server: NatsServer, ping_interval: float = 0.2) -> AsyncGenerator[NatsBus]:
    """A bus on *server*."""
    options = NatsOptions(urls=tuple(server.urls))
    bus = await NatsBus.connect(options, name="test", ping_interval=ping_interval, timeout=5.0)
    try:
        yield bus
    finally:
        await bus.close()


def raw(server: NatsServer, commands: bytes) -> None:
    """Send *commands* as no client of ours would; returns when the server has taken them."""
    with closing(socket.create_connection((server.address(), server.port()), 5)) as to:
        to.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n' + commands + b"PING\r\n")
        heard = b""
        while b"PONG" not in heard:
            heard += (more := to.recv(4096))
            assert more, heard


@pytest.mark.parametrize("direct", [True, False])
async def test_message_with_broken_headers_or_an_odd_subject_ends_nothing(
    nats_server: NatsServer, direct: bool
) -> None:
    """Anybody may send such: what follows is read, over the same connection."""
    taken = asyncio.Queue[str](100)
    events = list[Connection]()

    def take(message: Message) -> None:
        taken.put_nowait(message.subject)

    async with connected(nats_server, 10.0) as bus:
        bus.on_connection(events.append)
        await bus.subscribe("odd.>", take, direct=direct)
        assert await bus.gather("nobody", timeout=2.0) == []
        raw(
            nats_server,
            b"HPUB odd.block 3 3\r\nabc\r\n"
            b"HPUB odd.status 16 16\r\nNATS/1.0 \xff\xfe\xff\r\n\r\n\r\n"
            b"PUB odd.a\x0bb 1\r\nx\r\n"
            b"PUB odd.a\x0cb 1\r\nx\r\n"
            b"PUB odd.\xff 1\r\nx\r\n"
            b"PUB odd.last 1\r\nx\r\n",
        )
        async with asyncio.timeout(10):
            while await taken.get() != "odd.last":
                pass
        assert events == []


@pytest.mark.parametrize("direct", [True, False])
async def test_subscription_whose_drain_came_to_nothing_does_not_come_back(direct: bool) -> None:
    """Its member of the queue group would take messages that nobody answers."""
    taken = list[Message]()
    with NatsServer() as server:
        async with connected(server, 10.0) as bus, connected(server) as other:
            subscription = await bus.subscribe("work", taken.append, queue="workers", direct=direct)
            assert await bus.gather("nobody", timeout=5.0) == []
            server.freeze()
            await subscription.drain(0.2)
            server.thaw()
            changes = list[Connection]()
            bus.on_connection(changes.append)
            await bus.switch_server("a test")
            await until(lambda: Connection.CONNECTED in changes)
            assert await bus.gather("nobody", timeout=5.0) == []
            assert await other.gather("work", b"x", timeout=5.0) == []
            assert taken == []


async def test_drain_that_is_cancelled_leaves_no_subscription_behind(nats_server: NatsServer) -> None:
    """Whoever cancels it has no other way to end it."""
    taken = list[Message]()
    async with connected(nats_server, 10.0) as bus:
        subscription = await bus.subscribe("cancelled.work", taken.append, queue="workers", direct=True)
        draining = asyncio.create_task(subscription.drain(5.0))
        await asyncio.sleep(0)
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        assert await bus.gather("cancelled.work", b"x", timeout=0.5) == []
        await bus.switch_server("a test")
        await until(lambda: bus.is_connected)
        assert await bus.gather("cancelled.work", b"x", timeout=0.5) == []
        assert taken == []


async def test_answer_to_a_ping_that_nobody_waits_for_any_more_ends_nothing() -> None:
    """A server stood still for longer than a drain waits: its late PONG is read, and what follows."""
    events = list[Connection]()
    with NatsServer() as server:
        async with connected(server, 10.0) as bus:
            bus.on_connection(events.append)
            subscription = await bus.subscribe("work", lambda _: None, queue="workers", direct=True)
            server.freeze()
            await subscription.drain(0.2)
            server.thaw()
            assert await bus.gather("nobody", timeout=5.0) == []
            heard = asyncio.Event()
            await bus.subscribe("after", lambda _: heard.set(), direct=True)
            await bus.publish("after")
            async with asyncio.timeout(5):
                await heard.wait()
            assert events == []


async def test_stored_message_with_a_header_status_is_read_as_any_other(nats_server: NatsServer) -> None:
    """An application may name a header of its events so: it is no status of the server's."""
    async with connected(nats_server) as bus:
        await bus.api(
            "STREAM.CREATE.STATUS", {"name": "STATUS", "subjects": ["status.*"], "allow_direct": True}
        )
        for number, status in enumerate(("204", "503", "shipped", "")):
            await bus.write(f"status.{number}", b"x", headers={"Status": status} if status else None)
        read = await bus.read_log("STATUS", "status.*", timeout=10)
        assert [record.revision for record in read] == [1, 2, 3, 4]
        assert [record.headers.get("Status") for record in read] == ["204", "503", "shipped", None]

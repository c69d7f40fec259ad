"""The audit log on real NATS servers: order, outages, lost acknowledgements, crashes, reading, following."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import audit_config
from phalanx.config import NatsOptions
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry, AuditLog, follow_audit, read_audit
from phalanx.testing.faults import TcpProxy, Way
from phalanx.testing.nats import NatsCluster, NatsServer

NAMES = Names("prod")


@asynccontextmanager
async def connected(*urls: str) -> AsyncIterator[NatsBus]:
    """A bus that notices a dead connection soon."""
    bus = await NatsBus.connect(NatsOptions(urls=urls), name="test", ping_interval=0.3)
    try:
        yield bus
    finally:
        await bus.close()


async def create_stream(bus: NatsBus, replicas: int = 1) -> None:
    """The platform's audit stream."""
    await bus.api(f"STREAM.CREATE.{NAMES.audit_stream}", audit_config(NAMES, replicas=replicas))


async def stored(bus: NatsBus) -> int:
    """How many messages the audit stream holds, duplicates included."""
    return int((await bus.api(f"STREAM.INFO.{NAMES.audit_stream}", {}))["state"]["messages"])


@asynccontextmanager
async def running(log: AuditLog, bus: NatsBus) -> AsyncIterator[None]:
    """The log delivers, for the time of the block."""
    task = asyncio.create_task(log.run(bus))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    """A bus to a single server that has the audit stream."""
    async with connected(*nats_server.urls) as bus:
        await create_stream(bus)
        yield bus


def open_log(directory: Path, node: str = "n1") -> AuditLog:
    """The audit log of a node whose data directory is *directory*."""
    return AuditLog(NAMES, node, directory / "audit")


def note(log: AuditLog, *values: int) -> None:
    """Record test entries with these numbers."""
    for n in values:
        log.record("test", "one", n=n)


def numbers(entries: Sequence[AuditEntry]) -> list[int]:
    """The ``n`` of each entry."""
    return [int(entry.details["n"]) for entry in entries]


class Follower:
    """Collects what follow_audit yields, in a task of its own."""

    def __init__(self, bus: NatsBus, since: float | None = None) -> None:
        self.got: list[AuditEntry] = []
        self.task = asyncio.create_task(self._follow(bus, since))

    async def _follow(self, bus: NatsBus, since: float | None) -> None:
        async with aclosing(follow_audit(bus, NAMES, since=since)) as entries:
            async for entry in entries:
                self.got.append(entry)

    async def stop(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@asynccontextmanager
async def following(bus: NatsBus, since: float | None = None) -> AsyncIterator[Follower]:
    """A follower, for the time of the block."""
    follower = Follower(bus, since)
    try:
        yield follower
    finally:
        await follower.stop()


async def test_entries_arrive_in_order_with_all_their_fields(bus: NatsBus, tmp_path: Path) -> None:
    """What was recorded before and while delivering is in the stream, under its subject, as recorded."""
    log = open_log(tmp_path)
    note(log, *range(20))
    async with running(log, bus):
        log.record("app", "active", app="wiki", epoch=12, reason="elected", duration_seconds=0.25, hook="x")
        assert await log.flush(5)
    entries = await read_audit(bus, NAMES)
    assert numbers(entries[:-1]) == list(range(20))
    last = entries[-1]
    assert (last.name, last.app, last.epoch, last.reason) == ("app.active", "wiki", 12, "elected")
    assert (last.duration_seconds, last.details, last.node) == (0.25, {"hook": "x"}, "n1")
    record = await bus.read(NAMES.audit_stream, NAMES.audit_subject("app", "active"))
    assert record is not None
    assert record.headers["Nats-Msg-Id"] == last.id
    log.close()


async def test_entries_wait_on_disk_while_nats_is_away(
    bus: NatsBus, nats_server: NatsServer, tmp_path: Path
) -> None:
    """The server dies and returns: flush says what is not delivered, and then all arrives, in order, once."""
    log = open_log(tmp_path)
    async with running(log, bus):
        note(log, *range(5))
        assert await log.flush(5)
        nats_server.kill()
        note(log, *range(5, 50))
        assert not await log.flush(0.3)
        assert log.undelivered == 45
        nats_server.start()
        assert await log.flush(15)
    assert numbers(await read_audit(bus, NAMES)) == list(range(50))
    assert await stored(bus) == 50
    log.close()


async def test_lost_acknowledgement_doubles_nothing(nats_server: NatsServer, tmp_path: Path) -> None:
    """The server stores an entry, its answer is lost: the entry is sent again, and stored once."""
    async with (
        TcpProxy("127.0.0.1", nats_server.port()) as link,
        connected(link.url) as bus,
        connected(*nats_server.urls) as direct,
    ):
        await create_stream(direct)
        log = open_log(tmp_path)
        async with running(log, bus):
            link.black_hole(Way.DOWN)
            note(log, 0, 1)
            async with asyncio.timeout(5):
                while await stored(direct) < 1:  # noqa: ASYNC110 - the condition is in the server
                    await asyncio.sleep(0.01)
            assert log.undelivered == 2
            link.reset()
            link.heal()
            assert await log.flush(15)
        assert await stored(direct) == 2
        assert numbers(await read_audit(direct, NAMES)) == [0, 1]
        log.close()


_CHILD = """
import asyncio, sys
from pathlib import Path
from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.names import Names
from phalanx.observe.audit import AuditLog

async def main():
    bus = await NatsBus.connect(NatsOptions(urls=(sys.argv[1],)), name="child", ping_interval=1.0)
    log = AuditLog(Names("prod"), "n1", Path(sys.argv[2]) / "audit")
    task = asyncio.create_task(log.run(bus))
    n = int(sys.argv[3])
    while True:
        log.record("test", "one", n=n)
        print(n, flush=True)
        n += 1
        await asyncio.sleep(0)

asyncio.run(main())
"""


async def test_node_killed_again_and_again_loses_and_doubles_nothing(
    bus: NatsBus, nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGKILL in the midst of recording and delivering, three times: every entry is stored once, in order."""
    recorded = 0
    for _ in range(3):
        child = subprocess.Popen(  # noqa: ASYNC220 - takes a millisecond
            [sys.executable, "-c", _CHILD, nats_server.url(), str(tmp_path), str(recorded)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            assert child.stdout is not None
            for _ in range(150):
                await asyncio.to_thread(child.stdout.readline)
            child.kill()
            child.stdout.read()
        # What was recorded last may not have been printed: the spool is the truth.
        recorded = _last_recorded(tmp_path) + 1
    log = open_log(tmp_path)
    note(log, recorded)
    async with running(log, bus):
        assert await log.flush(15)
    entries = await read_audit(bus, NAMES, limit=100_000)
    assert numbers(entries) == list(range(recorded + 1))
    assert await stored(bus) == recorded + 1
    log.close()


def _last_recorded(directory: Path) -> int:
    last = sorted((directory / "audit").glob("*.jsonl"))[-1].read_text().splitlines()[-1]
    return int(msgspec.json.decode(last, type=AuditEntry).details["n"])


async def test_missing_stream_holds_delivery_up_until_it_is_there(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A stream that is not there yet costs patience, not entries."""
    async with connected(*nats_server.urls) as bus:
        log = open_log(tmp_path)
        note(log, 0, 1)
        async with running(log, bus):
            assert not await log.flush(0.5)
            await create_stream(bus)
            assert await log.flush(10)
        assert numbers(await read_audit(bus, NAMES)) == [0, 1]
        log.close()


async def test_reading_gives_the_newest_oldest_first(bus: NatsBus, tmp_path: Path) -> None:
    """limit counts from the end, since goes by the entries' own time; both together too."""
    log = open_log(tmp_path)
    async with running(log, bus):
        note(log, *range(400))
        assert await log.flush(10)
        await asyncio.sleep(0.01)
        middle = time.time()
        await asyncio.sleep(0.01)
        note(log, *range(400, 700))
        assert await log.flush(10)
    assert numbers(await read_audit(bus, NAMES, limit=3)) == [697, 698, 699]
    assert numbers(await read_audit(bus, NAMES, limit=10_000)) == list(range(700))
    assert numbers(await read_audit(bus, NAMES, since=middle, limit=10_000)) == list(range(400, 700))
    assert numbers(await read_audit(bus, NAMES, since=middle, limit=2)) == [698, 699]
    assert await read_audit(bus, NAMES, since=time.time() + 3600) == []
    log.close()


async def test_reading_an_empty_and_a_missing_log(nats_server: NatsServer) -> None:
    """No entries is an empty list; no stream is an error."""
    async with connected(*nats_server.urls) as bus:
        with pytest.raises(BusError):
            await read_audit(bus, NAMES)
        await create_stream(bus)
        assert await read_audit(bus, NAMES) == []
        assert await read_audit(bus, NAMES, since=0) == []


async def test_readers_drop_doubles_and_foreign_messages(bus: NatsBus, tmp_path: Path) -> None:
    """An entry stored twice after the server's duplicate window is read once; junk is passed over."""
    log = open_log(tmp_path)
    async with running(log, bus):
        note(log, 0, 1)
        assert await log.flush(5)
        subject = NAMES.audit_subject("test", "one")
        record = await bus.read(NAMES.audit_stream, subject)
        assert record is not None
        await bus.write(subject, record.data)
        await bus.write(subject, b"\xff no entry")
        note(log, 2)
        assert await log.flush(5)
    assert await stored(bus) == 5
    assert numbers(await read_audit(bus, NAMES)) == [0, 1, 2]
    async with following(bus, since=0) as follower:
        await until(lambda: len(follower.got) >= 3)
        assert numbers(follower.got) == [0, 1, 2]
    log.close()


async def first_seen(log: AuditLog, follower: Follower) -> int:
    """Record 1, 2, … until the follower has begun and caught up; the next number."""
    n = 1
    async with asyncio.timeout(10):
        while not follower.got or numbers(follower.got)[-1] < n - 1:
            if not follower.got:
                note(log, n)
                n += 1
            await asyncio.sleep(0.01)
    return n


async def test_following_shows_new_entries_at_once(bus: NatsBus, tmp_path: Path) -> None:
    """Without since only what comes from now on, each within a fraction of the polling interval."""
    log = open_log(tmp_path)
    async with running(log, bus):
        note(log, 0)
        assert await log.flush(5)
        async with following(bus) as follower:
            n = await first_seen(log, follower)
            began = time.monotonic()
            for each in range(n, n + 30):
                note(log, each)
                await until(lambda each=each: numbers(follower.got)[-1] == each)
            assert time.monotonic() - began < 30, "each was found by the polling, every 3 s"
        got = numbers(follower.got)
        assert got == list(range(got[0], n + 30))
        assert got[0] > 0
    log.close()


async def test_following_goes_on_after_a_restart_of_the_server(
    bus: NatsBus, nats_server: NatsServer, tmp_path: Path
) -> None:
    """Entries from before, during and after the outage come once and in order."""
    log = open_log(tmp_path)
    async with running(log, bus), following(bus, since=time.time() - 1) as follower:
        note(log, *range(10))
        await until(lambda: len(follower.got) == 10)
        nats_server.kill()
        note(log, *range(10, 20))
        nats_server.start()
        await until(lambda: len(follower.got) == 20)
        note(log, *range(20, 30))
        await until(lambda: len(follower.got) == 30)
        assert numbers(follower.got) == list(range(30))
    log.close()


async def test_following_finds_a_stream_that_was_made_anew(bus: NatsBus, tmp_path: Path) -> None:
    """After the stream was deleted and created again, its new entries are seen although numbers restart."""
    log = open_log(tmp_path)
    async with running(log, bus), following(bus, since=time.time() - 1) as follower:
        note(log, *range(10))
        await until(lambda: len(follower.got) == 10)
        await bus.api(f"STREAM.DELETE.{NAMES.audit_stream}", {})
        await create_stream(bus)
        note(log, 10, 11)
        await until(lambda: len(follower.got) == 12)
        assert numbers(follower.got) == list(range(12))
    log.close()


async def test_cluster_of_three_loses_each_server_in_turn(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """Two nodes record while servers are killed one after the other: all is stored and followed, once."""
    async with (
        connected(*nats_cluster.urls) as bus,
        connected(*reversed(nats_cluster.urls)) as other,
        following(bus, since=0) as follower,
    ):
        await create_stream(bus, replicas=3)
        logs = open_log(tmp_path / "1", "n1"), open_log(tmp_path / "2", "n2")
        async with running(logs[0], bus), running(logs[1], other):
            n = 0
            for server in range(3):
                nats_cluster.kill(server)
                for _ in range(20):
                    note(logs[n % 2], n)
                    n += 1
                    await asyncio.sleep(0.01)
                nats_cluster.start(server)
                await nats_cluster.ready()
                assert await logs[0].flush(30)
                assert await logs[1].flush(30)
        await until(lambda: len(follower.got) >= n)
        entries = await read_audit(bus, NAMES, limit=1000)
        for node, first in (("n1", 0), ("n2", 1)):
            assert numbers([e for e in entries if e.node == node]) == list(range(first, n, 2))
        assert [entry.id for entry in follower.got] == [entry.id for entry in entries]
        assert await stored(bus) == n
        for log in logs:
            log.close()

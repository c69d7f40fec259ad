"""The object store of an app on real servers; nats-py's own is the other side."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import secrets
import time
from collections.abc import AsyncIterator

import nats
import pytest
from nats.js.client import JetStreamContext
from nats.js.errors import ObjectNotFoundError
from tests.e2e.wal import APP, NAMES, connected, make_log

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.data import objects as objects_module
from phalanx.data.objects import ObjectInfo, ObjectStore
from phalanx.errors import BusError, DatabaseError
from phalanx.testing.nats import NatsCluster, NatsServer

BUCKET = NAMES.snapshots_bucket(APP)
STREAM = NAMES.object_stream(BUCKET)


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    async with connected(nats_server.url()) as bus:
        await make_log(bus)
        yield bus


@pytest.fixture
def store(bus: NatsBus) -> ObjectStore:
    return ObjectStore(bus, NAMES, APP)


@pytest.fixture
async def theirs(nats_server: NatsServer) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(nats_server.url())
    yield client.jetstream()
    await client.close()


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def content(store: ObjectStore, name: str) -> bytes:
    return b"".join([chunk async for chunk in store.get(name)])


async def messages(bus: NatsBus) -> int:
    return int((await bus.api(f"STREAM.INFO.{STREAM}", {}))["state"]["messages"])


@pytest.mark.parametrize("size", [0, 1, 262_143, 262_144, 262_145, 3_000_000])
async def test_what_is_put_can_be_read_by_any_client(
    store: ObjectStore, theirs: JetStreamContext, size: int
) -> None:
    """nats-py reads what was written here: content, size and digest."""
    data = secrets.token_bytes(size)
    info = await store.put("snap/1.lz4", pieces(data[: size // 3], data[size // 3 :]), {"txid": "7"})
    assert (info.name, info.size) == ("snap/1.lz4", size)
    assert await content(store, "snap/1.lz4") == data
    other = await theirs.object_store(BUCKET)
    found = await other.get("snap/1.lz4")
    assert (found.data or b"") == data
    assert (found.info.size, found.info.digest, found.info.chunks) == (size, info.digest, info.chunks)
    known = await store.info("snap/1.lz4")
    assert known is not None
    assert (known.metadata, known.digest, known.nuid) == ({"txid": "7"}, info.digest, info.nuid)
    assert abs(known.time - info.time) < 5


async def test_what_any_client_has_put_can_be_read(store: ObjectStore, theirs: JetStreamContext) -> None:
    """What nats-py wrote is read here, listed, replaced and deleted."""
    other = await theirs.object_store(BUCKET)
    data = secrets.token_bytes(1_000_000)
    await other.put("from elsewhere", io.BytesIO(data))
    assert await content(store, "from elsewhere") == data
    assert [info.name for info in await store.list_objects()] == ["from elsewhere"]
    await store.put("from elsewhere", pieces(b"mine"))
    assert (await other.get("from elsewhere")).data == b"mine"
    assert await store.delete("from elsewhere")
    assert not await store.delete("from elsewhere")
    assert await store.list_objects() == []
    with pytest.raises(ObjectNotFoundError):
        await other.get("from elsewhere")


async def test_replaced_object_leaves_nothing_behind(store: ObjectStore, bus: NatsBus) -> None:
    """Of an object that was replaced, or deleted, no chunk stays; a reader in between learns it."""
    await store.put("a", pieces(bytes(3_000_000)))
    reading = store.get("a", page_bytes=1)
    await anext(reading)
    await store.put("a", pieces(b"new"))
    assert await messages(bus) == 2
    with pytest.raises(DatabaseError, match="replaced or deleted"):
        await _drain(reading)
    await store.delete("a")
    assert await messages(bus) == 1
    with pytest.raises(DatabaseError, match="does not exist"):
        await content(store, "a")


async def _drain(reading: AsyncIterator[bytes]) -> None:
    async for _ in reading:
        pass


async def test_g8_writer_that_fails_leaves_the_old_object_and_no_chunks(
    store: ObjectStore, bus: NatsBus
) -> None:
    """A put whose source fails in the middle changes nothing, and cleans up."""

    async def breaking() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(300_000)
        raise OSError("the disk is gone")

    await store.put("a", pieces(b"old"))
    with pytest.raises(OSError, match="disk"):
        await store.put("a", breaking())
    assert await content(store, "a") == b"old"
    assert await messages(bus) == 2


async def test_g8_writer_that_is_cancelled_leaves_no_chunks(store: ObjectStore, bus: NatsBus) -> None:
    """A put that is cancelled while chunks are under way cleans up."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(300_000)
            await asyncio.sleep(0)

    task = asyncio.create_task(store.put("a", endless()))
    async with asyncio.timeout(10):
        while await messages(bus) < 30:
            pass
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await messages(bus) == 0
    assert await store.info("a") is None


async def test_sweep_removes_what_a_dead_writer_left(store: ObjectStore, bus: NatsBus) -> None:
    """Chunks without an object go once they are old; finished objects and fresh chunks stay."""
    await store.put("a", pieces(b"kept"))
    for nuid in ("dead1", "dead2"):
        await bus.write(NAMES.object_chunks(BUCKET, nuid), b"left")
    assert await store.sweep(60) == 0
    assert await messages(bus) == 4
    assert await store.sweep(0) == 2
    assert await content(store, "a") == b"kept"
    assert await messages(bus) == 2


@pytest.mark.parametrize("hours", [2, -2])
async def test_sweep_while_the_wall_clock_is_wrong_spares_a_put_under_way(
    store: ObjectStore, bus: NatsBus, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Only NATS's own time tells how old chunks are: a host hours ahead takes nothing that is in use."""
    await bus.write(NAMES.object_chunks(BUCKET, "dead"), b"left")
    wall = time.time
    monkeypatch.setattr(system, "wall", lambda: wall() + 3600 * hours)
    stored, swept = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(262_144)
        stored.set()
        await swept.wait()
        yield b"end"

    putting = asyncio.create_task(store.put("a", slowly()))
    await stored.wait()
    assert await ObjectStore(bus, NAMES, APP).sweep() == 0
    swept.set()
    await putting
    assert len(await content(store, "a")) == 20 * 262_144 + 3
    assert await store.sweep(-60) == 1  # and what is nobody's goes whatever this clock says


@pytest.mark.parametrize("late", [False, True])
async def test_put_whose_chunks_were_removed_fails_and_writes_no_entry(
    store: ObjectStore, bus: NatsBus, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Chunks are purged during a put, or between its last look and its entry: the old object stays."""
    await store.put("a", pieces(b"old"))
    other, check = ObjectStore(bus, NAMES, APP), ObjectStore._check_stored  # pyright: ignore[reportPrivateUsage]

    async def purged() -> AsyncIterator[bytes]:
        for number in range(40):
            if number == 30 and not late:
                assert await other.sweep(-60) == 1
            yield bytes(262_144)

    async def look_and_purge(self: ObjectStore, name: str, nuid: str, count: int) -> None:
        await check(self, name, nuid, count)
        if late:
            assert await other.sweep(-60) == 1

    monkeypatch.setattr(ObjectStore, "_check_stored", look_and_purge)
    with pytest.raises(BusError, match="of 40 chunks were there"):
        await store.put("a", purged())
    assert await content(store, "a") == b"old"
    assert await messages(bus) == 2


async def test_sweep_that_a_lagging_replica_answers_spares_a_finished_object(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of objects is behind: an object with old chunks that was finished just now stays."""
    await store.put("a", pieces(b"kept"))

    async def nothing(_: ObjectStore) -> list[ObjectInfo]:
        return []

    monkeypatch.setattr(ObjectStore, "list_objects", nothing)
    assert await store.sweep(-60) == 0
    assert await content(store, "a") == b"kept"


async def test_damaged_object_is_never_taken_for_right(
    store: ObjectStore, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest that is not that of the content, or chunks that are missing, are errors at the end."""
    info = await store.put("a", pieces(bytes(600_000)))
    entry = NAMES.object_entry(BUCKET, "a")
    record = await bus.read(STREAM, entry)
    assert record is not None
    wrong = record.data.replace(info.digest.encode(), info.digest.replace(info.digest[10], "-").encode())
    await bus.write(entry, wrong, headers={"Nats-Rollup": "sub"})
    with pytest.raises(DatabaseError, match="damaged"):
        await content(store, "a")
    monkeypatch.setattr(objects_module, "LAGGING_SECONDS", 0.2)
    await bus.write(entry, record.data, headers={"Nats-Rollup": "sub"})
    chunks = NAMES.object_chunks(BUCKET, info.nuid)
    await bus.api(f"STREAM.PURGE.{STREAM}", {"filter": chunks, "keep": 1})
    with pytest.raises(DatabaseError, match="missing"):
        await content(store, "a")
    await bus.write(entry, b"{", headers={"Nats-Rollup": "sub"})
    with pytest.raises(DatabaseError, match="entry"):
        await store.info("a")


async def test_put_fails_when_nats_goes_away(
    store: ObjectStore, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS is killed in the middle of a put: it fails in time, and the object that was there stays."""
    monkeypatch.setattr(objects_module, "CHUNK_SECONDS", 1.0)
    await store.put("a", pieces(b"old"))

    async def until_killed() -> AsyncIterator[bytes]:
        for number in range(100):
            if number == 20:
                nats_server.kill()
            yield bytes(300_000)

    with pytest.raises(BusError):
        await store.put("a", until_killed())
    nats_server.start()
    await nats_server.ready()
    async with connected(nats_server.url()) as bus:
        again = ObjectStore(bus, NAMES, APP)
        assert await content(again, "a") == b"old"
        assert await again.sweep(-1) == 1


async def test_large_object_on_three_servers_in_flat_memory(nats_cluster: NatsCluster) -> None:
    """300 MB go in and out through three replicas, and this process hardly grows."""
    size = 300
    block = os.urandom(1 << 20)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(size):
            yield block

    async with connected(*nats_cluster.urls) as bus:
        await make_log(bus, replicas=3)
        store = ObjectStore(bus, NAMES, APP)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await store.put("big", source())
        total = 0
        async for chunk in store.get("big"):
            total += len(chunk)
        assert total == size << 20
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        assert grown < 100

"""The app's KV on real servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.waiting import until

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.config import NatsOptions
from phalanx.coord.kv import AppKV, Entry, Removed
from phalanx.coord.kv_watch import MAX_WAITING, KVWatch
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    Fenced,
    KeyExists,
    RevisionCompacted,
    WrongRevision,
    WrongValue,
)
from phalanx.names import LEADER_KEY, Names
from phalanx.ports import Fence, Message, Record
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.netlab import NetLab

NAMES = Names("prod")
LEADER = NAMES.key_subject(NAMES.app_bucket("wiki"), LEADER_KEY)


class User(msgspec.Struct):
    name: str
    age: int = 0


@asynccontextmanager
async def connected(*urls: str, ping_interval: float = 1.0) -> AsyncGenerator[NatsBus]:
    """A bus that is closed at the end."""
    bus = await NatsBus.connect(NatsOptions(urls=urls), name="test", ping_interval=ping_interval)
    try:
        yield bus
    finally:
        await bus.close()


async def make_bucket(bus: NatsBus, app: str, replicas: int = 1) -> None:
    """The bucket of *app*, as a node makes it."""
    await create_stream(bus, bucket_config(NAMES, NAMES.app_bucket(app), app, history=5, replicas=replicas))


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    async with connected(nats_server.url()) as bus:
        await make_bucket(bus, "wiki")
        yield bus


@pytest.fixture
def kv(bus: NatsBus) -> AppKV:
    return AppKV(bus, NAMES, "wiki")


async def lead(bus: NatsBus, node: bytes = b"n1") -> Fence:
    """Write the leader key: a new epoch begins."""
    return Fence(LEADER, await bus.write(LEADER, node))


def fenced_kv(bus: NatsBus, fence: Fence) -> AppKV:
    return AppKV(bus, NAMES, "wiki", fence=lambda: fence, epoch=lambda: fence.revision)


class LosesReplies:
    """The real bus, but the reply of the next write is lost after the server has stored the message."""

    def __init__(self, bus: NatsBus, *, refused: bool = False) -> None:
        self._bus, self.lost, self._refused = bus, 0, refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def write(self, subject: str, data: bytes = b"", **options: Any) -> int:
        revision = await self._bus.write(subject, data, **options)
        if not self.lost:
            self.lost += 1
            if self._refused:
                raise WrongRevision(subject, 0, revision)
            raise BusTimeout(f"write {subject}", "the reply was lost")
        return revision


# --- plain


async def test_put_get_update_delete(kv: AppKV) -> None:
    """The life of one key: each write has a larger revision, a removed key reads as none."""
    first = await kv.put("users.1", User("Eva", 3))
    entry = await kv.get("users.1", User)
    assert entry is not None
    assert (entry.key, entry.value, entry.revision) == ("users.1", User("Eva", 3), first)
    assert abs(entry.time - system.wall()) < 60
    second = await kv.update("users.1", User("Eva", 4), first)
    assert second > first
    with pytest.raises(WrongRevision) as refused:
        await kv.update("users.1", User("Eva", 5), first)
    assert (refused.value.subject, refused.value.actual) == ("users.1", second)
    with pytest.raises(WrongRevision):
        await kv.delete("users.1", revision=first)
    await kv.delete("users.1", revision=second)
    assert await kv.get("users.1", User) is None
    assert await kv.value("users.1", User, User("nobody")) == User("nobody")


async def test_create_only_where_nothing_is(kv: AppKV) -> None:
    """Create is refused while the key is there, and works again after a delete and after a purge."""
    revision = await kv.create("k", "one")
    with pytest.raises(KeyExists) as refused:
        await kv.create("k", "two")
    assert refused.value.revision == revision
    await kv.delete("k")
    assert await kv.create("k", "three") > revision
    await kv.purge("k")
    assert await kv.create("k", "four") > revision
    assert await kv.value("k", str, "") == "four"


async def test_keys_and_history(kv: AppKV) -> None:
    """Keys lists what is present by prefix; history shows what was, removals too, and a purge forgets."""
    for key in ("a", "users.1", "users.2", "users.20", "usersx"):
        await kv.put(key, key)
    await kv.delete("users.1")
    assert await kv.keys() == ["a", "users.2", "users.20", "usersx"]
    assert await kv.keys("users.") == ["users.2", "users.20"]
    assert await kv.keys("users.2") == ["users.2", "users.20"]
    assert await kv.keys("users") == ["users.2", "users.20", "usersx"]
    assert await kv.keys("none.") == []
    await kv.put("users.1", "again")
    values = [
        change.value if isinstance(change, Entry) else None for change in await kv.history("users.1", str)
    ]
    assert values == ["users.1", None, "again"]
    await kv.purge("users.1")
    assert [change.removed for change in await kv.history("users.1")] == [True]
    assert await kv.history("never") == []


async def test_wrong_arguments_are_refused(bus: NatsBus, kv: AppKV) -> None:
    """Each wrong key, ttl, revision, pattern and size is refused before anything is sent."""
    for key in ("", "a..b", "a.*", "../x y", "a\r\n"):
        for call in (
            kv.put(key, 1),
            kv.get(key),
            kv.create(key, 1),
            kv.delete(key),
            kv.purge(key),
            kv.history(key),
        ):
            with pytest.raises(ConfigError):
                await call
    for ttl in (0, -1, 0.5, float("nan"), float("inf"), 1e12, True, "5"):
        with pytest.raises(ConfigError, match="ttl"):
            await kv.put("k", b"", ttl=ttl)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="revision"):
        await kv.update("k", b"", 0)
    with pytest.raises(ConfigError, match="pattern"):
        kv.watch("a*")
    with pytest.raises(ConfigError, match="prefix"):
        await kv.keys("a b.")
    with pytest.raises(WrongValue, match="max_payload"):
        await kv.put("k", b"x" * bus.max_payload)
    with pytest.raises(WrongValue, match="can't be stored"):
        await kv.put("k", object())
    assert await kv.keys() == []
    await kv.put("k", b"x" * (bus.max_payload - 512))


async def test_reading_with_the_wrong_type(kv: AppKV) -> None:
    """A value of another type is an error that names the key, not a wrong value."""
    await kv.put("k", "text")
    with pytest.raises(WrongValue, match="'k'"):
        await kv.get("k", int)


async def test_apps_do_not_see_each_other(bus: NatsBus, kv: AppKV) -> None:
    """G5: the same key in two apps is two keys, and the bucket's other keys are out of reach."""
    await make_bucket(bus, "shop")
    await lead(bus)
    shop = AppKV(bus, NAMES, "shop")
    await kv.put("k", "wiki")
    await shop.put("k", "shop")
    assert await kv.value("k", str, "") == "wiki"
    assert await shop.value("k", str, "") == "shop"
    assert await kv.keys() == ["k"]
    assert await kv.get(LEADER_KEY) is None


# --- time to live


async def test_ttl_expires_and_nothing_comes_back(bus: NatsBus, kv: AppKV) -> None:
    """A key with a TTL vanishes, is reported to watches, and no older value takes its place."""
    await kv.put("put", "older")
    await kv.put("put", "short", ttl=1)
    await kv.create("create", "short", ttl=1)
    revision = await kv.put("update", "older")
    await kv.update("update", "short", revision, ttl=1)
    async with kv.watch("", str) as changes:
        removed: set[str] = set()
        async with asyncio.timeout(8):
            async for change in changes:
                if change.removed:
                    removed.add(change.key)
                if removed == {"put", "create", "update"}:
                    break
    assert await kv.keys() == []
    assert await kv.get("put") is None
    assert await kv.create("put", "new") > revision


async def test_fenced_ttl(bus: NatsBus) -> None:
    """Under a fence a TTL works in all writes too."""
    kv = fenced_kv(bus, await lead(bus))
    await kv.put("put", "older")
    await kv.put("put", "short", ttl=1)
    await kv.create("create", "short", ttl=1)
    revision = await kv.put("update", "older")
    await kv.update("update", "short", revision, ttl=1)
    assert len(await kv.keys()) == 3

    async def gone() -> bool:
        return not await kv.keys()

    await until(gone)


async def test_put_without_ttl_stays(kv: AppKV) -> None:
    """A later put takes the TTL away: the key outlives the first one's time."""
    await kv.put("marker", b"", ttl=1)
    await kv.put("k", "short", ttl=1)
    await kv.put("k", "stays")

    async def marker_gone() -> bool:
        return await kv.get("marker") is None

    await until(marker_gone)
    assert await kv.value("k", str, "") == "stays"


# --- fencing


async def test_fenced_writes_are_refused_by_the_server(bus: NatsBus) -> None:
    """G2: once the leader key has changed, no kind of write of the old epoch gets through."""
    fence = await lead(bus)
    old = fenced_kv(bus, fence)
    revision = await old.put("k", "old")
    revision = await old.update("k", "old2", revision)
    await old.create("c", "old")
    await old.put("gone", "old")
    await old.delete("gone", revision=(await old.history("gone"))[-1].revision)
    await old.purge("c")
    await lead(bus, b"n2")
    for call in (
        old.put("k", "late"),
        old.put("k", "late", ttl=5),
        old.update("k", "late", revision),
        old.create("new", "late"),
        old.create("k", "late"),
        old.delete("k"),
        old.delete("k", revision=revision),
        old.purge("k"),
    ):
        with pytest.raises(Fenced) as refused:
            await call
        assert (refused.value.app, refused.value.epoch) == ("wiki", fence.revision)
    assert await old.keys() == ["k"]
    assert await old.value("k", str, "") == "old2"


async def test_fenced_conflicts_are_told_apart(bus: NatsBus) -> None:
    """Under a valid fence a conflict on the key itself is KeyExists or WrongRevision, not Fenced."""
    kv = fenced_kv(bus, await lead(bus))
    revision = await kv.create("k", 1)
    with pytest.raises(KeyExists):
        await kv.create("k", 2)
    await kv.put("k", 2)
    with pytest.raises(WrongRevision) as refused:
        await kv.update("k", 3, revision)
    assert refused.value.subject == "k"


async def test_many_fenced_writers_on_a_cluster(nats_cluster: NatsCluster) -> None:
    """Writes under one fence at the same time, on three replicas, all succeed: collisions are no Fenced."""
    await nats_cluster.ready()
    async with connected(*nats_cluster.urls) as bus:
        await make_bucket(bus, "wiki", replicas=3)
        kv = fenced_kv(bus, await lead(bus))

        async def work(i: int) -> None:
            for n in range(10):
                await kv.put(f"k{i}", n)
                await kv.create(f"c{i}.{n}", n)

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for i in range(10):
                tasks.create_task(work(i))
        assert await kv.value("k9", int, -1) == 9


async def test_put_is_seen_by_a_get_anywhere(nats_cluster: NatsCluster) -> None:
    """What one node has put, a get through any other server sees at once."""
    await nats_cluster.ready()
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connected(url)) for url in nats_cluster.urls]
        await make_bucket(buses[0], "wiki", replicas=3)
        kvs = [AppKV(bus, NAMES, "wiki") for bus in buses]
        await until(lambda: kv_works(kvs[0]))
        for n in range(100):
            await kvs[n % 3].put("k", n)
            assert await kvs[(n + 1) % 3].value("k", int, -1) == n


# --- lost replies


@pytest.mark.parametrize("refused", [False, True], ids=["timeout", "spurious-refusal"])
async def test_lost_reply_is_found_again(bus: NatsBus, refused: bool) -> None:
    """A create and an update whose reply was lost succeed, with the revision that was stored."""
    lossy: Any = LosesReplies(bus, refused=refused)
    revision = await AppKV(lossy, NAMES, "wiki").create("k", 1)
    assert lossy.lost == 1
    lossy = LosesReplies(bus, refused=refused)
    second = await AppKV(lossy, NAMES, "wiki").update("k", 2, revision)
    assert second == revision + 1
    assert await AppKV(bus, NAMES, "wiki").value("k", int, 0) == 2


async def test_unknown_outcome_is_said(nats_server: NatsServer) -> None:
    """A server that hangs: the write ends with BusTimeout in bounded time."""
    async with connected(nats_server.url()) as bus:
        await make_bucket(bus, "wiki")
        kv = AppKV(bus, NAMES, "wiki")
        nats_server.freeze()
        stat = Path(f"/proc/{nats_server.pid()}/stat")
        try:
            await until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
            async with asyncio.timeout(10):
                with pytest.raises(BusTimeout):
                    await kv.create("k", 1)
        finally:
            nats_server.thaw()


# --- counting by compare-and-set


async def test_concurrent_updates_lose_nothing(bus: NatsBus, kv: AppKV) -> None:
    """Tasks that count by update, each trying again when refused, end at the exact sum."""
    await kv.create("n", 0)

    async def count() -> None:
        done = 0
        while done < 20:
            entry = await kv.get("n", int)
            assert entry is not None
            try:
                await kv.update("n", entry.value + 1, entry.revision)
            except WrongRevision:
                continue
            done += 1

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(count())
    assert await kv.value("n", int, 0) == 100


# --- watching


async def next_of(changes: KVWatch[Any], seconds: float = 10.0) -> Entry[Any] | Removed:
    async with asyncio.timeout(seconds):
        return await anext(changes)


async def test_watch_state_then_changes(kv: AppKV) -> None:
    """A watch gives the present state, then each change in order, of the keys that match."""
    await kv.put("users.1", "a")
    await kv.put("other", "x")
    async with kv.watch("users.>", str) as changes:
        first = await next_of(changes)
        assert (first.key, first.removed) == ("users.1", False)
        await kv.put("users.2", "b")
        await kv.put("other", "y")
        await kv.delete("users.1")
        second, third = await next_of(changes), await next_of(changes)
        assert isinstance(second, Entry)
        assert (second.key, second.value) == ("users.2", "b")
        assert abs(second.time - system.wall()) < 60
        assert isinstance(third, Removed)
        assert third.key == "users.1"


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        ("a.b", ["a.b"]),
        ("a.*", ["a.b", "a.c"]),
        ("*.b", ["a.b"]),
        ("", ["a.b", "a.c", "x"]),
        ("*.>", ["a.b", "a.c"]),
    ],
)
async def test_watch_patterns(kv: AppKV, pattern: str, seen: list[str]) -> None:
    """Patterns select the same keys in the state and in later changes."""
    for key in ("a.b", "a.c", "x"):
        await kv.put(key, 1)
    async with kv.watch(pattern, int) as changes:
        assert [(await next_of(changes)).key for _ in seen] == seen
        for key in ("a.b", "a.c", "x"):
            await kv.put(key, 2)
        assert [(await next_of(changes)).key for _ in seen] == seen


async def test_watch_slow_consumer_gets_the_newest(kv: AppKV) -> None:
    """A consumer that is far behind gets the newest value of each key; what waits is bounded."""
    async with kv.watch("", int) as changes:
        for n in range(MAX_WAITING + 500):
            await kv.put(f"k{n % 3}", n)
        await kv.put("last", -1)
        seen: dict[str, int] = {}
        got = 0
        while "last" not in seen:
            change = await next_of(changes)
            assert isinstance(change, Entry)
            assert change.value > seen.get(change.key, -2)
            seen[change.key] = change.value
            got += 1
    assert sorted(v for k, v in seen.items() if k != "last") == [MAX_WAITING + 497 + n for n in range(3)]
    assert got < MAX_WAITING


async def test_watch_goes_on_after_a_wrong_value(kv: AppKV) -> None:
    """A value of the wrong type is an error of that step only."""
    await kv.put("a", "text")
    async with kv.watch("", int) as changes:
        with pytest.raises(WrongValue, match="'a'"):
            await next_of(changes)
        await kv.put("b", 1)
        assert (await next_of(changes)).key == "b"


async def test_watch_ends_with_close_and_needs_async_with(kv: AppKV) -> None:
    """Closing from elsewhere ends the iteration; iterating without async with says how it is used."""
    with pytest.raises(RuntimeError, match="async with"):
        async for _ in kv.watch():
            pass
    async with kv.watch() as changes:
        asyncio.get_running_loop().call_later(
            0.05, lambda: tasks.append(asyncio.create_task(changes.close()))
        )
        tasks: list[asyncio.Task[None]] = []
        async with asyncio.timeout(5):
            assert [change async for change in changes] == []
        await asyncio.gather(*tasks)


async def test_watch_through_a_server_restart(nats_server: NatsServer) -> None:
    """A watch goes on when the server was killed and came back, with what others changed meanwhile."""
    async with connected(nats_server.url()) as bus:
        await make_bucket(bus, "wiki")
        kv = AppKV(bus, NAMES, "wiki")
        await kv.put("a", 1)
        async with kv.watch("", int) as changes:
            assert (await next_of(changes)).key == "a"
            nats_server.kill()
            await until(lambda: not bus.is_connected)
            nats_server.start()
            async with connected(nats_server.url()) as other:
                await AppKV(other, NAMES, "wiki").put("b", 2)
            assert (await next_of(changes)).key == "b"
            await until(lambda: bus.is_connected)
            await kv.put("a", 3)
            change = await next_of(changes)
            assert isinstance(change, Entry)
            assert (change.key, change.value) == ("a", 3)


async def test_node_with_its_own_fence_callable(bus: NatsBus) -> None:
    """The fence is asked for at each write, so one AppKV may follow a changing epoch."""
    fences: Mapping[str, Fence] | dict[str, Fence] = {"now": await lead(bus)}
    kv = AppKV(bus, NAMES, "wiki", fence=lambda: fences["now"])
    await kv.put("k", 1)
    later = await lead(bus)
    with pytest.raises(Fenced):
        await kv.put("k", 2)
    fences = {"now": later}
    await kv.put("k", 3)


# --- many at once


async def test_many_keys_at_once(kv: AppKV) -> None:
    """What put_many stores get_many gives back, with each key's revision; delete_many removes it."""
    await kv.put("other", "x")
    revisions = await kv.put_many({f"k{n}": n for n in range(1000)})
    assert sorted(revisions.values()) == list(revisions.values())
    found = await kv.get_many([*revisions, "k0"], int)
    assert {key: entry.value for key, entry in found.items()} == {f"k{n}": n for n in range(1000)}
    assert {key: entry.revision for key, entry in found.items()} == revisions
    assert (await kv.get_many(["k7", "k7", "none"], int, linearizable=True)).keys() == {"k7"}
    assert (await kv.get_many(["k7", "none"], int)).keys() == {"k7"}
    await kv.delete_many(revisions)
    await kv.delete_many(["never"])
    assert await kv.keys() == ["other"]
    assert await kv.get_many(revisions) == {}
    assert [change.removed for change in await kv.history("k5")] == [False, True]
    assert (await kv.put_many({}), await kv.get_many([]), await kv.delete_many([])) == ({}, {}, None)


async def test_revisions_of_batches_side_by_side(nats_cluster: NatsCluster) -> None:
    """Many batches at the same time, more than the server takes, all succeed, each with its own revisions."""
    await nats_cluster.ready()
    async with connected(*nats_cluster.urls) as bus:
        await make_bucket(bus, "wiki", replicas=3)
        kv = AppKV(bus, NAMES, "wiki")
        await until(lambda: kv_works(kv))
        async with asyncio.timeout(60):
            written = await asyncio.gather(
                *(kv.put_many({f"b{b}.{n}": n for n in range(5)}) for b in range(70))
            )
        for revisions in written:
            found = await kv.get_many(revisions, int, linearizable=True)
            assert {key: entry.revision for key, entry in found.items()} == revisions


async def test_too_much_at_once_is_refused_before_anything_is_sent(bus: NatsBus, kv: AppKV) -> None:
    """More than 1000 keys, a wrong key, a value that is too large, one key for many: nothing is stored."""
    for call in (
        kv.put_many({f"k{n}": n for n in range(1001)}),
        kv.put_many({"a": 1, "b c": 2}),
        kv.put_many({"a": 1}, ttl=0),
        kv.delete_many([f"k{n}" for n in range(1001)]),
        kv.delete_many("abc"),
        kv.get_many([f"k{n}" for n in range(1001)]),
    ):
        with pytest.raises(ConfigError):
            await call
    with pytest.raises(WrongValue, match="'b'"):
        await kv.put_many({"a": 1, "b": b"x" * bus.max_payload})
    assert await kv.keys() == []


async def test_fenced_batch_of_an_old_epoch_is_refused_whole(bus: NatsBus, kv: AppKV) -> None:
    """G2: a batch under an old epoch stores none of its keys, and deletes none; under the present one all."""
    old = fenced_kv(bus, await lead(bus))
    assert (await old.put_many({"a": 1, "b": 1}, ttl=60)).keys() == {"a", "b"}
    await lead(bus, b"n2")
    for call in (old.put_many({"a": 2, "c": 2}), old.put_many({"c": 2}), old.delete_many(["a", "b"])):
        with pytest.raises(Fenced):
            await call
    assert {key: e.value for key, e in (await kv.get_many(["a", "b", "c"], int)).items()} == {"a": 1, "b": 1}


async def test_epoch_that_ends_during_a_batch_stops_all_of_it(bus: NatsBus, kv: AppKV) -> None:
    """G2: another epoch begins between the first message of a batch and its last: nothing of it is stored."""
    old = fenced_kv(bus, await lead(bus))
    sent = 0
    opened: Any = bus
    plain = opened._send_in_batch

    async def interrupted(*args: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            await lead(bus, b"n2")
        await plain(*args)

    opened._send_in_batch = interrupted
    with pytest.raises(Fenced):
        await old.put_many({f"k{n}": n for n in range(10)})
    assert await kv.keys() == []


async def test_batch_whose_writer_vanishes_stores_nothing(nats_server: NatsServer) -> None:
    """The server dies, or a message is lost, in the middle of a batch: BusUnavailable, nothing is stored."""
    async with connected(nats_server.url()) as bus:
        await make_bucket(bus, "wiki")
        kv = AppKV(bus, NAMES, "wiki")
        opened: Any = bus
        plain = opened._send_in_batch
        sent = 0

        async def loses_one(*args: Any) -> None:
            nonlocal sent
            sent += 1
            if sent != 3:
                await plain(*args)

        async def kills(*args: Any) -> None:
            nats_server.kill()
            await until(lambda: not bus.is_connected)
            await plain(*args)

        nats_server.freeze()
        with pytest.raises(BusUnavailable, match="middle of the batch"):
            await kv.put_many({f"k{n}": n for n in range(10)})
        nats_server.thaw()
        for broken in (loses_one, kills):
            opened._send_in_batch = broken
            with pytest.raises(BusUnavailable):
                await kv.put_many({f"k{n}": n for n in range(10)})
        nats_server.start()
        await until(lambda: bus.is_connected)
        assert await kv.keys() == []


async def test_batch_is_seen_wholly_or_not_at_all(nats_cluster: NatsCluster) -> None:
    """While two keys are always put together, get_many never sees them differ, lately or now."""
    await nats_cluster.ready()
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connected(url)) for url in nats_cluster.urls]
        await make_bucket(buses[0], "wiki", replicas=3)
        kvs = [AppKV(bus, NAMES, "wiki") for bus in buses]
        await until(lambda: kv_works(kvs[0]))
        await kvs[0].put_many({"a": 0, "b": 0})
        done = 0

        async def write() -> None:
            nonlocal done
            for n in range(1, 200):
                await kvs[0].put_many({"a": n, "b": n})
                done = n

        writing = asyncio.create_task(write())
        reads = 0
        while not writing.done():
            before = done
            linearizable = reads % 2 == 0
            found = await kvs[reads % 3].get_many(["a", "b"], int, linearizable=linearizable)
            assert found["a"].value == found["b"].value
            if linearizable:
                assert found["a"].value >= before
            reads += 1
        await writing
        assert reads > 20


async def kv_works(kv: AppKV) -> bool:
    """Whether the bucket, just made, has a leader that takes writes."""
    try:
        await kv.revision()
    except BusError:
        return False
    return True


# --- linearizable


async def test_linearizable_get_leaves_the_bucket_small(bus: NatsBus, kv: AppKV) -> None:
    """It finds what is there, and nothing where nothing is; what it writes stays as few messages."""
    revision = await kv.put("k", 1)
    await kv.put("gone", 1)
    await kv.delete("gone")
    for _ in range(50):
        entry = await kv.get("k", int, linearizable=True)
        assert entry is not None
        assert (entry.value, entry.revision) == (1, revision)
        assert await kv.get("none", linearizable=True) is None
        assert await kv.get("gone", linearizable=True) is None
    info = await bus.api(f"STREAM.INFO.{NAMES.bucket_stream(NAMES.app_bucket('wiki'))}", {})
    assert info["state"]["messages"] == 3 + 5


async def test_linearizable_gets_beside_writers(nats_cluster: NatsCluster) -> None:
    """Many readers and a writer of one key, on three servers: each reads no less than was acknowledged
    before, and they do not get into the way of the writer's compare-and-set."""
    await nats_cluster.ready()
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connected(url)) for url in nats_cluster.urls]
        await make_bucket(buses[0], "wiki", replicas=3)
        kvs = [AppKV(bus, NAMES, "wiki") for bus in buses]
        await until(lambda: kv_works(kvs[0]))
        revision, acknowledged, writing = await kvs[0].create("k", 0), 0, True

        async def read(kv: AppKV) -> None:
            while writing:
                least = acknowledged
                entry = await kv.get("k", int, linearizable=True)
                assert entry is not None
                assert entry.value >= least
                await kv.get("none", linearizable=True)

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for n in range(9):
                tasks.create_task(read(kvs[n % 3]))
            for n in range(1, 100):
                revision = await kvs[0].update("k", n, revision)
                acknowledged = n
            writing = False


class Lags:
    """The real bus, but the replica that answers ``read_many`` has got no further than it was at first."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus, self.times, self._old = bus, 0, list[Record]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def read_many(self, stream: str, subjects: Sequence[str]) -> list[Record]:
        if not self._old:
            self._old = await self._bus.read_many(stream, subjects)
        self.times += 1
        return self._old if self.times <= 3 else await self._bus.read_many(stream, subjects)


async def test_replica_that_lags_is_asked_again(bus: NatsBus, kv: AppKV) -> None:
    """A replica that does not hold the barrier yet does not count."""
    await kv.put("k", "old")
    lags: Any = Lags(bus)
    lagging = AppKV(lags, NAMES, "wiki")
    assert await lagging.get("k", str, linearizable=True) is not None
    await kv.put("k", "new")
    entry = await lagging.get("k", str, linearizable=True)
    assert entry is not None
    assert (entry.value, lags.times) == ("new", 4)


async def test_leader_that_was_deposed_and_does_not_know() -> None:
    """The leader's host is cut off and the others go on: get may give the old value there, but never a
    linearizable one."""
    plain: list[object] = []
    for _ in range(5):
        plain, linearizable = await read_from_a_deposed_leader()
        assert linearizable == []
        if plain:
            break  # else the others took so long that it had stepped down before they had a new value
    assert plain, "the old leader answered nobody: this test shows nothing"
    assert set(plain) == {"old"}


async def read_from_a_deposed_leader() -> tuple[list[object], list[object]]:
    """What it answers after another one has a new value, plainly and linearizably."""
    with NetLab(3) as lab:
        async with NatsCluster(hosts=lab.hosts) as nats:
            leader = await lab[0].acall(asyncio.run, write_old(nats))
            accepted, read = threading.Event(), threading.Event()
            elsewhere = (leader + 1) % 3
            beside = asyncio.create_task(
                lab[leader].acall(asyncio.run, read_beside(nats.url(leader), accepted, read))
            )
            lab.isolate(leader)
            await lab[elsewhere].acall(asyncio.run, write_new(nats.url(elsewhere)))
            accepted.set()
            await until(lambda: read.is_set() or beside.done(), 20)
            lab.heal()
            return await beside


async def write_old(nats: NatsCluster) -> int:
    """Put the old value → which server leads the stream."""
    async with connected(*nats.urls) as bus:
        await make_bucket(bus, "wiki", replicas=3)
        kv = AppKV(bus, NAMES, "wiki")
        await until(lambda: kv_works(kv))
        await kv.put("k", "old")
        return nats.index(nats.stream_leader(NAMES.bucket_stream(NAMES.app_bucket("wiki"))))


async def write_new(url: str) -> None:
    """Put the new value, as soon as there is a leader."""
    async with connected(url) as bus:
        kv = AppKV(bus, NAMES, "wiki")

        async def written() -> bool:
            # Asked often: who asks before there is a leader would wait until the old one has stepped down.
            try:
                async with asyncio.timeout(0.3):
                    await kv.put("k", "new")
            except (BusError, TimeoutError):
                return False
            return True

        await until(written, 30)


async def read_beside(
    url: str, accepted: threading.Event, read: threading.Event
) -> tuple[list[object], list[object]]:
    """Beside the leader that is cut off: what it answers once the new value is *accepted*, plainly and
    linearizably; then *read* is set, and the new value must come.

    It steps down between 10 and 20 s after it heard the last of the others, who need 4 to 9 s to elect.
    """
    # No pings: nothing is to tell the client.
    async with connected(url, ping_interval=60) as bus:
        kv = AppKV(bus, NAMES, "wiki")
        await kv.get("k")
        await until(accepted.is_set, 30)
        answers = await asyncio.gather(
            *(kv.get("k", str, linearizable=n % 2 == 1) for n in range(10)), return_exceptions=True
        )
        read.set()
        plain, linearizable = (
            [each.value for each in some if isinstance(each, Entry)] for some in (answers[::2], answers[1::2])
        )
        assert all(isinstance(each, Entry | BusError) for each in answers), answers

        async def read_new() -> bool:
            try:
                entry = await kv.get("k", str, linearizable=True)
            except BusError:
                return False
            assert entry is not None
            assert entry.value == "new"
            return True

        await until(read_new, 30)
        return plain, linearizable


async def test_linearizable_get_while_the_leader_is_killed(nats_cluster: NatsCluster) -> None:
    """The stream's leader dies while one counts and others read: no read gives less than was acknowledged."""
    await nats_cluster.ready()
    stream = NAMES.bucket_stream(NAMES.app_bucket("wiki"))
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connected(*nats_cluster.urls)) for _ in range(3)]
        await make_bucket(buses[0], "wiki", replicas=3)
        kvs = [AppKV(bus, NAMES, "wiki") for bus in buses]
        await until(lambda: kv_works(kvs[0]))
        await kvs[0].put("k", 0)
        acknowledged, reads_after, running = 0, 0, True

        async def write() -> None:
            nonlocal acknowledged
            n = 0
            while running:
                n += 1
                try:
                    await kvs[0].put("k", n)
                    acknowledged = n
                except BusError:
                    await asyncio.sleep(0.01)

        async def read(kv: AppKV) -> None:
            nonlocal reads_after
            while running:
                least = acknowledged
                try:
                    entry = await kv.get("k", int, linearizable=True)
                except BusError:
                    await asyncio.sleep(0.01)
                    continue
                assert entry is not None
                assert entry.value >= least
                reads_after += killed

        killed = False
        async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            for kv in kvs[1:]:
                tasks.create_task(read(kv))
            await until(lambda: acknowledged > 50)
            nats_cluster.kill(nats_cluster.index(nats_cluster.stream_leader(stream)))
            killed, before = True, acknowledged
            await until(lambda: acknowledged > before + 50 and reads_after > 50, 60)
            running = False


async def test_keys_too_long_for_one_request(bus: NatsBus) -> None:
    """Keys that do not fit into one message to the server are refused by name, not by NATS."""
    with NatsServer(extra="max_payload: 65536") as server:
        async with connected(server.url()) as small:
            with pytest.raises(ConfigError, match="too long together"):
                await AppKV(small, NAMES, "wiki").get_many([f"{n}".rjust(100, "k") for n in range(1000)])


# --- watching since a revision


def told(change: Entry[Any] | Removed) -> tuple[str, Any, int]:
    return change.key, change.value if isinstance(change, Entry) else None, change.revision


async def test_watch_since_gives_every_change_in_order(kv: AppKV) -> None:
    """Each change after the revision once, in the order of revisions, removals too, then live ones."""
    await kv.put("a.1", 0)
    since = await kv.put("a.2", 0)
    expected: list[Any] = [("a.1", n, await kv.put("a.1", n)) for n in (1, 2)]
    await kv.put("b", 9)
    expected.append(("a.2", 7, await kv.put("a.2", 7)))
    await kv.delete("a.1")
    expected.append(("a.1", None, (await kv.history("a.1"))[-1].revision))
    async with kv.watch("a.*", int, since=since) as changes:
        for n in (3, 4):
            expected.append(("a.3", n, await kv.put("a.3", n)))
            await kv.put("b", n)
        assert [told(await next_of(changes)) for _ in expected] == expected
        last = await kv.revision()
        await until(lambda: changes.revision == last)
    async with kv.watch("", int, since=changes.revision) as changes:
        revision = await kv.put("b", 1)
        assert told(await next_of(changes)) == ("b", 1, revision)
        assert changes.revision == revision


async def test_watch_since_the_beginning(kv: AppKV) -> None:
    """Since 0 everything is given, as long as no key was changed too often."""
    expected = [(f"k{n}", n, await kv.put(f"k{n}", n)) for n in range(3)]
    async with kv.watch("", int, since=0) as changes:
        assert [told(await next_of(changes)) for _ in expected] == expected


async def test_watch_since_says_when_changes_may_be_gone(kv: AppKV) -> None:
    """A key that was changed as often as the bucket keeps it makes it an error that names the key; one change
    less does not, nor does a key that is not watched."""
    since = await kv.put("k", 0)
    for n in range(4):
        await kv.put("k", n)
    for n in range(20):
        await kv.put("other", n)
    async with kv.watch("k", int, since=since) as changes:
        assert [told(await next_of(changes))[1] for _ in range(4)] == [0, 1, 2, 3]
    await kv.put("k", 4)
    with pytest.raises(RevisionCompacted, match="'k'") as gone:
        async with kv.watch("k", int, since=since):
            pass
    assert (gone.value.key, gone.value.revision) == ("k", since)


async def test_watch_since_forgets_what_was_replaced_on_purpose(kv: AppKV) -> None:
    """A purge and writes with a TTL stand for all before them, however many: no error."""
    since = await kv.put("purged", 0)
    for n in range(10):
        await kv.put("purged", n)
        await kv.put("lease", n, ttl=60)
    await kv.purge("purged")
    for n in range(4):
        await kv.put("purged", n)
    async with kv.watch("", int, since=since) as changes:
        assert told(await next_of(changes))[:2] == ("lease", 9)
        assert told(await next_of(changes))[:2] == ("purged", None)
        assert [told(await next_of(changes))[1] for _ in range(4)] == [0, 1, 2, 3]


async def test_watch_since_a_revision_that_is_none_yet(bus: NatsBus, kv: AppKV) -> None:
    """A revision beyond the bucket's last one is of another bucket, or of one that lost writes: an error."""
    revision = await kv.put("k", 0)
    with pytest.raises(RevisionCompacted, match="made anew"):
        async with kv.watch("", since=revision + 100):
            pass
    for since in (-1, True, "5", 1.0):
        with pytest.raises(ConfigError, match="since"):
            kv.watch("", since=since)  # pyright: ignore[reportArgumentType]


async def test_watch_since_when_the_last_messages_have_expired(bus: NatsBus, kv: AppKV) -> None:
    """The end of the log has vanished with its time: the watch begins all the same, and goes on."""
    since = await kv.put("k", 0)
    await kv.put("short", 0, ttl=1)

    async def vanished() -> bool:
        return not await bus.read_log(NAMES.bucket_stream(NAMES.app_bucket("wiki")), "$KV.>", start=since + 1)

    await until(vanished)
    async with asyncio.timeout(10), kv.watch("", int, since=since) as changes:
        revision = await kv.put("k", 1)
        assert told(await next_of(changes)) == ("k", 1, revision)


async def test_watch_since_with_a_slow_consumer(kv: AppKV) -> None:
    """A consumer that is far behind gets all changes, of which few wait in memory; when the bucket has
    dropped some meanwhile, it gets what was before, and the error."""
    async with kv.watch("k.>", int, since=await kv.revision()) as changes:
        for part in range(4):
            await kv.put_many({f"k.{n}": n for n in range(part * 1000, part * 1000 + 1000)})
        await kv.put("other", 0)
        waiting = changes._waiting  # pyright: ignore[reportPrivateUsage]
        await until(lambda: len(waiting) >= MAX_WAITING)
        got = [told(await next_of(changes))[1] for _ in range(10)]
        assert len(waiting) <= MAX_WAITING
        got += [told(await next_of(changes))[1] for _ in range(3990)]
        assert got == list(range(4000))
        for n in range(MAX_WAITING + 500):
            await kv.put("k.fast", n)
        values: list[int] = []
        with pytest.raises(RevisionCompacted, match="fast"):  # noqa: PT012
            while True:
                values.append(told(await next_of(changes))[1])
        assert values == list(range(len(values)))
        assert len(values) >= MAX_WAITING
        with pytest.raises(RevisionCompacted):
            await next_of(changes)


async def test_watch_since_through_a_server_restart(nats_server: NatsServer) -> None:
    """After a reconnection it goes on without a gap, with the end of a TTL that nobody saw, and says so when
    others changed a key too often meanwhile."""
    async with connected(nats_server.url()) as bus:
        await make_bucket(bus, "wiki")
        kv = AppKV(bus, NAMES, "wiki")
        since = await kv.put("a", 0)
        lease = await kv.put("lease", 0, ttl=1)
        async with kv.watch("", int, since=since) as changes:
            assert told(await next_of(changes)) == ("lease", 0, lease)
            client: Any = bus._link.client  # pyright: ignore[reportPrivateUsage]
            connect, gate = client._connect_to_server, asyncio.Event()

            async def late(server: Any) -> None:
                await gate.wait()
                await connect(server)

            client._connect_to_server = late
            for times in (4, 5):
                gate.clear()
                nats_server.kill()
                await until(lambda: not bus.is_connected)
                nats_server.start()
                async with connected(nats_server.url()) as other:
                    theirs = AppKV(other, NAMES, "wiki")
                    expected = [("a", n, await theirs.put("a", n)) for n in range(times)]
                    await until(lambda kv=theirs: has_no_trace(kv, "lease"))
                gate.set()
                if times == 5:
                    break
                got = [told(await next_of(changes, 15)) for _ in range(5)]
                assert [each for each in got if each[0] == "a"] == expected
                assert [each[:2] for each in got if each[0] == "lease"] == [("lease", None)]
            with pytest.raises(RevisionCompacted, match="'a'"):
                await next_of(changes)


async def has_no_trace(kv: AppKV, key: str) -> bool:
    return not await kv.history(key)


class LosesMessages:
    """The real bus, of whose messages to subscribers one in seven is lost."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus, self.lost, self._got = bus, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def subscribe(self, subject: str, on_message: Callable[[Message], None]) -> Any:
        def lossy(message: Message) -> None:
            self._got += 1
            if self._got % 7:
                on_message(message)
            else:
                self.lost += 1

        return await self._bus.subscribe(subject, lossy)


async def test_watch_since_when_messages_are_lost(bus: NatsBus, kv: AppKV) -> None:
    """Lost messages are seen by the gap in the numbers, of whichever key, and read from the bucket."""
    lossy: Any = LosesMessages(bus)
    async with AppKV(lossy, NAMES, "wiki").watch("k.*", int, since=await kv.revision()) as changes:
        for n in range(50):
            await kv.put(f"k.{n}", n)
            await kv.put("other", n)
        await kv.put("last", 0)
        await kv.put("last", 0)
        assert [told(await next_of(changes))[1] for _ in range(50)] == list(range(50))
        assert lossy.lost >= 10


async def test_watch_since_while_the_leader_is_killed(nats_cluster: NatsCluster) -> None:
    """Many keys are written while the stream's leader dies: the watch has every acknowledged change, each
    once, in the order of revisions."""
    await nats_cluster.ready()
    stream = NAMES.bucket_stream(NAMES.app_bucket("wiki"))
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connected(*nats_cluster.urls)) for _ in range(3)]
        await make_bucket(buses[0], "wiki", replicas=3)
        kvs = [AppKV(bus, NAMES, "wiki") for bus in buses]
        await until(lambda: kv_works(kvs[0]))
        acknowledged: dict[int, str] = {}
        running = True

        async def write(kv: AppKV, name: str) -> None:
            n = 0
            while running:
                n += 1
                try:
                    acknowledged[await kv.put(f"{name}.{n}", n)] = f"{name}.{n}"
                except BusError:
                    await asyncio.sleep(0.01)

        seen: dict[int, str] = {}
        changes = await stack.enter_async_context(kvs[2].watch("", int, since=await kvs[2].revision()))

        async def watch() -> None:
            async for change in changes:
                assert change.revision > max(seen, default=0)
                seen[change.revision] = change.key

        async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch())
            writing = [tasks.create_task(write(kvs[n % 2], f"w{n}")) for n in range(4)]
            await until(lambda: len(acknowledged) > 200)
            nats_cluster.kill(nats_cluster.index(nats_cluster.stream_leader(stream)))
            before = len(acknowledged)
            await until(lambda: len(acknowledged) > before + 200, 60)
            running = False
            await asyncio.wait(writing)
            last = max(acknowledged)
            await until(lambda: max(seen) >= last, 40)
            watching.cancel()
        wrong = {r: (key, seen.get(r)) for r, key in acknowledged.items() if seen.get(r) != key}
        assert not wrong

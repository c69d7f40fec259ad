"""The app's KV on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.config import NatsOptions
from phalanx.coord.kv import AppKV, Entry, Removed
from phalanx.coord.kv_watch import MAX_WAITING, KVWatch
from phalanx.errors import BusTimeout, ConfigError, Fenced, KeyExists, WrongRevision, WrongValue
from phalanx.names import LEADER_KEY, Names
from phalanx.ports import Fence
from phalanx.testing.nats import NatsCluster, NatsServer

NAMES = Names("prod")
LEADER = NAMES.key_subject(NAMES.app_bucket("wiki"), LEADER_KEY)


class User(msgspec.Struct):
    name: str
    age: int = 0


@asynccontextmanager
async def connected(*urls: str) -> AsyncGenerator[NatsBus]:
    """A bus that is closed at the end."""
    bus = await NatsBus.connect(NatsOptions(urls=urls), name="test", ping_interval=1.0)
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


async def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until *condition* (sync or async) holds."""
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.01)


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

    await eventually(gone)


async def test_put_without_ttl_stays(kv: AppKV) -> None:
    """A later put takes the TTL away: the key outlives the first one's time."""
    await kv.put("marker", b"", ttl=1)
    await kv.put("k", "short", ttl=1)
    await kv.put("k", "stays")

    async def marker_gone() -> bool:
        return await kv.get("marker") is None

    await eventually(marker_gone)
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
        try:
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
            await eventually(lambda: not bus.is_connected)
            nats_server.start()
            async with connected(nats_server.url()) as other:
                await AppKV(other, NAMES, "wiki").put("b", 2)
            assert (await next_of(changes)).key == "b"
            await eventually(lambda: bus.is_connected)
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

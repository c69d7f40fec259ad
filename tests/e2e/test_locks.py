"""The app's locks on real servers, with a real register of sessions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.e2e.sessions import NAMES, STREAM, Heartbeat, connected, registered
from tests.waiting import until

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.coord.kv import AppKV
from phalanx.coord.lock_body import Holder
from phalanx.coord.lock_key import MOST_QUEUED
from phalanx.coord.locks import Lock, Locks
from phalanx.coord.register import Register
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, BusTimeout, ConfigError, Fenced, LockLost, LockTimeout, SessionLost
from phalanx.names import LEADER_KEY
from phalanx.ports import Fence
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.types import SessionId

TIMING = Timing.of(1.0)
BUCKET = NAMES.app_bucket("wiki")
LEADER = NAMES.key_subject(BUCKET, LEADER_KEY)


def lock_subject(name: str) -> str:
    return NAMES.key_subject(BUCKET, f"lock.{name}")


class ToldHeartbeat(Heartbeat):
    """A session that is valid until one is told otherwise."""

    is_valid = True
    valid_until = float("inf")
    lost_reason = ""

    def lose(self, reason: str) -> None:
        """What the keeper's word does."""
        self.is_valid, self.lost_reason = False, reason
        for callback in list(self._callbacks):
            callback()

    @property
    def listeners(self) -> int:
        return len(self._callbacks)


class Node:
    """What locks stand on, on one node: a connection, a session, a register."""

    def __init__(self, bus: NatsBus, session: ToldHeartbeat, register: Register) -> None:
        self.bus, self.session, self.register = bus, session, register
        self.locks = Locks(bus, NAMES, "wiki", session, register)
        self.kv = AppKV(bus, NAMES, "wiki")


@asynccontextmanager
async def node(name: str, *urls: str, replicas: int = 1) -> AsyncGenerator[Node]:
    """One node; the streams are made where they are missing."""
    async with connected(name, urls) as bus:
        await create_stream(bus, bucket_config(NAMES, BUCKET, "wiki", history=1, replicas=replicas))
        session = ToldHeartbeat(bus, name, TIMING)
        async with registered(bus, session) as register:
            made = Node(bus, session, register)
            try:
                yield made
            finally:
                await made.locks.close()


@pytest.fixture
async def a(nats_server: NatsServer) -> AsyncIterator[Node]:
    async with node("a", nats_server.url()) as made:
        yield made


@pytest.fixture
async def b(nats_server: NatsServer) -> AsyncIterator[Node]:
    async with node("b", nats_server.url()) as made:
        yield made


class HoldsWrites:
    """The real bus, whose writes of a lock time out: they reach the server only with ``arrive()``."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus, self.holding, self.held = bus, True, list[tuple[str, bytes, dict[str, Any]]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def write(self, subject: str, data: bytes = b"", **options: Any) -> int:
        if self.holding and ".lock." in subject:
            self.held.append((subject, data, options))
            raise BusTimeout(f"write {subject}", "held back")
        return await self._bus.write(subject, data, **options)

    async def arrive(self, first: int | None = None) -> list[str]:
        """What was held back (only the *first* so many) reaches the server now; how each fared."""
        outcomes: list[str] = []
        for subject, data, options in self.held[:first]:
            try:
                await self._bus.write(subject, data, **options)
                outcomes.append("stored")
            except BusError:
                outcomes.append("refused")
        return outcomes


# --- plain


async def test_lock_excludes_and_token_grows(a: Node, b: Node) -> None:
    """Held by one node a lock is closed to the other until it is released; then with a larger token."""
    async with a.locks.lock("migrate") as held:
        assert (held.name, held.is_held, held.lost.is_set()) == ("migrate", True, False)
        with pytest.raises(LockTimeout, match=r"held by a\.") as refused:
            await b.locks.acquire("migrate", timeout=0)
        assert (refused.value.name, refused.value.seconds) == ("migrate", 0)
        async with b.locks.lock("other", timeout=10):
            pass
        first = held.token
    async with b.locks.lock("migrate", timeout=10) as held:
        assert held.token > first
    assert (a.session.listeners, b.session.listeners) == (0, 0)


async def test_waiter_is_woken_by_the_release(a: Node, b: Node) -> None:
    """Who waits on another node has the lock within a moment of its release."""
    held = await a.locks.acquire("x")
    waiting = asyncio.create_task(b.locks.acquire("x", timeout=10))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    began = system.now()
    await held.release()
    await held.release()
    got = await waiting
    assert system.now() - began < 5  # its deadline is 10 s, and nothing else would wake it
    assert got.token > held.token
    with pytest.raises(LockLost, match="released"):
        held.check()
    await got.release()


async def test_wait_has_a_deadline(a: Node, b: Node) -> None:
    """A lock that stays held: LockTimeout at the deadline, not earlier, not much later; on any node."""
    async with a.locks.lock("x"):
        for locks, holder in ((b.locks, r"held by a\."), (a.locks, "this node")):
            began = system.now()
            with pytest.raises(LockTimeout, match=holder):
                async with locks.lock("x", timeout=0.3):
                    pytest.fail("held twice")
            assert 0.29 < system.now() - began < 1.5
    async with a.locks.lock("x", timeout=0):
        pass


async def test_wrong_arguments(a: Node) -> None:
    """Names and deadlines are checked before anything is sent."""
    for name in ("", "a b", "a.*", "..", None):
        with pytest.raises(ConfigError, match="lock"):
            await a.locks.acquire(name)  # pyright: ignore[reportArgumentType]
    for timeout in (-1, float("nan"), "5"):
        with pytest.raises(ConfigError, match="timeout"):
            await a.locks.acquire("x", timeout=timeout)  # pyright: ignore[reportArgumentType]


async def test_error_in_the_body_releases(a: Node, b: Node) -> None:
    """An exception leaves the block as it is, and the lock free."""
    with pytest.raises(ZeroDivisionError):
        async with a.locks.lock("x"):
            raise ZeroDivisionError
    async with b.locks.lock("x", timeout=0):
        pass


async def test_early_release_in_the_body(a: Node) -> None:
    """Releasing inside the block is no loss."""
    async with a.locks.lock("x") as held:
        await held.release()


# --- many


async def count_under_lock(node: Node, locks: Locks, times: int, tokens: list[int]) -> None:
    """Read, yield, write back: it loses counts as soon as two do it at once."""
    for _ in range(times):
        async with locks.lock("counter", timeout=60) as held:
            tokens.append(held.token)
            n = await node.kv.value("n", int, 0)
            await asyncio.sleep(0)
            await node.kv.put("n", n + 1)


async def test_mutual_exclusion_of_many_tasks(nats_server: NatsServer) -> None:
    """Tasks of three nodes, several on each, never hold one lock together; tokens only grow."""
    async with (
        node("a", nats_server.url()) as a,
        node("b", nats_server.url()) as b,
        node("c", nats_server.url()) as c,
    ):
        tokens: list[int] = []
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for each in (a, b, c):
                other = Locks(each.bus, NAMES, "wiki", each.session, each.register)
                for locks in (each.locks, each.locks, each.locks, other):
                    tasks.create_task(count_under_lock(each, locks, 8, tokens))
        assert await a.kv.value("n", int, 0) == 3 * 4 * 8
        assert tokens == sorted(set(tokens))


async def test_mutual_exclusion_while_a_server_dies(nats_cluster: NatsCluster) -> None:
    """The bucket's leader is killed while three nodes count under one lock: no count is lost."""
    await nats_cluster.ready()
    async with (
        node("a", *nats_cluster.urls, replicas=3) as a,
        node("b", *nats_cluster.urls, replicas=3) as b,
    ):
        tokens: list[int] = []
        counts = {"done": 0}

        async def work(each: Node) -> None:
            done = 0
            while done < 15:
                try:
                    async with each.locks.lock("counter", timeout=60) as held:
                        tokens.append(held.token)
                        n = await each.kv.value("n", int, 0)
                        await each.kv.put("n", n + 1)
                        done += 1
                except BusError:
                    # The put's outcome is unknown: count what is there at the end only where it is known.
                    continue
                counts["done"] += 1

        async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
            for each in (a, a, b, b):
                tasks.create_task(work(each))
            await until(lambda: counts["done"] > 5)
            leader = nats_cluster.index(nats_cluster.stream_leader(NAMES.bucket_stream(BUCKET)))
            # The one with the session stream stays: its loss would be that of all sessions here.
            if nats_cluster.stream_leader(STREAM) != nats_cluster.name(leader):
                nats_cluster.kill(leader)
            else:
                nats_cluster.kill((leader + 1) % 3)
        assert await a.kv.value("n", int, 0) >= 60
        assert tokens == sorted(set(tokens))


# --- loss


async def test_lock_of_a_dead_session_is_taken_over(a: Node, b: Node) -> None:
    """The holder's host loses power: the lock is free once its session is over, not before."""
    held = await a.locks.acquire("x")
    began = system.now()
    await a.session.die()
    got = await b.locks.acquire("x", timeout=10)
    assert TIMING.ttl * 0.8 < system.now() - began < TIMING.observe + 1.0
    assert got.token > held.token
    # The old holder, were it still alive, is told.
    await asyncio.wait_for(held.lost.wait(), 5)
    with pytest.raises(LockLost, match="overwritten, now held by b"):
        held.check()
    await held.release()
    assert got.is_held
    with pytest.raises(LockTimeout):
        await b.locks.acquire("x", timeout=0)
    await got.release()


async def test_lock_of_an_unknown_session_is_taken_over(a: Node) -> None:
    """A holder whose session is in no session stream (its server lost its data) does not keep it for ever."""
    ghost = Holder(SessionId.new("ghost"), "nonce")
    await a.bus.write(lock_subject("x"), msgspec.json.encode(ghost))
    with pytest.raises(LockTimeout, match="ghost"):
        await a.locks.acquire("x", timeout=0)
    async with a.locks.lock("x", timeout=10):
        pass


async def test_session_loss_is_a_signal(a: Node) -> None:
    """With the session every lock is lost at once, waiting ends, and the block ends with LockLost."""
    waited: list[BaseException] = []

    async def wait() -> None:
        try:
            await a.locks.acquire("y", timeout=30)
        except SessionLost as error:
            waited.append(error)

    other = await Locks(a.bus, NAMES, "wiki", a.session, a.register).acquire("y")
    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0.1)
    with pytest.raises(LockLost, match="the keeper is gone"):  # noqa: PT012
        async with a.locks.lock("x") as held:
            a.session.lose("the keeper is gone")
            assert held.lost.is_set()
            assert not held.is_held
    await asyncio.wait_for(waiting, 5)
    assert waited
    assert other.lost.is_set()
    with pytest.raises(SessionLost):
        await a.locks.acquire("z")
    await other.release()


async def test_body_error_wins_over_lock_lost(a: Node) -> None:
    """A body that raises by itself is not covered up by LockLost."""
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with a.locks.lock("x"):
            a.session.lose("gone")
            raise ZeroDivisionError


async def test_overwritten_and_deleted_keys_are_a_loss(a: Node) -> None:
    """Somebody who writes or purges the key by hand takes the lock away: the holder is told."""
    held = await a.locks.acquire("x")
    await a.bus.write(lock_subject("x"), b"")
    await asyncio.wait_for(held.lost.wait(), 5)
    await held.release()
    held = await a.locks.acquire("x", timeout=10)
    await a.bus.api(f"STREAM.PURGE.{NAMES.bucket_stream(BUCKET)}", {"filter": lock_subject("x")})
    held2 = await Locks(a.bus, NAMES, "wiki", a.session, a.register).acquire("x", timeout=10)
    await asyncio.wait_for(held.lost.wait(), 5)
    assert held2.token > held.token
    await held.release()
    assert held2.is_held
    await held2.release()


async def test_vanished_key_is_a_loss(nats_server: NatsServer) -> None:
    """A key that is gone without a trace is noticed at the next look at the bucket, as at a reconnection."""
    async with node("a", nats_server.url()) as a:
        held = await a.locks.acquire("x")
        await until(lambda: bool(held.is_watched))
        await a.bus.api(f"STREAM.PURGE.{NAMES.bucket_stream(BUCKET)}", {"filter": lock_subject("x")})
        nats_server.kill()
        nats_server.start()
        await asyncio.wait_for(held.lost.wait(), 10)
        await held.release()


async def test_junk_in_the_key_counts_as_free(a: Node) -> None:
    """A key that holds no lock does not close it for ever."""
    await a.bus.write(lock_subject("x"), b"{not json")
    async with a.locks.lock("x", timeout=10):
        pass


# --- under an epoch


async def lead(node: Node) -> Fence:
    return Fence(LEADER, await node.bus.write(LEADER, b"{}"))


async def test_leader_lock_ends_with_the_epoch(a: Node, b: Node) -> None:
    """A lock of an active section is lost when the epoch is, and free for the next; old epochs get none."""
    fence = await lead(a)
    old = a.locks.under(fence, fence.revision)
    held = await old.acquire("x")
    waiting = asyncio.create_task(b.locks.acquire("x", timeout=10))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await lead(b)
    got = await waiting
    assert got.token > held.token
    await asyncio.wait_for(held.lost.wait(), 5)
    await held.release()
    for name in ("new", "x"):
        with pytest.raises(Fenced) as refused:
            await old.acquire(name, timeout=5)
        assert refused.value.epoch == fence.revision
    assert got.is_held
    await got.release()


async def test_leader_lock_is_lost_though_nobody_wants_it(a: Node, b: Node) -> None:
    """The holder learns of the end of its epoch from the leader key, not only from a new holder."""
    fence = await lead(a)
    held = await a.locks.under(fence, fence.revision).acquire("x")
    await lead(b)
    await asyncio.wait_for(held.lost.wait(), 5)
    with pytest.raises(LockLost, match=f"epoch {fence.revision} is over"):
        held.check()
    await held.release()


async def test_leader_lock_excludes_in_its_epoch(a: Node, b: Node) -> None:
    """While the epoch lasts its lock is closed to everybody, and free after the release."""
    fence = await lead(a)
    async with a.locks.under(fence, fence.revision).lock("x"):
        with pytest.raises(LockTimeout, match="in epoch"):
            await b.locks.acquire("x", timeout=0.2)
    async with b.locks.lock("x", timeout=10):
        pass


# --- cancellation and lost replies


async def test_cancelled_acquire_leaves_nothing(a: Node, b: Node) -> None:
    """An acquire that is cancelled at any moment leaves the lock free."""
    for step in range(40):
        task = asyncio.create_task(a.locks.acquire("x", timeout=5))
        await asyncio.sleep(step * 0.0001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).release()
        async with b.locks.lock("x", timeout=10):
            pass
    await a.locks.close()
    assert a.session.listeners == 0


async def test_cancelled_waiter_does_not_hold_up_others(a: Node) -> None:
    """Of those who wait in line on one node any may leave."""
    held = await a.locks.acquire("x")
    waiting = [asyncio.create_task(a.locks.acquire("x", timeout=10)) for _ in range(3)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()
    waiting[1].cancel()
    await held.release()
    got = await waiting[2]
    assert isinstance(got, Lock)
    await got.release()


async def test_cancelled_release_goes_on(a: Node, b: Node) -> None:
    """Cancelling who leaves the block does not keep the lock."""
    held = await a.locks.acquire("x")
    task = asyncio.create_task(held.release())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with b.locks.lock("x", timeout=10):
        pass


async def test_late_write_does_not_leak_the_lock(a: Node, b: Node) -> None:
    """A write of a claim that was given up, and that arrives only later, is refused by the server."""
    slow: Any = HoldsWrites(a.bus)
    locks = Locks(slow, NAMES, "wiki", a.session, a.register)
    with pytest.raises(BusError):
        await locks.acquire("x", timeout=0.2)
    slow.holding = False
    await locks.close()
    assert "stored" not in await slow.arrive()
    async with b.locks.lock("x", timeout=0):
        pass


async def test_late_write_before_the_settling_is_undone(a: Node, b: Node) -> None:
    """The same when it arrives first: what it took is given back."""
    slow: Any = HoldsWrites(a.bus)
    locks = Locks(slow, NAMES, "wiki", a.session, a.register)
    task = asyncio.create_task(locks.acquire("x", timeout=30))
    await until(lambda: bool(slow.held))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await slow.arrive(1) == ["stored"]
    slow.holding = False
    await locks.close()
    async with b.locks.lock("x", timeout=0):
        pass


async def test_lost_reply_is_ours_after_all(a: Node) -> None:
    """A write that was stored but not acknowledged holds the lock: the nonce shows it."""
    slow: Any = HoldsWrites(a.bus)
    locks = Locks(slow, NAMES, "wiki", a.session, a.register)
    task = asyncio.create_task(locks.acquire("x", timeout=10))
    await until(lambda: bool(slow.held))
    assert await slow.arrive(1) == ["stored"]
    held = await task
    slow.holding = False
    assert held.is_held
    await held.release()


async def test_acquire_rides_out_a_server_restart(nats_server: NatsServer) -> None:
    """NATS is away for a moment: at its deadline an acquisition says so; with more time it goes on."""
    async with node("a", nats_server.url()) as a:
        nats_server.kill()
        await until(lambda: not a.bus.is_connected)
        with pytest.raises(BusError):
            await a.locks.acquire("x", timeout=0.2)
        task = asyncio.create_task(a.locks.acquire("x", timeout=30))
        nats_server.start()
        held = await task
        await held.release()


# --- who holds them, who waits


async def test_holder_and_waiters_are_visible(a: Node, b: Node) -> None:
    """Every node sees who holds a lock and who has waited for a second; both are gone when it is over."""
    assert await a.locks.holder("jobs.x") is None
    assert await a.locks.held() == []
    async with a.locks.lock("jobs.x") as held:
        waiting = [asyncio.create_task(b.locks.acquire("jobs.x")) for _ in range(2)]
        mine = asyncio.create_task(a.locks.acquire("jobs.x"))
        async with a.locks.lock("other"):
            async with asyncio.timeout(10):
                while True:
                    seen = await b.locks.holder("jobs.x")
                    assert seen is not None
                    if len(seen.waiters) == 2:
                        break
                    await asyncio.sleep(0.05)
            assert (seen.name, seen.node, seen.session) == ("jobs.x", "a", str(a.session.id))
            assert (seen.token, seen.epoch) == (held.token, 0)
            assert abs(seen.time - system.wall()) < 60
            assert sorted((waiter.node, waiter.tasks) for waiter in seen.waiters) == [("a", 1), ("b", 2)]
            found = await a.locks.held()
            assert [each.name for each in found] == ["jobs.x", "other"]
            assert len(found[0].waiters) == 2
            assert found[1].waiters == ()
    for task in [mine, *waiting]:
        task.cancel()
    for lock in await asyncio.gather(mine, *waiting, return_exceptions=True):
        if isinstance(lock, Lock):
            await lock.release()
    await a.locks.close()
    await b.locks.close()
    assert await a.locks.held() == []
    left = await a.bus.snapshot(NAMES.bucket_stream(BUCKET), NAMES.key_subject(BUCKET, "waiter.>"))
    assert all(record.removed for record in left)


async def test_short_waits_write_nothing(a: Node, b: Node) -> None:
    """A lock that changes hands at once leaves no trace of who waited."""
    tokens: list[int] = []
    await asyncio.gather(count_under_lock(a, a.locks, 5, tokens), count_under_lock(b, b.locks, 5, tokens))
    assert not await a.bus.read_log(NAMES.bucket_stream(BUCKET), NAMES.key_subject(BUCKET, "waiter.>"))


async def test_dead_and_deposed_holders_are_not_shown(a: Node, b: Node) -> None:
    """A lock whose holder's session is over, or whose epoch is, counts as free for those who look, too."""
    fence = await lead(a)
    await a.locks.under(fence, fence.revision).acquire("led")
    await a.locks.acquire("plain")
    led = await b.locks.holder("led")
    assert led is not None
    assert led.epoch == fence.revision
    assert [each.name for each in await b.locks.held()] == ["led", "plain"]
    await lead(b)
    assert await b.locks.holder("led") is None
    assert [each.name for each in await b.locks.held()] == ["plain"]
    await a.session.die()
    async with asyncio.timeout(10):
        while await b.locks.holder("plain") is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await b.locks.held() == []
    with pytest.raises(ConfigError, match="lock"):
        await b.locks.holder("a b")


# --- in line


async def queued(node: Node, name: str, kind: str = "lock") -> list[str]:
    """The nonces of those who wait, in the order of the queue."""
    record = await node.bus.read(NAMES.bucket_stream(BUCKET), NAMES.key_subject(BUCKET, f"{kind}.{name}"))
    return [each["nonce"] for each in json.loads(record.data).get("queue", [])] if record else []


async def enqueue(node: Node, name: str, waiting: list[asyncio.Task[Lock]]) -> None:
    """One more task of *node* waits, and stands in the queue when this returns."""
    before = len(await queued(node, name))
    waiting.append(asyncio.create_task(node.locks.acquire(name, timeout=60)))
    await in_line(node, name, before + 1)


async def in_line(node: Node, name: str, tasks: int, kind: str = "lock") -> None:
    """Wait until so many wait."""
    async with asyncio.timeout(20):
        while len(await queued(node, name, kind)) < tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_first_come_first_served_over_nodes_with_many_waiters(nats_server: NatsServer) -> None:
    """Sixty tasks of three nodes, in random order: each gets the lock in its turn, with a larger token."""
    async with (
        node("a", nats_server.url()) as a,
        node("b", nats_server.url()) as b,
        node("c", nats_server.url()) as c,
    ):
        chance = random.Random(5)
        held = await a.locks.acquire("x")
        waiting: list[asyncio.Task[Lock]] = []
        for _ in range(60):
            await enqueue(chance.choice((a, b, c)), "x", waiting)
        tokens = [held.token]
        await held.release()
        for task in waiting:
            async with asyncio.timeout(10):
                held = await task
            assert sum(each.done() for each in waiting) == len(tokens)  # nobody else was given it
            tokens.append(held.token)
            await held.release()
        assert tokens == sorted(set(tokens))


async def test_newcomer_does_not_overtake_who_waits(a: Node, b: Node) -> None:
    """Tasks that come while one waits, on the holder's own node too, follow it; a try gets nothing."""
    held = await a.locks.acquire("x")
    waiting: list[asyncio.Task[Lock]] = []
    await enqueue(b, "x", waiting)
    with pytest.raises(LockTimeout):
        await a.locks.acquire("x", timeout=0)
    release = asyncio.create_task(held.release())
    newcomer = asyncio.create_task(a.locks.acquire("x", timeout=30))
    first = await waiting[0]
    await release
    assert not newcomer.done()
    await first.release()
    second = await newcomer
    assert held.token < first.token < second.token
    await second.release()


async def test_those_who_give_up_or_die_are_passed_over(a: Node, b: Node) -> None:
    """A waiter that is cancelled, and one whose session ends, hold nobody up."""
    held = await a.locks.acquire("x")
    waiting: list[asyncio.Task[Lock]] = []
    await enqueue(a, "x", waiting)
    await enqueue(b, "x", waiting)
    await enqueue(a, "x", waiting)
    waiting[0].cancel()
    await b.session.die()
    b.session.lose("power loss")
    await held.release()
    async with asyncio.timeout(20):
        got = await waiting[2]
    await got.release()
    for task in waiting[:2]:
        with contextlib.suppress(asyncio.CancelledError, SessionLost):
            await task


async def test_more_waiters_than_a_queue_takes_of_a_node(a: Node) -> None:
    """Those beyond the limit come after the others, in their order."""
    held = await a.locks.acquire("x")
    got: list[int] = []

    async def wait(number: int) -> None:
        async with a.locks.lock("x", timeout=120):
            got.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(MOST_QUEUED + 20)]
    await in_line(a, "x", MOST_QUEUED)
    await held.release()
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    assert got == list(range(MOST_QUEUED + 20))


async def test_uncontended_cycle_is_two_writes(a: Node) -> None:
    """One write takes a free lock, one releases it: also the first time, also after another node had it."""
    counting: Any = CountsRequests(a.bus)
    locks = Locks(counting, NAMES, "wiki", a.session, a.register)
    for _ in range(5):
        held = await locks.acquire("x")
        await held.release()
    assert counting.calls == ["write"] * 10
    await locks.close()


class CountsRequests:
    """The real bus, and which requests went through it."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus, self.calls = bus, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "read", "snapshot", "write_many", "subscribe"):
            self.calls.append(name)
        return getattr(self._bus, name)


async def test_block_is_cancelled_when_the_lock_is_lost(a: Node) -> None:
    """With cancel=True a block that waits for something else ends at once, with LockLost."""
    with pytest.raises(LockLost, match="the keeper is gone"):  # noqa: PT012
        async with a.locks.lock("x", cancel=True):
            asyncio.get_running_loop().call_later(0.05, a.session.lose, "the keeper is gone")
            await asyncio.sleep(60)
    await asyncio.sleep(0)  # the task itself goes on


async def test_cancellation_by_others_stays_one(a: Node) -> None:
    """A block with cancel=True whose task is cancelled from outside ends as cancelled."""
    entered = asyncio.Event()

    async def hold() -> None:
        async with a.locks.lock("x", cancel=True):
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(hold())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with a.locks.lock("x", timeout=10):
        pass


async def test_token_of_a_former_holder_is_not_current(a: Node, b: Node) -> None:
    """Whoever is given a token can ask whether it is the present holder's."""
    async with a.locks.lock("x") as held:
        assert await b.locks.is_current("x", held.token)
        assert not await b.locks.is_current("x", held.token - 1)
    assert not await b.locks.is_current("x", held.token)


async def test_session_that_runs_out_unheard_is_a_loss(a: Node) -> None:
    """Nobody says that the session is over: its own clock does."""
    a.session.valid_until = system.now() + 0.2
    held = await a.locks.acquire("x")
    a.session.is_valid = False  # what the clock says by then
    await asyncio.wait_for(held.lost.wait(), 10)
    a.session.is_valid, a.session.valid_until = True, float("inf")
    await held.release()


# --- semaphores


async def test_semaphore_never_has_more_holders_than_permits(nats_server: NatsServer) -> None:
    """Tasks of three nodes, more than permits: never too many at once, and all permits are used."""
    async with (
        node("a", nats_server.url()) as a,
        node("b", nats_server.url()) as b,
        node("c", nats_server.url()) as c,
    ):
        inside: set[int] = set()
        most, tokens = 0, list[int]()

        async def work(each: Node) -> None:
            nonlocal most
            for _ in range(4):
                async with each.locks.semaphore("s", permits=3).hold(timeout=60) as held:
                    assert held.token not in inside
                    inside.add(held.token)
                    tokens.append(held.token)
                    most = max(most, len(inside))
                    assert len(inside) <= 3
                    await asyncio.sleep(0.005)
                    inside.remove(held.token)

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for each in (a, b, c):
                for _ in range(4):
                    tasks.create_task(work(each))
        assert most == 3
        assert len(set(tokens)) == len(tokens) == 48


async def test_semaphore_is_fair_and_tries_do_not_wait(a: Node, b: Node) -> None:
    """With all permits held a try fails; who waits gets the next one; status shows holders and waiters."""
    ours, theirs = a.locks.semaphore("s", permits=2), b.locks.semaphore("s", permits=2)
    first, second = await ours.acquire(), await theirs.acquire()
    with pytest.raises(LockTimeout):
        await ours.acquire(timeout=0)
    waiting = [asyncio.create_task(each.acquire(timeout=30)) for each in (theirs,)]
    await in_line(a, "s", 1, "semaphore")
    seen = await a.locks.semaphore("s", permits=2).holders()
    assert seen is not None
    assert (seen.kind, seen.permits) == ("semaphore", 2)
    assert [each.token for each in seen.holders] == [first.token, second.token]
    assert [(each.node, each.tasks) for each in seen.waiters] == [("b", 1)]
    assert [each.kind for each in await b.locks.held()] == ["semaphore"]
    with pytest.raises(LockTimeout):
        await ours.acquire(timeout=0)
    await first.release()
    third = await waiting[0]
    assert first.token < second.token < third.token
    await second.release()
    await third.release()
    assert await ours.holders() is None


async def test_permits_of_a_dead_session_are_free_again(a: Node, b: Node) -> None:
    """Its permits come back when the session is over for good, not before; all of them."""
    for _ in range(2):
        await a.locks.semaphore("s", permits=2).acquire()
    began = system.now()
    await a.session.die()
    got = [await b.locks.semaphore("s", permits=2).acquire(timeout=20) for _ in range(2)]
    assert system.now() - began > TIMING.ttl * 0.8
    for each in got:
        await each.release()


async def test_other_permits_are_refused_while_it_is_used(a: Node, b: Node) -> None:
    """Two declarations that differ: an error that says what there is; when it is idle it may be changed."""
    held = await a.locks.semaphore("s", permits=2).acquire()
    with pytest.raises(ConfigError, match=r"permits = 3: semaphore s has 2 permits now, held by a\."):
        await b.locks.semaphore("s", permits=3).acquire(timeout=5)
    with pytest.raises(ConfigError, match=r"permits = 3: .*2 permits in this process"):
        await a.locks.semaphore("s", permits=3).acquire(timeout=5)
    await held.release()
    for each in (b, a):
        await (await each.locks.semaphore("s", permits=3).acquire(timeout=5)).release()
    for permits in (0, 1001, 1.5, True, "3"):
        with pytest.raises(ConfigError, match="permits"):
            a.locks.semaphore("s", permits=permits)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="semaphore"):
        a.locks.semaphore("a b", permits=1)


class DeafToLeader:
    """The real bus, over which no change of the leader key comes by itself."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def subscribe(self, subject: str, on_message: Any, *, queue: str = "") -> Any:
        deaf = subject.endswith(LEADER_KEY)
        return await self._bus.subscribe(subject, (lambda message: None) if deaf else on_message, queue=queue)

    async def snapshot(self, stream: str, subjects: str, **options: Any) -> Any:
        return [] if subjects == LEADER else await self._bus.snapshot(stream, subjects, **options)


async def test_lock_handed_to_an_old_epoch_is_not_taken(a: Node, b: Node) -> None:
    """Who is handed a lock by a write without its fence looks whether its epoch lasts: else Fenced."""
    deaf: Any = DeafToLeader(a.bus)
    locks = Locks(deaf, NAMES, "wiki", a.session, a.register)
    fence = await lead(a)
    held = await locks.acquire("x")
    waiting = asyncio.create_task(locks.under(fence, fence.revision).acquire("x", timeout=60))
    await in_line(a, "x", 1)
    await lead(b)
    await held.release()
    with pytest.raises(Fenced):
        await asyncio.wait_for(waiting, 30)
    async with b.locks.lock("x", timeout=20):
        pass
    await locks.close()


async def test_refused_by_nats_is_said_and_not_repeated_at_once(a: Node) -> None:
    """A right that is missing: the caller is told, and NATS is not asked again and again."""

    class Refuses(DeafToLeader):
        tries = 0

        async def write(self, subject: str, data: bytes = b"", **options: Any) -> int:
            Refuses.tries += 1
            raise BusError(f"write {subject}", "not allowed", 10000)

    refuses: Any = Refuses(a.bus)
    locks = Locks(refuses, NAMES, "wiki", a.session, a.register)
    with pytest.raises(BusError, match="not allowed"):
        await locks.acquire("x", timeout=30)
    await locks.close()
    assert Refuses.tries == 1

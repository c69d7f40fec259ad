"""Locks at the moments at which two things happen at once, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest
from tests.e2e.sessions import NAMES
from tests.e2e.test_locks import BUCKET, LEADER, node
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.coord.lock_body import Holder
from phalanx.coord.lock_key import MOST_QUEUED
from phalanx.coord.locks import Locks
from phalanx.errors import BusError, BusTimeout, ConfigError, Fenced, LockLost, LockTimeout, SessionLost
from phalanx.ports import Connection, Fence, Record
from phalanx.testing.nats import NatsServer
from phalanx.types import SessionId


def subject(key: str) -> str:
    return NAMES.key_subject(BUCKET, key)


class Meddling:
    """The real bus; what a test sets happens before a read, and instead of a write of the lock's key."""

    def __init__(self, bus: NatsBus, key: str) -> None:
        self._bus, self._subject = bus, subject(key)
        self.reading, self.refusal, self.refused = asyncio.Event(), "", 0
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.may_hear = True
        self.other: bytes | None = None
        """What the key holds, in place of what was written."""
        self.connection: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def read(self, stream: str, subject: str, **options: Any) -> Record | None:
        if subject == self._subject:
            self.reading.set()
            await self.may_read.wait()
        found = await self._bus.read(stream, subject, **options)
        if found is not None and self.other is not None and subject == self._subject:
            return msgspec.structs.replace(found, data=self.other)
        return found

    async def write(self, subject: str, data: bytes = b"", **options: Any) -> int:
        if subject == self._subject and self.refusal:
            self.refused += 1
            raise BusError(f"write {subject}", self.refusal)
        return await self._bus.write(subject, data, **options)

    async def subscribe(self, subject: str, *more: Any, **options: Any) -> Any:
        if not self.may_hear and ".watch.kv." in subject:
            await asyncio.Event().wait()
        return await self._bus.subscribe(subject, *more, **options)

    def on_connection(self, callback: Any) -> Any:
        self.connection.append(callback)
        return self._bus.on_connection(callback)


async def test_other_permits_are_refused_to_those_who_come_while_it_is_read(nats_server: NatsServer) -> None:
    """A claim with another number of permits that comes while an earlier one's answer is under way: refused
    as that one is, and nothing is written."""
    async with node("a", nats_server.url()) as a, node("b", nats_server.url()) as b:
        held = [await a.locks.semaphore("s", permits=2).acquire(timeout=10) for _ in range(2)]
        bus: Any = Meddling(b.bus, "semaphore.s")
        locks = Locks(bus, NAMES, "wiki", b.session, b.register)
        with pytest.raises(ConfigError, match="has 2 permits now"):
            await locks.semaphore("s", permits=3).acquire(timeout=10)  # from now on the key is known
        bus.reading.clear()
        bus.may_read.clear()
        first = asyncio.create_task(locks.semaphore("s", permits=3).acquire(timeout=10))
        await bus.reading.wait()
        second = asyncio.create_task(locks.semaphore("s", permits=3).acquire(timeout=10))
        await asyncio.sleep(0.05)
        bus.may_read.set()
        for each in (first, second):
            with pytest.raises(ConfigError, match="has 2 permits now"):
                await each
        seen = await a.locks.semaphore("s", permits=2).holders()
        assert seen is not None
        assert (seen.permits, len(seen.holders)) == (2, 2)
        for each in held:
            each.check()
            await each.release()
        await locks.close()


async def test_release_that_nats_refuses_is_tried_again_at_leisure(nats_server: NatsServer) -> None:
    """A bucket that takes nothing for a while: the release comes later, and is not sent without a pause."""
    async with node("a", nats_server.url()) as a, node("b", nats_server.url()) as b:
        bus: Any = Meddling(a.bus, "lock.x")
        locks = Locks(bus, NAMES, "wiki", a.session, a.register)
        held = await locks.acquire("x", timeout=10)
        bus.refusal = "maximum bytes exceeded"
        releasing = asyncio.create_task(held.release())
        await until(lambda: bus.refused > 0)
        await asyncio.sleep(1)
        assert bus.refused < 10
        bus.refusal = ""
        await releasing
        await (await b.locks.acquire("x", timeout=20)).release()
        await locks.close()


async def test_late_write_is_undone_though_nats_refused_the_next(nats_server: NatsServer) -> None:
    """A write in doubt, then a refusal: the claim fails; when the first write arrives after all it is given
    back."""
    async with node("a", nats_server.url()) as a, node("b", nats_server.url()) as b:
        sent: list[tuple[bytes, dict[str, Any]]] = []

        class Late(Meddling):
            async def write(self, subject: str, data: bytes = b"", **options: Any) -> int:
                if subject == self._subject and not sent:
                    sent.append((data, options))
                    self.refusal = "no space left"
                    raise BusTimeout(f"write {subject}", "held back")
                return await super().write(subject, data, **options)

        bus: Any = Late(a.bus, "lock.x")
        locks = Locks(bus, NAMES, "wiki", a.session, a.register)
        with pytest.raises(BusError, match="no space left"):
            await locks.acquire("x", timeout=10)
        await a.bus.write(subject("lock.x"), sent[0][0], **sent[0][1])
        bus.refusal = ""
        await (await b.locks.acquire("x", timeout=20)).release()
        await locks.close()


async def test_queued_leader_that_grants_itself_in_an_old_epoch_is_fenced(nats_server: NatsServer) -> None:
    """It waits under its epoch, the holder dies, and so does the epoch, unheard: its own write would grant
    it, but it is asked first whether the epoch lasts."""
    async with node("a", nats_server.url()) as a, node("b", nats_server.url()) as b:
        epoch = await a.bus.write(LEADER, b"{}")
        bus: Any = Meddling(b.bus, "lock.x")
        bus.may_hear = False
        locks = Locks(bus, NAMES, "wiki", b.session, b.register)
        await a.bus.write(subject("lock.x"), msgspec.json.encode(Holder(a.session.id, "n")))
        fence = Fence(LEADER, epoch)
        waiting = asyncio.create_task(locks.under(fence, epoch).acquire("x", timeout=60))
        async with asyncio.timeout(30):
            while not ((seen := await a.locks.holder("x")) and seen.waiters):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await a.bus.write(LEADER, b"{}")
        await a.session.die()
        with pytest.raises(Fenced):
            await waiting
        await locks.close()


async def test_holder_whose_write_the_server_lost_learns_it_when_it_is_back(nats_server: NatsServer) -> None:
    """The server comes back without the grant, and has given the same revision to another: lost, not held
    twice."""
    async with node("a", nats_server.url()) as a:
        bus: Any = Meddling(a.bus, "lock.x")
        locks = Locks(bus, NAMES, "wiki", a.session, a.register)
        held = await locks.acquire("x", timeout=10)
        await until(lambda: held.is_watched)
        bus.other = msgspec.json.encode(Holder(SessionId("z", "1"), "z"))
        for callback in list(bus.connection):
            callback(Connection.CONNECTED)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(held.lost.wait(), 20)
        with pytest.raises(LockLost, match="overwritten"):
            held.check()
        bus.other = None
        await held.release()
        await locks.close()


async def test_those_who_come_after_the_queue_are_told_of_all_that_ends(nats_server: NatsServer) -> None:
    """More tasks wait than stand in the queue: the later ones time out, are refused, fenced and told of the
    session's end as the first ones are, and what is given up leaves its place to them."""
    async with node("a", nats_server.url()) as a, node("b", nats_server.url()) as b:
        epoch = await a.bus.write(LEADER, b"{}")
        held = await a.locks.acquire("x", timeout=10)
        under = b.locks.under(Fence(LEADER, epoch), epoch)
        fenced = [asyncio.create_task(under.acquire("x", timeout=60)) for _ in range(MOST_QUEUED)]
        later = [asyncio.create_task(under.acquire("x", timeout=60)) for _ in range(3)]
        plain = [asyncio.create_task(b.locks.acquire("x", timeout=60)) for _ in range(2 * MOST_QUEUED)]
        await asyncio.sleep(0)
        with pytest.raises(LockTimeout):
            await b.locks.acquire("x", timeout=0.1)
        with pytest.raises(LockTimeout):
            await b.locks.acquire("x", timeout=0)
        await a.bus.write(LEADER, b"{}")
        ended = await asyncio.wait_for(asyncio.gather(*fenced, *later, return_exceptions=True), 30)
        assert {type(each) for each in ended} == {Fenced}
        plain[0].cancel()
        await asyncio.gather(plain.pop(0), return_exceptions=True)
        await held.release()
        first = await asyncio.wait_for(plain.pop(0), 30)
        await first.release()
        second = await asyncio.wait_for(plain.pop(0), 30)
        assert not any(each.done() for each in plain)
        b.session.lose("the keeper is gone")
        ended = await asyncio.wait_for(asyncio.gather(*plain, return_exceptions=True), 30)
        assert {type(each) for each in ended} == {SessionLost}
        assert second.lost.is_set()
        await second.release()
        assert b.session.listeners == 0

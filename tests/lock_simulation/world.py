"""The server, the connections and the sessions of one schedule."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any

from phalanx import system
from phalanx.coord.lock_body import Kind, decode_state
from phalanx.decide.lock import Entry, LockState
from phalanx.errors import BusTimeout, BusUnavailable, WrongRevision
from phalanx.names import Names
from phalanx.ports import Connection, Fence, Message, Record
from phalanx.types import SessionId

NAMES = Names("sim")
TIMEOUT_SECONDS = 2.0
LONGEST_DELAY_SECONDS = 4.0
"""How late a message may arrive that its sender has given up."""


class Violation(Exception):
    """A promise is broken."""


class Server:
    """What is stored, in one order; and the network's faults, while there are any."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.faults = True
        self.ignores_expectations = False
        self.sequence = 0
        self.stored: dict[str, Record] = {}
        self.buses: list[SimulatedBus] = []
        self.truly_over: set[SessionId] = set()
        self.counts: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    def count(self, what: str) -> None:
        """Coverage."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def chance(self, probability: float) -> bool:
        """Whether a fault happens."""
        return self.faults and self.rng.random() < probability

    def delay(self) -> float:
        """Of one message."""
        return self.rng.uniform(0.0005, 0.02 if self.faults else 0.002)

    def write(self, subject: str, data: bytes, expect: int | None, headers: Mapping[str, str]) -> int:
        """Store it, or raise WrongRevision."""
        there = self.stored.get(subject)
        revision = there.revision if there is not None else 0
        if expect is not None and expect != revision and not self.ignores_expectations:
            self.count("refused writes")
            raise WrongRevision(subject, expect, revision)
        self.sequence += 1
        record = Record(subject, data, self.sequence, dict(headers), 0.0)
        self._check(subject, there, record)
        self.stored[subject] = record
        for bus in self.buses:
            bus.republished(record, revision)
        return self.sequence

    def _check(self, subject: str, there: Record | None, record: Record) -> None:
        """What each write of a lock's key has to keep."""
        kind = Kind.SEMAPHORE if ".semaphore." in subject else Kind.LOCK
        before = decode_state(kind, there) if there is not None else LockState()
        after = decode_state(kind, record)
        if len(after.holders) > after.permits:
            raise Violation(f"{subject}: {len(after.holders)} holders of {after.permits} permits")
        old = {each.nonce for each in before.holders}
        granted = [each for each in after.holders if each.nonce not in old]
        if len(granted) > 1:
            raise Violation(f"{subject}: two grants with one token")
        for each in granted:
            if each.token <= self.tokens.get(subject, 0):
                raise Violation(f"{subject}: token {each.token} after {self.tokens[subject]}")
            self.tokens[subject] = each.token
            self._check_turn(subject, before, after, each)
            self.count("grants")

    def _check_turn(self, subject: str, before: LockState, after: LockState, granted: Entry) -> None:
        """Whoever stands before it in the queue has not been passed over while it waits still."""
        left = {each.nonce for each in after.queue}
        for each in before.queue:
            if each.nonce == granted.nonce:
                self.count("handed over")
                return
            if each.nonce in left:
                raise Violation(f"{subject}: {granted.nonce} was granted before {each.nonce}")


class SimulatedBus:
    """One node's connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._subscribed: list[tuple[str, Callable[[Message], Awaitable[None] | None]]] = []
        self._callbacks: list[Callable[[Connection], None]] = []
        self.is_up, self._arrives_at = True, 0.0
        server.buses.append(self)

    async def write(
        self,
        subject: str,
        data: bytes = b"",
        *,
        expect: int | None = None,
        fence: Fence | None = None,
        headers: Mapping[str, str] | None = None,
        ttl_seconds: float | None = None,
        timeout: float = 2.0,
    ) -> int:
        """See ports.Bus.write."""
        server, loop = self._server, asyncio.get_running_loop()
        if not self.is_up:
            raise BusUnavailable(f"write {subject}", "not connected")
        if server.chance(0.03):
            server.count("spurious refusals")
            await asyncio.sleep(server.delay())
            raise WrongRevision(subject, expect or 0, None)
        if server.chance(0.05):
            server.count("late writes")
            late = server.rng.uniform(0, LONGEST_DELAY_SECONDS)
            loop.call_later(late, self._arrive, subject, data, expect, headers or {})
            await asyncio.sleep(TIMEOUT_SECONDS)
            raise BusTimeout(f"write {subject}", "no answer")
        await asyncio.sleep(server.delay())
        if not self.is_up:
            raise BusTimeout(f"write {subject}", "disconnected")
        revision = server.write(subject, data, expect, headers or {})
        if server.chance(0.05):
            server.count("lost replies")
            await asyncio.sleep(TIMEOUT_SECONDS)
            raise BusTimeout(f"write {subject}", "no answer")
        await asyncio.sleep(server.delay())
        return revision

    def _arrive(self, subject: str, data: bytes, expect: int | None, headers: Mapping[str, str]) -> None:
        try:
            self._server.write(subject, data, expect, headers)
        except WrongRevision:
            pass
        else:
            self._server.count("late writes stored")

    async def read(self, stream: str, subject: str, *, timeout: float = 2.0) -> Record | None:
        """See ports.Bus.read."""
        if not self.is_up:
            raise BusUnavailable(f"read {subject}", "not connected")
        if self._server.chance(0.03):
            await asyncio.sleep(TIMEOUT_SECONDS)
            raise BusTimeout(f"read {subject}", "no answer")
        await asyncio.sleep(self._server.delay())
        found = self._server.stored.get(subject)
        await asyncio.sleep(self._server.delay())
        return found

    async def snapshot(self, stream: str, subjects: str, *, timeout: float = 2.0) -> list[Record]:
        """See ports.Bus.snapshot."""
        found = await self.read(stream, subjects)
        return [found] if found is not None else []

    def republished(self, record: Record, before: int) -> None:
        """The stream tells what it has stored; in order, but not all of it has to arrive."""
        if not self.is_up or self._server.chance(0.05):
            return
        loop = asyncio.get_running_loop()
        self._arrives_at = max(self._arrives_at, loop.time() + self._server.delay())
        headers = {
            "Nats-Subject": record.subject,
            "Nats-Sequence": str(record.revision),
            "Nats-Last-Sequence": str(before),
        }
        loop.call_at(self._arrives_at, self._deliver, Message(record.subject, record.data, headers))

    def _deliver(self, message: Message) -> None:
        for key, callback in list(self._subscribed):
            if message.subject.endswith(key):
                callback(message)

    async def subscribe(
        self, subject: str, on_message: Callable[[Message], Awaitable[None] | None], *, queue: str = ""
    ) -> Any:
        """See ports.Bus.subscribe."""
        key = "." + subject.split(".watch.kv.")[1]
        entry = (key, on_message)
        self._subscribed.append(entry)
        bus = self

        class Subscription:
            async def unsubscribe(self) -> None:
                if entry in bus._subscribed:
                    bus._subscribed.remove(entry)

        return Subscription()

    def on_connection(self, callback: Callable[[Connection], None]) -> Callable[[], None]:
        """See ports.Bus.on_connection."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def missed(self) -> None:
        """See ports.Bus.missed."""

    def connect(self, *, up: bool) -> None:
        """The connection breaks, or is there again."""
        self.is_up = up
        for callback in list(self._callbacks):
            callback(Connection.CONNECTED if up else Connection.DISCONNECTED)


class SimulatedSession:
    """One session. Its own node stops believing in it before others find it over."""

    def __init__(self, node: str) -> None:
        self.id = SessionId.new(node)
        self.valid_until, self.lost_reason = float("inf"), ""
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_valid(self) -> bool:
        """By its own clock."""
        return system.now() < self.valid_until

    def on_change(self, callback: Callable[[], None]) -> None:
        """See HoldingSession."""
        self._callbacks.append(callback)

    def off_change(self, callback: Callable[[], None]) -> None:
        """See HoldingSession."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def ends_at(self, moment: float) -> None:
        """It will not be renewed."""
        self.valid_until = moment


class SimulatedRegister:
    """What one node knows of the sessions that are over."""

    def __init__(self) -> None:
        self.over: set[SessionId] = set()
        self._callbacks: list[Callable[[SessionId], None]] = []

    def is_over(self, session: SessionId) -> bool:
        """See Judges."""
        return session in self.over

    def note(self, session: SessionId) -> None:
        """See Judges."""

    def unnote(self, session: SessionId) -> None:
        """See Judges."""

    def on_over(self, callback: Callable[[SessionId], None]) -> None:
        """See Judges."""
        self._callbacks.append(callback)

    def off_over(self, callback: Callable[[SessionId], None]) -> None:
        """See Judges."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def tell(self, session: SessionId) -> None:
        """It is found over."""
        self.over.add(session)
        for callback in list(self._callbacks):
            callback(session)

"""One lock's key: what it holds, when it is free, and what this node sees of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from phalanx.coord.watch import Watch
from phalanx.names import LEADER_KEY, Names
from phalanx.ports import Bus, Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.locks")


class HoldingSession(Protocol):
    """What locks need of :class:`phalanx.coord.session.Session`."""

    @property
    def id(self) -> SessionId: ...
    @property
    def is_valid(self) -> bool: ...
    @property
    def lost_reason(self) -> str: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...
    def off_change(self, callback: Callable[[], None]) -> None: ...


class Sessions(Protocol):
    """What locks need of :class:`phalanx.coord.register.Register`."""

    def is_over(self, session: SessionId) -> bool: ...
    def note(self, session: SessionId) -> None: ...
    def on_over(self, callback: Callable[[SessionId], None]) -> None: ...
    def off_over(self, callback: Callable[[SessionId], None]) -> None: ...


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a lock's key says. ``session`` None: nobody holds it. ``epoch`` 0: held by no leader."""

    session: SessionId | None = None
    nonce: str = ""
    epoch: int = 0


_holder_of = msgspec.json.Decoder(Holder).decode


class Parts(msgspec.Struct, frozen=True):
    """What all locks of one app on one node share."""

    bus: Bus
    names: Names
    app: str
    session: HoldingSession
    register: Sessions

    @property
    def bucket(self) -> str:
        """The app's bucket."""
        return self.names.app_bucket(self.app)

    @property
    def stream(self) -> str:
        """The stream behind it."""
        return self.names.bucket_stream(self.bucket)

    def subject(self, key: str) -> str:
        """Where a key of the bucket is stored."""
        return self.names.key_subject(self.bucket, key)


class LockKey:
    """The key ``lock.<name>`` as this node knows it; ``changed`` is called when something may be different.

    What is known may lag: whether a lock is taken is decided by compare-and-set alone. It never runs
    ahead: a lock that counts as free here is free, until somebody takes it.
    """

    def __init__(self, parts: Parts, name: str, changed: Callable[[], None]) -> None:
        self._parts, self._name, self.changed = parts, name, changed
        self.subject = parts.subject(f"lock.{name}")
        self.leader_subject = parts.subject(LEADER_KEY)
        self.revision = 0
        self.holder = Holder()
        self.leader_revision = 0
        self._watches: dict[str, Watch] = {}
        self._starting: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Begin to listen to what ends sessions."""
        self._parts.register.on_over(self._on_over)
        self._parts.session.on_change(self._on_session)

    async def close(self) -> None:
        """No longer listen, no longer watch."""
        self._parts.register.off_over(self._on_over)
        self._parts.session.off_change(self._on_session)
        self.changed = _nothing
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for watch in self._watches.values():
            await watch.close()

    # --- what is so

    @property
    def is_free(self) -> bool:
        """Whether nobody holds it: released, never taken, its session is over, or its epoch is."""
        session = self.holder.session
        if session is None or self._parts.register.is_over(session):
            return True
        return 0 < self.holder.epoch < self.leader_revision

    def holder_text(self) -> str:
        """Who holds it, for people."""
        if self.holder.session is None:
            return "nobody"
        return f"{self.holder.session}" + (f" in epoch {self.holder.epoch}" if self.holder.epoch else "")

    async def read(self) -> None:
        """Learn the key from the stream's leader. Raises BusError."""
        record = await self._parts.bus.read(self._parts.stream, self.subject)
        # None: never written, or gone with its TTL. Also a bucket that lost its data: so the leader's
        # word counts, whatever was known before.
        self.revision, self.holder = (record.revision, decode_holder(record)) if record else (0, Holder())
        self._note()
        if self.holder.epoch:
            await self.read_leader()

    async def read_leader(self) -> int:
        """Learn the app's leader key from the stream's leader: its revision is the epoch. Raises BusError."""
        record = await self._parts.bus.read(self._parts.stream, self.leader_subject)
        revision = record.revision if record else 0
        self.leader_revision = max(self.leader_revision, revision)
        return revision

    def learn(self, revision: int, holder: Holder) -> None:
        """Something newer was seen or written."""
        if revision > self.revision:
            self.revision, self.holder = revision, holder
            self._note()
            self.changed()

    def _note(self) -> None:
        session = self.holder.session
        if session is not None and session != self._parts.session.id:
            self._parts.register.note(session)

    # --- watching

    def watch(self, *, leader: bool) -> None:
        """Have changes brought here from now on; *leader*: those of the leader key too."""
        self._start(f"lock.{self._name}", self._on_record)
        if leader:
            self._start(LEADER_KEY, self._on_leader)

    @property
    def is_watched(self) -> bool:
        """Whether the state has been read by every watch that was asked for."""
        return bool(self._watches) and not self._starting

    def _start(self, key: str, on_record: Callable[[Record], None]) -> None:
        if key in self._watches:
            return
        self._watches[key] = watch = Watch(
            self._parts.bus,
            self._parts.stream,
            self._parts.subject(key),
            watch_prefix=f"{self._parts.names.watch_prefix(self._parts.app)}.{key}",
            on_record=on_record,
        )
        task = asyncio.create_task(watch.start(), name=f"watch {key}")
        self._starting.add(task)
        task.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("lock %s: watching it failed: %s", self._name, error)

    def _on_record(self, record: Record) -> None:
        if record.removed and record.revision == self.revision:
            # It vanished without a marker.
            self.holder = Holder()
            self.changed()
            return
        self.learn(record.revision, decode_holder(record))

    def _on_leader(self, record: Record) -> None:
        if record.revision > self.leader_revision:
            self.leader_revision = record.revision
            self.changed()

    def _on_over(self, session: SessionId) -> None:
        if session == self.holder.session:
            self.changed()

    def _on_session(self) -> None:
        self.changed()


def decode_holder(record: Record) -> Holder:
    """What a lock's key says; what can't be read says that nobody holds it."""
    if record.removed or not record.data:
        return Holder()
    try:
        return _holder_of(record.data)
    except msgspec.DecodeError as error:
        log.error("%s holds no lock (%s); it counts as free", record.subject, error)
        return Holder()


def _nothing() -> None:
    pass

"""One lock's or semaphore's key as this node sees it: what it says, and whoever is named there."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from phalanx import system
from phalanx.coord.lock_body import Kind, decode_state
from phalanx.coord.lock_claim import Parts
from phalanx.coord.noted_sessions import NotedSessions
from phalanx.coord.watch import Watch
from phalanx.decide.lock import Entry, LockState
from phalanx.names import LEADER_KEY
from phalanx.ports import Connection, Fence, Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.locks")

STALE_SECONDS = 0.2
"""An answer older than what was seen may be that of a server which does not know yet that it leads no more:
it is asked for again after this."""

REFRESH_SECONDS = 5.0
"""Who waits reads the key again after so long: the message that it is its turn may have been lost."""


class KeyView(ABC):
    """The key ``<kind>.<name>``. What is known of it may lag: compare-and-set alone decides who holds it."""

    def __init__(self, parts: Parts, kind: Kind, name: str) -> None:
        self._parts, self.kind, self.name = parts, kind, name
        self.subject = parts.subject(parts.names.lock_key(kind, name))
        self.revision = 0
        self.state = LockState()
        self.leader_revision = 0
        self._read_at = float("-inf")
        """When the stream's leader was asked last, of what it has answered."""
        self._listening = self._closed = False
        self._is_unsure = False
        """Whether it has to be read from the leader, whatever is known."""
        self._end_connection_watch = parts.bus.on_connection(self._on_connection)
        self._noted = NotedSessions(parts.register)
        self._watches: dict[str, Watch] = {}
        self._starting: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # --- for whoever wants something of it

    @abstractmethod
    def look(self) -> None:
        """What is known has changed."""

    @abstractmethod
    def kick(self) -> None:
        """Something may be due."""

    @abstractmethod
    def _on_learnt(self, under: Fence | None) -> None:
        """There is another state; by a write of ours *under* that fence, if it was one."""

    @property
    @abstractmethod
    def _is_awaited(self) -> bool:
        """Whether somebody here waits for it to change."""

    @property
    @abstractmethod
    def _is_held(self) -> bool:
        """Whether somebody here holds it."""

    # --- what is so

    def is_over(self, entry: Entry) -> bool:
        """Whether its session is over for good, or its epoch is."""
        return self._parts.register.is_over(entry.session) or 0 < entry.epoch < self.leader_revision

    def is_mine(self, entry: Entry) -> bool:
        """Whether a claim of this very object stands there."""
        return entry.session == self._parts.session.id and entry.nonce.startswith(self._parts.mark)

    def holder_text(self) -> str:
        """Who holds it, for people."""
        if not self.state.holders:
            return "nobody"
        return ", ".join(
            f"{each.session}"
            + (f" in epoch {each.epoch}" if each.epoch else "")
            + (" (this node)" if each.session == self._parts.session.id else "")
            for each in self.state.holders
        )

    @property
    def is_watched(self) -> bool:
        """Whether the state has been read by every watch that was asked for."""
        return bool(self._watches) and not self._starting

    def _mine(self) -> list[Entry]:
        return [each for each in (*self.state.holders, *self.state.queue) if self.is_mine(each)]

    # --- what is learnt

    def _learn(self, revision: int, state: LockState, under: Fence | None = None) -> None:
        self.revision, self.state = revision, state
        self._note()
        self._on_learnt(under)

    def _note(self) -> None:
        """The register judges whoever is named in the key, even if no session stream holds it."""
        if self.state.is_idle and not self._noted:
            return
        named: set[SessionId] = set()
        if self._listening:
            named = {each.session for each in (*self.state.holders, *self.state.queue)}
            named.discard(self._parts.session.id)
        self._noted.are(named)

    async def read(self) -> None:
        """Learn the key from the stream's leader. Raises BusError."""
        asked_at = system.now()
        record = await self._parts.bus.read(self._parts.stream, self.subject)
        if (record.revision if record else 0) < self.revision:
            await asyncio.sleep(STALE_SECONDS)
            record = await self._parts.bus.read(self._parts.stream, self.subject)
        # None: never written, or gone with its TTL. Also a bucket that lost its data: so the leader's
        # word counts, whatever was known before.
        self._read_at, self._is_unsure = asked_at, False
        if record is None:
            self._learn(0, LockState())
        else:
            state = decode_state(self.kind, record)
            if any(each.epoch for each in (*state.holders, *state.queue)):
                await self.read_leader()
            self._learn(record.revision, state)

    async def read_leader(self) -> int:
        """Learn the app's leader key from the stream's leader: its revision is the epoch. Raises BusError."""
        record = await self._parts.bus.read(self._parts.stream, self._parts.subject(LEADER_KEY))
        revision = record.revision if record else 0
        self.leader_revision = max(self.leader_revision, revision)
        return revision

    # --- watching

    def watch(self, *, leader: bool = False) -> None:
        """Have changes brought here from now on; those of the leader key, too, where an epoch matters
        (*leader*: in any case)."""
        if self._closed:
            return
        self._start(self._parts.names.lock_key(self.kind, self.name), self._on_record)
        entries = (*self.state.holders, *self.state.queue)
        if leader or any(each.epoch for each in entries):
            self._start(LEADER_KEY, self._on_leader)
        self._arm("refresh", REFRESH_SECONDS, self._refresh)

    def _refresh(self) -> None:
        """A message that was lost must not keep the whole queue waiting."""
        if self._is_awaited:
            for watch in self._watches.values():
                watch.refresh()
            self._arm("refresh", REFRESH_SECONDS, self._refresh)

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
            log.error("%s %s: watching it failed: %s", self.kind, self.name, error)

    def _on_record(self, record: Record) -> None:
        if record.removed and record.revision == self.revision:
            self._learn(self.revision, LockState())  # it vanished without a marker
        elif record.revision > self.revision:
            state = decode_state(self.kind, record)
            self._learn(record.revision, state)
            if any(each.epoch for each in (*state.holders, *state.queue)):
                self.watch()
        else:
            return
        self.kick()

    def _on_leader(self, record: Record) -> None:
        if record.revision > self.leader_revision:
            self.leader_revision = record.revision
            self.look()
            self.kick()

    def _on_connection(self, event: Connection) -> None:
        """What is held is read back, as a leader's key is: a server that has lost its last writes may have
        given the same revision to somebody else, which no watch would show."""
        if event is Connection.CONNECTED and self._is_held:
            self._is_unsure = True
            self.kick()

    async def _unwatch(self) -> None:
        self._end_connection_watch()
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for watch in self._watches.values():
            await watch.close()
        self._watches.clear()

    # --- sessions that end

    def _listen(self) -> None:
        """Begin to listen to what ends sessions."""
        if not self._listening:
            self._listening = True
            self._parts.register.on_over(self._on_over)
            self._parts.session.on_change(self._on_session)
            self._note()

    def _unlisten(self) -> None:
        if self._listening:
            self._listening = False
            self._parts.register.off_over(self._on_over)
            self._parts.session.off_change(self._on_session)
            self._note()

    def _on_over(self, session: SessionId) -> None:
        if session in self._noted:
            self.kick()

    def _on_session(self) -> None:
        self.look()
        self.kick()

    # --- timers

    def _arm(self, what: str, seconds: float, call: Callable[[], None]) -> None:
        if what not in self._timers and not self._closed:
            loop = asyncio.get_running_loop()
            self._timers[what] = loop.call_later(seconds, self._fire, what, call)

    def _fire(self, what: str, call: Callable[[], None]) -> None:
        del self._timers[what]
        call()

    def _disarm(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()


__all__ = ["KeyView"]

"""Everybody's sessions, as this node observes them; and the tombstones it writes for the dead."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import msgspec

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.coord.watch import Watch
from phalanx.decide.session import Observer, SessionBody, StreamList, Tombstone
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, WrongRevision
from phalanx.keeper.renewing import TOMBSTONE_KEPT_SECONDS
from phalanx.names import Names
from phalanx.ports import Bus, Connection, Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.register")

MAX_REASONS = 256
"""Of so many ended sessions it is remembered why they ended."""

_body_of = msgspec.json.Decoder(SessionBody).decode
_encode = msgspec.json.Encoder().encode


class Register:
    """Drives :class:`phalanx.decide.session.Observer` from one watch per session stream."""

    def __init__(
        self, bus: Bus, names: Names, streams: StreamList, timing: Timing, me: SessionId | None = None
    ) -> None:
        self._bus, self._names, self._timing = bus, names, timing
        self.me = me
        """This node's own session, which it never ends as an observer."""
        self._observer = Observer(streams, timing, system.now())
        self._watches: dict[str, Watch] = {}
        self._background = Background(log)
        self._absent: dict[SessionId, set[str]] = {}
        self._list_since = float("-inf")
        self._callbacks: list[Callable[[SessionId], None]] = []
        self._changed = asyncio.Event()
        self._burying: set[Tombstone] = set()
        self._caught_up: set[str] = set()
        self._noted: Counter[SessionId] = Counter()
        self._reasons: dict[SessionId, str] = {}
        self.heard_at = system.now()
        """When a session stream was last heard."""
        self.ready = asyncio.Event()
        """Set once a majority of session streams has been read for the first time."""

    # --- what is so

    @property
    def streams(self) -> StreamList:
        """The list of session streams in use."""
        return self._observer.streams

    def is_over(self, session: SessionId) -> bool:
        """Whether *session* has ended, for good."""
        return self._observer.is_over(session)

    def why_over(self, session: SessionId) -> str:
        """Why *session* has ended, as its tombstone says; empty where that is not known (any more)."""
        return self._reasons.get(session, "")

    def ended_itself(self, session: SessionId) -> bool:
        """Whether its own node or keeper has ended *session*, after all that hung on it was gone."""
        return self._observer.ended_itself(session)

    def live(self) -> list[SessionId]:
        """The sessions that are not over."""
        return self._observer.live()

    def seen_generation(self, session: SessionId) -> int:
        """Under which generation of the stream list *session* renews by majority."""
        return self._observer.seen_generation(session)

    def caught_up(self, stream: str) -> bool:
        """Whether the state of *stream* was read since it is in the list."""
        return stream in self._caught_up

    def has_caught_up_majority(self) -> bool:
        """Whether a majority of every list was read since the list is this one."""
        return self._observer.streams.has_majority(self._caught_up)

    def note(self, session: SessionId) -> None:
        """Something refers to *session*: judge it even if no stream holds it."""
        self._noted[session] += 1
        self._observer.note(session, system.now())
        self._changed.set()

    def unnote(self, session: SessionId) -> None:
        """One reference less."""
        self._noted[session] -= 1
        if self._noted[session] <= 0:
            del self._noted[session]

    def on_over(self, callback: Callable[[SessionId], None]) -> None:
        """Be told of each session that ends."""
        self._callbacks.append(callback)

    def off_over(self, callback: Callable[[SessionId], None]) -> None:
        """No longer be told."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    async def wait_over(self, session: SessionId, timeout: float) -> bool:
        """Wait until *session* is over; False if *timeout* seconds passed first."""
        done = asyncio.Event()

        def ended(which: SessionId) -> None:
            if which == session:
                done.set()

        self.on_over(ended)
        try:
            if self.is_over(session):
                return True
            return await wait_at_most(done, timeout)
        finally:
            self.off_over(ended)

    # --- the loop

    async def use_streams(self, streams: StreamList) -> None:
        """Follow a new list of session streams."""
        self._tell(self._observer.on_streams(streams, system.now()))
        # ``caught_up`` means: since the list is this one. Sessions that began just before must be seen.
        self._caught_up.clear()
        self._list_since = system.now()
        for watch in self._watches.values():
            watch.refresh()
        self._watch_streams()
        self._changed.set()

    async def start_over(self, streams: StreamList) -> None:
        """Forget every verdict and observe anew: for a node that may have missed changes of the list.

        Wait for ``ready`` afterwards.
        """
        for watch in self._watches.values():
            self._background.spawn(watch.close(), "unwatch sessions")
        self._watches.clear()
        self._list_since = system.now()
        self._absent.clear()
        self._caught_up.clear()
        self.ready.clear()
        self._observer = Observer(streams, self._timing, system.now())
        for session in self._noted:
            self._observer.note(session, system.now())
        self._watch_streams()
        self._changed.set()

    async def run(self) -> None:
        """Watch and write tombstones until cancelled."""
        self._watch_streams()
        stop_listening = self._bus.on_connection(self._on_connection)
        try:
            while True:
                self._changed.clear()
                now = system.now()
                for tombstone in self._observer.tombstones(now, except_for=self.me):
                    if tombstone not in self._burying:
                        self._burying.add(tombstone)
                        self._background.spawn(self._bury(tombstone), f"bury {tombstone.session}")
                # A stream that fell silent is heard again without any call of ours, so look regularly.
                longest = self._timing.renew_every if self._suspects(now) else self._timing.ttl / 4
                seconds = min(self._observer.next_check(now) - now, longest)
                await wait_at_most(self._changed, max(0.01, seconds))
        finally:
            stop_listening()
            for watch in self._watches.values():
                await watch.close()
            self._watches.clear()
            await self._background.close()
            self._burying.clear()  # also of those that were cancelled before their first step

    def _suspects(self, now: float) -> bool:
        return self._observer.next_check(now) - now < self._timing.ttl / 4

    def _watch_streams(self) -> None:
        """Begin and end watches. None waits for another: the server of one stream may be down for long."""
        wanted = self._observer.streams.all_streams
        for name in set(self._watches) - set(wanted):
            self._background.spawn(self._watches.pop(name).close(), f"unwatch {name}")
            self._caught_up.discard(name)
        for name in wanted:
            if name not in self._watches:
                self._watches[name] = watch = self._make_watch(name)
                self._background.spawn(watch.start(), f"watch {name}")

    def _make_watch(self, stream: str) -> Watch:
        return Watch(
            self._bus,
            stream,
            self._names.session_subjects(stream),
            watch_prefix=self._names.session_watch(stream),
            on_record=lambda record: self._on_record(stream, record),
            on_catch_up=lambda records, interrupted, asked_at: self._on_catch_up(
                stream, records, interrupted, asked_at
            ),
            monotonic=False,
        )

    # --- what was seen

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            # At once, not only when the catch-ups come: what was not heard meanwhile must end nobody.
            self._observer.on_interrupted(None, system.now())

    def _on_record(self, stream: str, record: Record) -> None:
        session = self._names.session_of(record.subject)
        self.heard_at = system.now()
        if record.removed:
            self._is_absent(session, stream)  # a tombstone whose time is up
            return
        body = _body_of(record.data)
        self._note_reason(session, body)
        self._tell(self._observer.on_record(stream, session, record.revision, body, system.now()))

    def _on_catch_up(self, stream: str, records: list[Record], interrupted: bool, asked_at: float) -> None:
        keys = {
            self._names.session_of(record.subject): (record.revision, _body_of(record.data))
            for record in records
            if not record.removed
        }
        for session, (_, body) in keys.items():
            self._note_reason(session, body)
        over = self._observer.on_catch_up(
            stream, keys, system.now(), interrupted=interrupted, asked_at=asked_at
        )
        for session in self._observer.known():
            if session not in keys:
                self._is_absent(session, stream)
            elif session in self._absent:
                self._absent[session].discard(stream)
        if asked_at >= self._list_since:
            # One that was asked for under an earlier list proves nothing about this one.
            self._caught_up.add(stream)
            if self._observer.streams.has_majority(self._caught_up):
                self.ready.set()
        self._tell(over)
        self._changed.set()

    def _note_reason(self, session: SessionId, body: SessionBody) -> None:
        if body.tombstone and session not in self._reasons:
            self._reasons[session] = body.reason
            while len(self._reasons) > MAX_REASONS:
                del self._reasons[next(iter(self._reasons))]

    def _is_absent(self, session: SessionId, stream: str) -> None:
        """Forget a session that ended so long ago that its tombstones are gone, unless a key may name it."""
        if session in self._noted or not self._observer.is_over(session):
            return
        absent = self._absent.setdefault(session, set())
        absent.add(stream)
        if self._observer.streams.has_majority(absent):
            self._observer.forget(session)
            del self._absent[session]

    def _tell(self, over: list[SessionId]) -> None:
        for session in over:
            log.info("session %s is over", session)
            for callback in list(self._callbacks):
                callback(session)
        if over:
            self._changed.set()

    # --- what is done

    async def _bury(self, tombstone: Tombstone) -> None:
        body = SessionBody(
            self._observer.streams.generation, True, "expired", self.me.node if self.me else "observer"
        )
        try:
            revision = await self._bus.write(
                self._names.session_subject(tombstone.stream, tombstone.session),
                _encode(body),
                expect=tombstone.revision,
                ttl_seconds=TOMBSTONE_KEPT_SECONDS,
                timeout=max(0.2, min(1.0, self._timing.ttl / 5)),
            )
            self._note_reason(tombstone.session, body)
            self._tell(
                self._observer.on_record(tombstone.stream, tombstone.session, revision, body, system.now())
            )
        except WrongRevision:
            log.debug("session %s was renewed in %s after all", tombstone.session, tombstone.stream)
            await asyncio.sleep(self._timing.renew_every)  # the watch brings what was written
        except BusError as error:
            log.warning("ending session %s in %s: %s", tombstone.session, tombstone.stream, error)
            await asyncio.sleep(self._timing.renew_every)
        finally:
            self._burying.discard(tombstone)
            self._changed.set()

    async def bury_own(self, session: SessionId, reason: str) -> None:
        """End an earlier session of this very node, whose end this process vouches for. Best effort."""
        for stream in self._observer.streams.all_streams:
            subject = self._names.session_subject(stream, session)
            try:
                record = await self._bus.read(stream, subject, timeout=1.0)
                if record is not None and not record.removed and _body_of(record.data).tombstone:
                    continue
                await self._bus.write(
                    subject,
                    _encode(SessionBody(self._observer.streams.generation, True, reason, session.node, True)),
                    expect=record.revision if record else 0,
                    ttl_seconds=TOMBSTONE_KEPT_SECONDS,
                    timeout=1.0,
                )
            except BusError as error:
                log.warning("ending the earlier session %s in %s: %s", session, stream, error)

"""The session register: who is alive, decided by majority over session streams.

A session is one key in each session stream. Its :class:`Holder` (in the keeper) renews the keys by
compare-and-set; an :class:`Observer` (in every node) ends it by writing tombstones.

Invariants, each of which the simulator checks:

* A holder counts a renewal from the moment it SENT it; an observer from when it RECEIVED it.
* A session is valid while, in every list of the configuration, a majority of streams acknowledged
  a renewal sent less than ``timing.hold`` ago. Once that has passed it is never renewed again.
* An observer writes a tombstone only into a stream where the session is stale, only when stale and
  tombstoned streams together are a majority of every list, and only by compare-and-set on the
  revision that it saw there.
* A session is over when a majority of every list are tombstones. That never turns back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from phalanx.decide.timing import Timing
from phalanx.types import SessionId

NEVER = float("-inf")


class StreamList(msgspec.Struct, frozen=True):
    """Which streams carry sessions. While one is replaced there are two lists, as raft changes members.

    ``following`` is empty except during a replacement; then a renewal and an end each need a
    majority of ``streams`` and a majority of ``following``.
    """

    generation: int
    streams: tuple[str, ...]
    following: tuple[str, ...] = ()

    @property
    def is_joint(self) -> bool:
        """Whether a replacement is under way."""
        return bool(self.following)

    @property
    def lists(self) -> tuple[tuple[str, ...], ...]:
        """The lists that each need a majority."""
        return (self.streams, self.following) if self.following else (self.streams,)

    @property
    def all_streams(self) -> tuple[str, ...]:
        """Every stream of any list, each once."""
        return tuple(dict.fromkeys(self.streams + self.following))

    def has_majority(self, chosen: Iterable[str]) -> bool:
        """Whether *chosen* holds more than half of every list."""
        have = set(chosen)
        return all(len(have.intersection(names)) > len(names) // 2 for names in self.lists)

    def majority_newest(self, times: Mapping[str, float]) -> float:
        """The latest moment t such that, in every list, a majority of streams have a time >= t."""
        oldest = float("inf")
        for names in self.lists:
            newest_first = sorted((times.get(name, NEVER) for name in names), reverse=True)
            oldest = min(oldest, newest_first[len(names) // 2])
        return oldest

    def joint_with(self, following: tuple[str, ...]) -> StreamList:
        """The first step of a replacement."""
        if self.is_joint:
            raise ValueError("a replacement is under way already")
        return StreamList(self.generation + 1, self.streams, following)

    def settled(self) -> StreamList:
        """The second step: the new list alone."""
        if not self.is_joint:
            raise ValueError("no replacement is under way")
        return StreamList(self.generation + 1, self.following)


class SessionBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a session key holds: a renewal, or the tombstone that ends it."""

    generation: int = 0
    tombstone: bool = False
    reason: str = ""
    by: str = ""
    released: bool = False
    """Of a tombstone: written by the holder's own side, after all that hung on the session was gone. If not,
    an observer found it silent, and what hung on it may go on."""


class Renewal(msgspec.Struct, frozen=True):
    """Send the session's key to *stream*, expecting *revision* there (0: nothing)."""

    stream: str
    revision: int


@dataclass(slots=True)
class _Slot:
    revision: int = 0
    acked_sent_at: float = NEVER
    in_flight: bool = False
    must_read: bool = False
    tombstoned: bool = False
    absent_since: float | None = None
    """Set when the server turned out to hold no key of ours although it had one: it lost data."""


class Holder:
    """The keeper's side of one session. Drive it with what happened; ask it what to send."""

    def __init__(self, session: SessionId, streams: StreamList, timing: Timing) -> None:
        self.session = session
        self.timing = timing
        self.streams = streams
        self._slots: dict[str, _Slot] = {name: _Slot() for name in streams.all_streams}
        self._expired = False
        self._ended = False
        self._valid_until = NEVER
        self._kept_until = NEVER

    # --- what is so

    @property
    def valid_until(self) -> float:
        """The end of the session's validity as known now; -inf before a majority has acknowledged."""
        return self._valid_until

    def _refresh(self) -> None:
        sent = {name: slot.acked_sent_at for name, slot in self._slots.items()}
        self._valid_until = max(self.streams.majority_newest(sent) + self.timing.hold, self._kept_until)
        # A majority of tombstones in either list of a joint one is the end: somebody who knows only that list
        # has found the session over. And what has ended stays so when its streams leave the list.
        buried = {n for n, slot in self._slots.items() if slot.tombstoned}
        lists = self.streams.lists
        self._ended = self._ended or any(len(buried.intersection(names)) > len(names) // 2 for names in lists)

    def is_valid(self, now: float) -> bool:
        """Whether the session is the holder's at *now*. False for good once it was false after true."""
        if self._valid_until == NEVER or self._expired or self._ended:
            return False
        if now >= self._valid_until:
            self._expired = True
        return not self._expired

    @property
    def is_ended(self) -> bool:
        """Whether a majority of this session's keys are known to be tombstones."""
        return self._ended

    @property
    def is_expired(self) -> bool:
        """Whether the validity was seen to run out (checked by :meth:`is_valid` and :meth:`renewals`)."""
        return self._expired

    def revisions(self) -> dict[str, int]:
        """The last known revision of the key in each stream: where a release writes its tombstones."""
        return {name: slot.revision for name, slot in self._slots.items() if not slot.tombstoned}

    # --- what to do

    def renewals(self, now: float) -> list[Renewal]:
        """What to send now. Each one counts as in flight until acked, refused or unanswered."""
        if self._ended or (self._valid_until != NEVER and not self.is_valid(now)):
            return []
        due: list[Renewal] = []
        for name in self.streams.all_streams:
            slot = self._slots[name]
            if slot.in_flight or slot.must_read or slot.tombstoned:
                continue
            if slot.absent_since is not None and not self._others_accept_since(name, slot.absent_since):
                continue
            slot.in_flight = True
            due.append(Renewal(name, slot.revision))
        return due

    def reads(self) -> list[str]:
        """Streams whose key must be read back, because a compare-and-set there was refused."""
        return [name for name, slot in self._slots.items() if slot.must_read]

    def _others_accept_since(self, absent: str, since: float) -> bool:
        # A key is put anew only while a majority WITHOUT this stream still takes renewals that were
        # sent after the loss was seen: a machine revived from a snapshot, with its clock, fails this.
        accepting = [n for n, s in self._slots.items() if n != absent and s.acked_sent_at >= since]
        return self.streams.has_majority(accepting)

    # --- what happened

    def on_ack(self, stream: str, sent_at: float, revision: int) -> None:
        """*stream* stored the renewal that was sent at *sent_at*, as *revision*."""
        slot = self._slots.get(stream)
        if slot is None:
            return
        slot.in_flight = False
        if revision < slot.revision and slot.absent_since is None:
            return
        slot.revision = revision
        slot.absent_since = None
        slot.must_read = False
        slot.acked_sent_at = max(slot.acked_sent_at, sent_at)
        self._refresh()

    def on_refused(self, stream: str) -> None:
        """The compare-and-set on *stream* was refused: somebody wrote, or it was our own lost reply."""
        if slot := self._slots.get(stream):
            slot.in_flight = False
            slot.must_read = True

    def on_unanswered(self, stream: str) -> None:
        """No answer came; the renewal may or may not have been stored."""
        if slot := self._slots.get(stream):
            slot.in_flight = False

    def on_read(self, stream: str, revision: int, body: SessionBody | None, now: float) -> None:
        """What *stream* holds under our key (*body* None: nothing), read from its leader."""
        slot = self._slots.get(stream)
        if slot is None:
            return
        slot.must_read = False
        if body is None:
            if slot.absent_since is None and slot.revision != 0:
                slot.absent_since = now
            slot.revision = 0
        elif body.tombstone:
            slot.tombstoned = True
            self._refresh()
        else:
            # Only this holder writes renewals under this key, so it is an earlier one of ours. It
            # does not count as an acknowledgement: we do not know which sending it was.
            slot.revision = revision

    def on_streams(self, streams: StreamList) -> None:
        """The configuration changed. An older generation is ignored."""
        if streams.generation <= self.streams.generation:
            return
        if streams.streams == self.streams.streams and not self.streams.is_joint:
            # The first step of a replacement. What a majority of the old list holds stays good until it
            # runs out: an end needs a majority of the old list too, and nobody counts the new list
            # alone before this session was seen to use both.
            self._kept_until = self._valid_until
        else:
            # Whoever settles the new list has waited only for sessions that renewed in both. One that sent
            # something, but never had a majority, may have been found over by tombstones in streams that it
            # will not look at any more.
            if self._valid_until == NEVER and any(s.in_flight or s.revision for s in self._slots.values()):
                self._ended = True
            self._kept_until = NEVER
        self.streams = streams
        for name in streams.all_streams:
            self._slots.setdefault(name, _Slot())
        for name in set(self._slots) - set(streams.all_streams):
            del self._slots[name]
        self._refresh()


class Tombstone(msgspec.Struct, frozen=True):
    """End *session* in *stream*, expecting *revision* there (0: nothing)."""

    stream: str
    session: SessionId
    revision: int


@dataclass(slots=True)
class _Seen:
    revision: int
    received_at: float
    tombstone: bool = False
    generation: int = 0
    released: bool = False


@dataclass(slots=True)
class _Known:
    first_seen_at: float
    keys: dict[str, _Seen] = field(default_factory=lambda: {})
    over: bool = False


@dataclass(slots=True)
class _Heard:
    resumed_at: float
    """Nothing received on this stream before this moment counts: the watch was interrupted."""
    last_at: float


class Observer:
    """A node's side of everybody's sessions (its own included)."""

    def __init__(self, streams: StreamList, timing: Timing, now: float) -> None:
        self.streams = streams
        self.timing = timing
        self._gap, self._observe = timing.gap, timing.observe
        self._heard = {name: _Heard(now, NEVER) for name in streams.all_streams}
        self._known: dict[SessionId, _Known] = {}

    # --- what happened

    def on_record(
        self, stream: str, session: SessionId, revision: int, body: SessionBody, now: float
    ) -> list[SessionId]:
        """A key was written (or found by a catch-up). Returns the sessions that this shows to be over."""
        heard = self._heard.get(stream)
        if heard is None:
            return []
        if now - heard.last_at > self._gap:
            heard.resumed_at = now  # silent for too long: whatever was sent meanwhile was not received
        heard.last_at = now
        known = self._known.setdefault(session, _Known(now))
        seen = known.keys.get(stream)
        if seen is not None and revision < seen.revision:
            heard.resumed_at = now  # the stream's sequence went back: its server lost its last writes
        # The same number again is a second delivery, or a new record on a stream whose sequence went back
        # while we were deaf: counting from now is safe for both. And a tombstone stays one, even if its
        # server loses it: ended is ended.
        buried = body.tombstone or (seen is not None and seen.tombstone)
        released = (body.tombstone and body.released) or (seen is not None and seen.released)
        known.keys[stream] = _Seen(revision, now, buried, body.generation, released)
        return self._check_over([session]) if buried else []

    def on_catch_up(
        self,
        stream: str,
        keys: Mapping[SessionId, tuple[int, SessionBody]],
        now: float,
        *,
        interrupted: bool,
        asked_at: float,
    ) -> list[SessionId]:
        """The whole state of *stream*. *interrupted*: the watch may have missed records before it.

        *asked_at* is when the catch-up was requested: keys first heard of after that are not
        taken for missing.
        """
        heard = self._heard.get(stream)
        if heard is None:
            return []
        if interrupted or now - heard.last_at > self._gap:
            heard.resumed_at = now
        heard.last_at = now
        over: list[SessionId] = []
        for session, (revision, body) in keys.items():
            known = self._known.get(session)
            seen = known.keys.get(stream) if known else None
            if seen is not None and revision < seen.revision and seen.received_at >= asked_at:
                continue  # a newer one came by the watch while this answer was under way
            if seen is not None and revision == seen.revision and body.tombstone == seen.tombstone:
                continue  # nothing new: a dead session's last renewal does not become younger by reading it
            over += self.on_record(stream, session, revision, body, now)
        for session, known in self._known.items():
            seen = known.keys.get(stream)
            if (
                session not in keys
                and seen is not None
                and seen.received_at < asked_at
                and not seen.tombstone
            ):
                # It was there and is gone: the server lost data. Expect nothing there from now on.
                heard.resumed_at = now
                known.keys[stream] = _Seen(0, now)
        return over

    def on_interrupted(self, stream: str | None, now: float) -> None:
        """The watch of *stream* (None: of all) was interrupted and has just resumed."""
        for name, heard in self._heard.items():
            if stream is None or name == stream:
                heard.resumed_at = now

    def note(self, session: SessionId, now: float) -> None:
        """Somebody refers to *session* (a member or leader key): judge it even if no stream holds it."""
        self._known.setdefault(session, _Known(now))

    def forget(self, session: SessionId) -> None:
        """Drop a session that is over and that nothing refers to any more."""
        if (known := self._known.get(session)) and known.over:
            del self._known[session]

    def on_streams(self, streams: StreamList, now: float) -> list[SessionId]:
        """The configuration changed. An older generation is ignored."""
        if streams.generation <= self.streams.generation:
            return []
        self.streams = streams
        for name in streams.all_streams:
            self._heard.setdefault(name, _Heard(now, NEVER))
        for name in set(self._heard) - set(streams.all_streams):
            del self._heard[name]
            for known in self._known.values():
                known.keys.pop(name, None)
        return self._check_over(list(self._known))

    # --- what is so

    def is_over(self, session: SessionId) -> bool:
        """Whether *session* has ended, for good."""
        known = self._known.get(session)
        return known is not None and known.over

    def ended_itself(self, session: SessionId) -> bool:
        """Whether *session*'s own side has ended it, so that nothing of it goes on. One such tombstone is
        enough: none is written before that is so, whoever buries the rest."""
        known = self._known.get(session)
        return known is not None and any(seen.released for seen in known.keys.values())

    def live(self) -> list[SessionId]:
        """Every known session that is not over."""
        return [session for session, known in self._known.items() if not known.over]

    def known(self) -> list[SessionId]:
        """Every session known here, over or not."""
        return list(self._known)

    def seen_generation(self, session: SessionId) -> int:
        """The newest generation that a majority of *session*'s keys were renewed under; -1 if none."""
        known = self._known.get(session)
        if known is None:
            return -1
        generations = {name: float(seen.generation) for name, seen in known.keys.items()}
        newest = self.streams.majority_newest(generations)
        return int(newest) if newest != NEVER else -1

    def _check_over(self, sessions: Iterable[SessionId]) -> list[SessionId]:
        newly: list[SessionId] = []
        for session in sessions:
            known = self._known[session]
            if known.over:
                continue
            if self.streams.has_majority(n for n, seen in known.keys.items() if seen.tombstone):
                known.over = True
                newly.append(session)
        return newly

    # --- what to do

    def _stale_at(self, stream: str, known: _Known) -> float:
        """From when on *known* is stale in *stream*; +inf while that stream is not being heard."""
        heard = self._heard[stream]
        seen = known.keys.get(stream)
        since = seen.received_at if seen else known.first_seen_at
        return max(since, heard.resumed_at) + self._observe

    def tombstones(self, now: float, *, except_for: SessionId | None = None) -> list[Tombstone]:
        """The tombstones to write now, for every session that has gone stale by majority."""
        due: list[Tombstone] = []
        for session, known in self._known.items():
            if known.over or session == except_for:
                continue
            buried = {name for name, seen in known.keys.items() if seen.tombstone}
            stale = [
                name
                for name, heard in self._heard.items()
                if name not in buried
                and now - heard.last_at <= self._gap
                and now >= self._stale_at(name, known)
            ]
            # A session that somebody began to end is finished off as soon as the rest is stale.
            if stale and self.streams.has_majority(buried.union(stale)):
                for name in stale:
                    seen = known.keys.get(name)
                    due.append(Tombstone(name, session, seen.revision if seen else 0))
        return due

    def next_check(self, now: float) -> float:
        """The next moment at which :meth:`tombstones` may have something, if nothing else happens."""
        moments = [
            stale_at
            for known in self._known.values()
            if not known.over
            for name in self._heard
            if (stale_at := self._stale_at(name, known)) > now
        ]
        return min(moments, default=now + self.timing.ttl)

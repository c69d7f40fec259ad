"""One lock's or semaphore's key on this node: what it says, and all that this node wants of it.

Whatever tasks of this node want (to hold it, to give it up) is a set of claims. One writer for each key
brings the key in line with them by compare-and-set, all at once: many tasks cost no more writes than one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

import msgspec

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.coord.lock_body import Kind, decode_state, encode_state
from phalanx.coord.watch import Watch
from phalanx.decide.lock import Entry, LockState, as_stored, is_free, next_state, without_over
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    Fenced,
    LockTimeout,
    SessionLost,
    WrongRevision,
)
from phalanx.names import LEADER_KEY, Names
from phalanx.ports import Bus, Fence, Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.locks")

RETRY_SECONDS = 0.1
OTHERS_SECONDS = (0.1, 0.3)
"""What another node has to do about the key is done by this one if it is not done after so long."""

STALE_SECONDS = 0.2
"""An answer older than what was seen may be that of a server which does not know yet that it leads no more:
it is asked for again after this."""

REFUSED_SECONDS = 0.01
"""A write may be refused only because another one is being replicated."""

REFRESH_SECONDS = 5.0
"""Who waits reads the key again after so long: the message that it is its turn may have been lost."""

REFUSED_KEPT_SECONDS = 5.0
"""What NATS refuses for another reason (a missing right) is not tried again before."""

UNWATCHED_SECONDS = 0.02
"""Who holds a lock for less is spared the watch."""

IDLE_SECONDS = 10.0
"""A key that nobody here wants is still watched for so long: taking it again costs one round trip then."""

RELEASED_KEPT_SECONDS = 3600
"""After a release the key stays that long: longer than any write that expects none can be on its way.
Revisions grow without it too: they are the stream's."""

MOST_QUEUED = 128
"""So many tasks of a session stand in a queue at once; those beyond come after them."""

_RELEASED_HEADERS = {"Nats-Rollup": "sub"}


class HoldingSession(Protocol):
    """What locks need of :class:`phalanx.coord.session.Session`."""

    @property
    def id(self) -> SessionId: ...
    @property
    def is_valid(self) -> bool: ...
    @property
    def valid_until(self) -> float: ...
    @property
    def lost_reason(self) -> str: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...
    def off_change(self, callback: Callable[[], None]) -> None: ...


class Sessions(Protocol):
    """What locks need of :class:`phalanx.coord.register.Register`."""

    def is_over(self, session: SessionId) -> bool: ...
    def note(self, session: SessionId) -> None: ...
    def unnote(self, session: SessionId) -> None: ...
    def on_over(self, callback: Callable[[SessionId], None]) -> None: ...
    def off_over(self, callback: Callable[[SessionId], None]) -> None: ...


class Parts(msgspec.Struct, frozen=True):
    """What all locks of one app (None: of the platform itself) on one node share.

    ``mark``: how the nonces of claims begin that are made through it, so that it knows its own.
    """

    bus: Bus
    names: Names
    app: str | None
    session: HoldingSession
    register: Sessions
    settling: Background
    mark: str = ""

    @property
    def bucket(self) -> str:
        """The app's bucket."""
        return self.names.app_bucket(self.app) if self.app is not None else self.names.platform_bucket

    @property
    def stream(self) -> str:
        """The stream behind it."""
        return self.names.bucket_stream(self.bucket)

    def subject(self, key: str) -> str:
        """Where a key of the bucket is stored."""
        return self.names.key_subject(self.bucket, key)


class Claim:
    """One wish to hold a permit, from when it is made until it was given up or lost.

    ``settled`` is set when it is granted, or has failed with ``error``; ``lost`` when what was granted is
    gone. *only_now*: it fails where it would have to wait.
    """

    def __init__(self, entry: Entry, fence: Fence | None, *, only_now: bool) -> None:
        self.entry, self.fence, self.only_now = entry, fence, only_now
        self.token = 0
        self.made_at = system.now()
        self.settled, self.lost = asyncio.Event(), asyncio.Event()
        self.lost_reason = ""
        self.error: Exception | None = None
        self.is_confirmed = False
        """Whether the write that granted it was fenced by its own epoch."""

    def grant(self, token: int, under: Fence | None) -> None:
        """It holds a permit from now on, by a write that was fenced so."""
        self.token, self.is_confirmed = token, under == self.fence
        self.settled.set()

    def fail(self, error: Exception) -> None:
        """It will not be granted."""
        self.error = error
        self.settled.set()

    @property
    def waits(self) -> bool:
        """Whether it is neither granted nor refused yet."""
        return not self.settled.is_set()

    @property
    def is_held(self) -> bool:
        """Whether it was granted and not lost since, as far as is known."""
        return bool(self.token) and not self.lost.is_set()


class LockKey:
    """The key ``<kind>.<name>`` as this node knows it, and this node's claims to it.

    What is known may lag: who holds it is decided by compare-and-set alone.
    """

    def __init__(
        self, parts: Parts, kind: Kind, name: str, permits: int, on_unused: Callable[[LockKey], None]
    ) -> None:
        self._parts, self.kind, self.name, self.permits = parts, kind, name, permits
        self._on_unused = on_unused
        self.subject = parts.subject(parts.names.lock_key(kind, name))
        self.revision = 0
        self.state = LockState()
        self.leader_revision = 0
        self.claims: dict[str, Claim] = {}
        self.problem: BusError | None = None
        """Why the latest attempt to write came to nothing, where NATS did not answer."""
        self._used_at = system.now()
        self._read_at = float("-inf")
        """When the stream's leader was asked last, of what it has answered."""
        self._doubt: int | None = None
        """The revision that a write of ours, whose outcome is not known, expected."""
        self._busy = self._listening = self._overdue = self._closed = False
        self._moved = asyncio.Event()
        self._noted: set[SessionId] = set()
        self._watches: dict[str, Watch] = {}
        self._starting: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}

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

    @property
    def is_idle(self) -> bool:
        """Whether nobody here wants anything of it, and nothing is in doubt."""
        return not self.claims and not self._busy and self._doubt is None

    # --- claims

    async def add(self, claim: Claim) -> None:
        """Make *claim* one of this node's, and do what can be done at once."""
        self.claims[claim.entry.nonce] = claim
        self._listen()
        if self._busy:
            return
        await self._advance(claim)

    async def remove(self, claim: Claim, seconds: float) -> None:
        """Give *claim* up, whatever it is; returns when the key says so, or after *seconds*."""
        self.drop(claim, kick=False)
        if not self._busy:
            await self._advance(None, once=True)
        deadline = system.now() + seconds
        while any(each.nonce == claim.entry.nonce for each in self._mine()):
            if not self._parts.session.is_valid:
                return
            if system.now() >= deadline:
                log.warning("%s %s: its release is not confirmed yet", self.kind, self.name)
                return
            self._moved.clear()
            await wait_at_most(self._moved, RETRY_SECONDS)

    async def settle(self, deadline: float) -> None:
        """Wait until nothing is left to do about the key, at most until *deadline*."""
        while system.now() < deadline and (self._busy or self._due() is not None):
            self.kick()
            self._moved.clear()
            await wait_at_most(self._moved, RETRY_SECONDS)

    def drop(self, claim: Claim, *, kick: bool = True) -> None:
        """The same without waiting."""
        self.claims.pop(claim.entry.nonce, None)
        self._used_at = system.now()
        if not self.claims:
            self._unlisten()
            self._arm("unused", IDLE_SECONDS, self._on_idle)
        if kick:
            self.kick()

    def _mine(self) -> list[Entry]:
        return [each for each in (*self.state.holders, *self.state.queue) if self.is_mine(each)]

    def look(self, under: Fence | None = None) -> None:
        """Tell every claim how it stands. *under*: the fence of the write by which this came about."""
        session = self._parts.session
        over = (
            "" if session.is_valid else f"session {session.id} is over: {session.lost_reason or 'it ran out'}"
        )
        for claim in list(self.claims.values()):
            if claim.waits:
                self._look_at_waiting(claim, over, under)
            elif claim.is_held:
                self._look_at_held(claim, over)

    def _look_at_waiting(self, claim: Claim, over: str, under: Fence | None) -> None:
        session = self._parts.session
        if over:
            claim.fail(SessionLost(str(session.id), session.lost_reason or "it ran out"))
        elif claim.fence is not None and self.leader_revision > claim.fence.revision:
            claim.fail(Fenced(self._parts.app or "", claim.entry.epoch))
        elif (held := self.state.holder(claim.entry.nonce)) is not None:
            claim.grant(held.token, under)
            self._arm("watch", UNWATCHED_SECONDS, self._watch)
            self._arm_clock()

    def _look_at_held(self, claim: Claim, over: str) -> None:
        held = self.state.holder(claim.entry.nonce)
        if not over and claim.fence is not None and self.leader_revision > claim.fence.revision:
            over = f"epoch {claim.fence.revision} is over"
        elif not over and (held is None or held.token != claim.token):
            over = f"its key was overwritten, now held by {self.holder_text()}"
            if self.state.by:
                over = f"it was taken away by {self.state.by}"
        if over:
            self._lose(claim, over)

    def _lose(self, claim: Claim, reason: str) -> None:
        claim.lost_reason = reason
        claim.lost.set()
        log.error("%s %s (token %d) is lost: %s", self.kind, self.name, claim.token, reason)

    # --- what is learnt

    def _learn(self, revision: int, state: LockState, under: Fence | None = None) -> None:
        if revision != self._doubt:
            self._doubt = None  # whatever is still on its way will be refused
        self.revision, self.state = revision, state
        self._overdue = False
        self._disarm("others")
        self._note()
        self.look(under)
        self._moved.set()

    def _note(self) -> None:
        """The register judges whoever is named in the key, even if no session stream holds it."""
        if self.state.is_idle and not self._noted:
            return
        named: set[SessionId] = set()
        if self._listening:
            named = {each.session for each in (*self.state.holders, *self.state.queue)}
            named.discard(self._parts.session.id)
        for session in named - self._noted:
            self._parts.register.note(session)
        for session in self._noted - named:
            self._parts.register.unnote(session)
        self._noted = named

    async def read(self) -> None:
        """Learn the key from the stream's leader. Raises BusError."""
        asked_at = system.now()
        record = await self._parts.bus.read(self._parts.stream, self.subject)
        if (record.revision if record else 0) < self.revision:
            await asyncio.sleep(STALE_SECONDS)
            record = await self._parts.bus.read(self._parts.stream, self.subject)
        # None: never written, or gone with its TTL. Also a bucket that lost its data: so the leader's
        # word counts, whatever was known before.
        self._read_at = asked_at
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

    # --- bringing the key in line

    def kick(self) -> None:
        """Have what is due done in the background."""
        if self._closed or self._busy or "retry" in self._timers:
            return
        if self._due() is not None or self._has_to_read:
            self._busy = True
            self._parts.settling.spawn(self._advance(None), f"{self.kind} {self.name}")

    def _active(self) -> list[Claim]:
        """The claims that the key has to know, in the order they came: all that are held, some that wait."""
        found: list[Claim] = []
        left = without_over(self.state, self.is_over)
        free = self.permits - len(left.holders) - len(left.queue)
        new = {claim.entry.nonce for claim in self._new_claims()}
        waiting = 0
        for claim in self.claims.values():
            if claim.is_held:
                found.append(claim)
            elif claim.waits:
                waiting += 1
                is_new = claim.entry.nonce in new
                if waiting <= MOST_QUEUED and not (is_new and claim.only_now and free <= 0):
                    found.append(claim)
                    free -= is_new
        return found

    def _due(self) -> tuple[LockState, Fence | None] | None:
        """What the key has to say, and what that write is fenced by; None: nothing to do here."""
        session = self._parts.session
        if not session.is_valid or self._parts.register.is_over(session.id):
            return None
        self._refuse_now()
        claims = self._active()
        known = {each.nonce for each in self._mine()}
        fence = next((c.fence for c in claims if c.fence is not None and c.entry.nonce not in known), None)
        entries = [
            claim.entry
            for claim in claims
            if claim.entry.nonce in known or claim.fence is None or claim.fence == fence
        ]
        permits = self.permits if claims else self.state.permits
        wanted = next_state(self.state, permits, self.is_mine, entries, self.is_over)
        unchanged = (wanted.holders, wanted.queue) == (self.state.holders, self.state.queue)
        if unchanged and self._doubt is None:
            return None
        if self._doubt is None and not self._is_own_business(wanted) and not self._overdue:
            self._arm("others", random.uniform(*OTHERS_SECONDS), self._on_overdue)
            return None
        return wanted, fence

    def _refuse_now(self) -> None:
        """Fail the claims that can't be granted as things are: those that do not wait, those of other
        permits."""
        left = without_over(self.state, self.is_over)
        for claim in self._new_claims():
            if self._read_at < claim.made_at:
                continue
            if self._is_other(left):
                claim.fail(_other_permits(self.name, self.permits, left.permits, self.holder_text()))
            elif claim.only_now and not is_free(left):
                claim.fail(LockTimeout(self.name, 0, self.holder_text()))

    def _new_claims(self) -> list[Claim]:
        """Those that wait and do not stand in the key yet."""
        known = {each.nonce for each in self._mine()}
        return [each for each in self.claims.values() if each.waits and each.entry.nonce not in known]

    @property
    def _has_to_read(self) -> bool:
        """Whether what is known does not do to decide about a claim."""
        unread = [claim for claim in self._new_claims() if self._read_at < claim.made_at]
        if not unread:
            return False
        left = without_over(self.state, self.is_over)
        if self._is_other(left):
            return True
        return not is_free(left) and (not self.is_watched or any(claim.only_now for claim in unread))

    def _is_other(self, state: LockState) -> bool:
        """Whether it is used with another number of permits than here."""
        return not state.is_idle and state.permits != self.permits

    def _is_own_business(self, wanted: LockState) -> bool:
        """Whether it is about this node: not only about the dead, with another node's task next in the
        queue."""
        mine = {each.nonce for each in self._mine()}
        new = {each.nonce for each in (*wanted.holders, *wanted.queue)}
        if mine - new or any(each.nonce not in mine for each in self._mine_in(wanted)):
            return True
        before = {each.nonce for each in self.state.holders}
        return any(self.is_mine(each) for each in wanted.holders if each.nonce not in before)

    def _mine_in(self, state: LockState) -> list[Entry]:
        return [each for each in (*state.holders, *state.queue) if self.is_mine(each)]

    def _on_overdue(self) -> None:
        self._overdue = True
        self.kick()

    async def _advance(self, mine: Claim | None, *, once: bool = False) -> None:
        """Bring the key in line. For *mine* only until it stands in the key, or failed; *once*: one
        attempt."""
        self._busy = True
        try:
            while True:
                self.look()
                if mine is not None and (not mine.waits or self._stands(mine)):
                    return
                try:
                    if self._has_to_read:
                        await self.read()
                    if (due := self._due()) is None:
                        return
                    await self._write(*due)
                    self.problem = None
                except (BusUnavailable, BusTimeout) as error:
                    self._unanswered(error)
                    if once or mine is not None:
                        self._arm("retry", RETRY_SECONDS * random.uniform(0.1, 1), self.kick)
                        return
                    await asyncio.sleep(RETRY_SECONDS * random.uniform(0.1, 1))
                except BusError as error:
                    self._refused(error)
                    return
                if once:
                    return
        finally:
            self._busy = False
            self._moved.set()
            if any(claim.waits for claim in self.claims.values()):
                self._watch()
                self._arm_clock()
            self.kick()

    def _stands(self, claim: Claim) -> bool:
        return any(each.nonce == claim.entry.nonce for each in self.state.queue)

    def _unanswered(self, error: BusError) -> None:
        self.problem = error
        for claim in list(self.claims.values()):
            if claim.waits and claim.only_now:
                claim.fail(error)

    def _refused(self, error: BusError) -> None:
        """NATS refuses to do it: no use in trying again soon."""
        log.error("%s %s: %s", self.kind, self.name, error)
        self._doubt = None
        self._arm("retry", REFUSED_KEPT_SECONDS, self.kick)
        for claim in list(self.claims.values()):
            if claim.waits:
                claim.fail(error)

    async def _write(self, wanted: LockState, fence: Fence | None) -> None:
        """Write the key, unless somebody else has meanwhile; either way it is known afterwards what it
        says."""
        expect, before = self.revision, self._doubt
        self._doubt = expect
        released = wanted.is_idle
        try:
            revision = await self._parts.bus.write(
                self.subject,
                encode_state(self.kind, wanted),
                expect=expect,
                fence=fence,
                headers=_RELEASED_HEADERS if released else None,
                ttl_seconds=RELEASED_KEPT_SECONDS if released else None,
            )
        except (WrongRevision, BusTimeout) as error:
            # Neither proves anything about who wrote: what is stored does.
            await self.read()
            await self._check_fence(fence)
            if self.revision != expect:
                return
            if isinstance(error, BusTimeout):
                raise
            self._doubt = before
            await asyncio.sleep(random.uniform(0, REFUSED_SECONDS))
        except BusUnavailable:
            self._doubt = before
            raise
        else:
            if revision > self.revision:
                self._learn(revision, as_stored(wanted, revision), fence)

    async def _check_fence(self, fence: Fence | None) -> None:
        if fence is None or await self.read_leader() == fence.revision:
            return
        for claim in list(self.claims.values()):
            if claim.waits and claim.fence == fence:
                claim.fail(Fenced(self._parts.app or "", claim.entry.epoch))

    async def confirm(self, claim: Claim) -> None:
        """Of a claim under an epoch that was granted by a write without its fence: that the epoch lasts still.
        Raises Fenced, BusError."""
        if claim.fence is None or claim.is_confirmed:
            return
        if await self.read_leader() != claim.fence.revision:
            raise Fenced(self._parts.app or "", claim.entry.epoch)

    # --- watching

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
            self._disarm("watch")
            self._disarm("clock")
            self._note()

    def _on_idle(self) -> None:
        if self.claims:
            return
        left = self._used_at + IDLE_SECONDS - system.now()
        if left > 0 or not self.is_idle:
            self._arm("unused", max(0.1, left), self._on_idle)
        else:
            self._on_unused(self)

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

    def _arm_clock(self) -> None:
        """Look when the session runs out: nobody else may be there to say so."""
        left = self._parts.session.valid_until - system.now()
        if left < float("inf"):
            self._arm("clock", max(0.001, left), self._on_clock)

    def _on_clock(self) -> None:
        self.look()
        if any(claim.is_held or claim.waits for claim in self.claims.values()):
            self._arm_clock()

    def _watch(self) -> None:
        """Have changes brought here from now on; those of the leader key, too, where a claim needs that."""
        if self._closed:
            return
        self._start(self._parts.names.lock_key(self.kind, self.name), self._on_record)
        entries = (*self.state.holders, *self.state.queue)
        if any(each.epoch for each in entries) or any(c.fence is not None for c in self.claims.values()):
            self._start(LEADER_KEY, self._on_leader)
        self._arm("refresh", REFRESH_SECONDS, self._refresh)

    def _refresh(self) -> None:
        """A message that was lost must not keep the whole queue waiting."""
        if any(claim.waits for claim in self.claims.values()):
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

    async def close(self) -> None:
        """No longer listen, no longer watch. Whoever holds it, or waits, is told: nobody looks after it
        now."""
        self._closed = True
        self.look()
        session = self._parts.session
        for claim in self.claims.values():
            if claim.waits:
                claim.fail(SessionLost(str(session.id), "its node ends it"))
            elif claim.is_held:
                self._lose(claim, f"session {session.id} ends")
        self._unlisten()
        for what in list(self._timers):
            self._disarm(what)
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for watch in self._watches.values():
            await watch.close()
        self._watches.clear()

    def _on_record(self, record: Record) -> None:
        if record.removed and record.revision == self.revision:
            self._learn(self.revision, LockState())  # it vanished without a marker
        elif record.revision > self.revision:
            state = decode_state(self.kind, record)
            self._learn(record.revision, state)
            if any(each.epoch for each in (*state.holders, *state.queue)):
                self._watch()
        else:
            return
        self.kick()

    def _on_leader(self, record: Record) -> None:
        if record.revision > self.leader_revision:
            self.leader_revision = record.revision
            self.look()
            self.kick()

    def _on_over(self, session: SessionId) -> None:
        if session in self._noted:
            self.kick()

    def _on_session(self) -> None:
        self.look()
        self.kick()


def _other_permits(name: str, wanted: int, there: int, holders: str) -> ConfigError:
    return ConfigError(
        "permits",
        wanted,
        f"semaphore {name} has {there} permits now, held by {holders}",
        "declare the same everywhere; it may change while nobody holds it or waits",
    )


__all__ = ["Claim", "HoldingSession", "LockKey", "Parts", "Sessions"]

"""One lock's or semaphore's key on this node: what it says, and all that this node wants of it.

Whatever tasks of this node want (to hold it, to give it up) is a set of claims. One writer for each key
brings the key in line with them by compare-and-set, all at once: many tasks cost no more writes than one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.coord.lock_body import Kind, encode_state
from phalanx.coord.lock_claim import Claim, Parts
from phalanx.coord.lock_view import KeyView
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
from phalanx.ports import Fence

log = logging.getLogger("phalanx.locks")

RETRY_SECONDS = 0.1
OTHERS_SECONDS = (0.1, 0.3)
"""What another node has to do about the key is done by this one if it is not done after so long."""

REFUSED_SECONDS = 0.01
"""A write may be refused only because another one is being replicated."""

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


class LockKey(KeyView):
    """This node's claims to one key, and what has to be done about it."""

    def __init__(
        self, parts: Parts, kind: Kind, name: str, permits: int, on_unused: Callable[[LockKey], None]
    ) -> None:
        super().__init__(parts, kind, name)
        self.permits, self._on_unused = permits, on_unused
        self.claims: dict[str, Claim] = {}
        """Those that are looked at: all that hold, and as many that wait as may stand in the queue."""
        self._later: dict[str, Claim] = {}
        """Those that come after them. Nothing is done for each of them until it is its turn."""
        self._looked_at_leader = 0
        self.problem: BusError | None = None
        """Why the latest attempt to write came to nothing, where NATS did not answer."""
        self._used_at = system.now()
        self._doubt: int | None = None
        """The revision that a write of ours, whose outcome is not known, expected."""
        self._busy = self._overdue = False
        self._moved = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether nobody here wants anything of it, and nothing is in doubt."""
        return not self.claims and not self._busy and self._doubt is None

    # --- claims

    async def add(self, claim: Claim) -> None:
        """Make *claim* one of this node's, and do what can be done at once."""
        self._listen()
        if not claim.only_now and (self._later or self._waiting >= MOST_QUEUED):
            self._later[claim.entry.nonce] = claim
            self.look()
            return
        self.claims[claim.entry.nonce] = claim
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
        self._later.pop(claim.entry.nonce, None)
        self._move_up()
        self._used_at = system.now()
        if not self.claims:
            self._unlisten()
            self._disarm("watch")
            self._disarm("clock")
            self._arm("unused", IDLE_SECONDS, self._on_idle)
        if kick:
            self.kick()

    def look(self, under: Fence | None = None) -> None:
        """Tell every claim how it stands. *under*: the fence of the write by which this came about."""
        session = self._parts.session
        over = (
            "" if session.is_valid else f"session {session.id} is over: {session.lost_reason or 'it ran out'}"
        )
        if over or self.leader_revision != self._looked_at_leader:
            self._looked_at_leader = self.leader_revision
            for claim in [each for each in self._later.values() if each.waits]:
                self._look_at_waiting(claim, over, under)
        for claim in list(self.claims.values()):
            if claim.waits:
                self._look_at_waiting(claim, over, under)
            elif claim.is_held:
                self._look_at_held(claim, over)
        self._move_up()

    @property
    def _waiting(self) -> int:
        return sum(claim.waits for claim in self.claims.values())

    def _move_up(self) -> None:
        """Let those who come later take the places of those who wait no more."""
        if not self._later:
            return
        for nonce in list(itertools.islice(self._later, max(0, MOST_QUEUED - self._waiting))):
            self.claims[nonce] = self._later.pop(nonce)

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

    def _on_learnt(self, under: Fence | None) -> None:
        if self.revision != self._doubt:
            self._doubt = None  # whatever is still on its way will be refused
        self._overdue = False
        self._disarm("others")
        self.look(under)
        self._moved.set()

    @property
    def _is_awaited(self) -> bool:
        return any(claim.waits for claim in self.claims.values())

    @property
    def _is_held(self) -> bool:
        return any(claim.is_held for claim in self.claims.values())

    def _watch(self) -> None:
        self.watch(leader=any(claim.fence is not None for claim in self.claims.values()))

    # --- what is due

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
        is_other = self._is_other(left)
        waiting = 0
        for claim in self.claims.values():
            if claim.is_held:
                found.append(claim)
            elif claim.waits:
                is_new = claim.entry.nonce in new
                if is_new and is_other:
                    continue  # refused as soon as the key was read for it
                waiting += 1
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
        if self._is_unsure and self._parts.session.is_valid:
            return True
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

    # --- bringing the key in line

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
                        self.problem = None
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
            if self._is_awaited:
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
        self.problem = error
        self._arm("retry", REFUSED_KEPT_SECONDS, self.kick)
        for claim in [*self.claims.values(), *self._later.values()]:
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
        except BusError:
            self._doubt = before  # nothing was written; an earlier one may still be on its way
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
        """Of a claim that was granted by a write without its fence: that its epoch lasts still.

        Raises Fenced, BusError.
        """
        if claim.fence is None or claim.is_confirmed:
            return
        if await self.read_leader() != claim.fence.revision:
            raise Fenced(self._parts.app or "", claim.entry.epoch)

    # --- time

    def _on_overdue(self) -> None:
        self._overdue = True
        self.kick()

    def _arm_clock(self) -> None:
        """Look when the session runs out: nobody else may be there to say so."""
        left = self._parts.session.valid_until - system.now()
        if left < float("inf"):
            self._arm("clock", max(0.001, left), self._on_clock)

    def _on_clock(self) -> None:
        self.look()
        if any(claim.is_held or claim.waits for claim in self.claims.values()):
            self._arm_clock()

    def _on_idle(self) -> None:
        if self.claims:
            return
        left = self._used_at + IDLE_SECONDS - system.now()
        if left > 0 or not self.is_idle:
            self._arm("unused", max(0.1, left), self._on_idle)
        else:
            self._on_unused(self)

    async def close(self) -> None:
        """No longer listen, no longer watch. Whoever holds it, or waits, is told: nobody looks after it
        now."""
        self._closed = True
        self.look()
        session = self._parts.session
        for claim in [*self.claims.values(), *self._later.values()]:
            if claim.waits:
                claim.fail(SessionLost(str(session.id), "its node ends it"))
            elif claim.is_held:
                self._lose(claim, f"session {session.id} ends")
        self._unlisten()
        for what in list(self._timers):
            self._disarm(what)
        await self._unwatch()


def _other_permits(name: str, wanted: int, there: int, holders: str) -> ConfigError:
    return ConfigError(
        "permits",
        wanted,
        f"semaphore {name} has {there} permits now, held by {holders}",
        "declare the same everywhere; it may change while nobody holds it or waits",
    )


__all__ = ["LockKey"]

"""Rule breaks, planted on purpose: the simulator must find each of them.

They live here and not in ``src``: each replaces one decision by a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from phalanx.decide.election import choose_successor
from phalanx.decide.fencing import to_be_fenced
from phalanx.decide.hold import ALWAYS, NEVER, Claim, Member, MemberList, Takeover
from phalanx.decide.pause import Cause, ends_section
from phalanx.decide.session import Holder, Observer, StreamList, Tombstone
from phalanx.decide.timing import Timing
from phalanx.types import Candidate, LeaderRecord, SessionId

BREAKS = {
    "keeper-deadline-from-reply": "the keeper counts a renewal from its reply, not from its sending",
    "tombstone-without-cas": "tombstones are written whatever the stream holds",
    "tombstone-into-fresh-stream": "one stale stream is enough to write tombstones into all",
    "leader-key-before-session-over": "the leader key is taken when its holder merely looks stale",
    "release-before-kill": "the keeper ends the session first and kills then",
    "single-list-switch": "a session stream is replaced without the joint list",
    "expiry-from-first-stream": "a session counts as over as soon as one of its keys is a tombstone",
    "taken-in-a-pause": "a free leader key is taken although the app is paused",
    "paused-past-the-session": "in a pause a section outlives its session, as it outlives a failure",
    "no-failover-takes-over": "a node with no_failover takes a free leader key without being named",
    "successor-by-name": "the successor that a release names is chosen by name, whatever its priority",
    "started-before-registered": "a program is started without the keeper knowing of it",
    "released-while-its-program-runs": "the keeper ends the session while what it has killed still dies",
    "warden-sleeps": "the warden does nothing when node and keeper have died",
    "left-overs-ignored": "a keeper begins without ending what an earlier life has left",
    "address-not-probed": "an address is taken although another host answers for it",
    "hold-lease-from-receipt": "a leader counts a promise from its receipt, not from when it was asked for",
    "hold-restarted-follows": "a node that has started takes over although it may have promised not to",
    "hold-unlisted-follows": "a node that is not on the member list takes over",
    "hold-missing-ignored": "a leader goes on with the promises of some of its members",
    "hold-promise-forgotten": "a promise binds its giver for less than its lease",
    "not-fenced-without-a-command": "a node without a fence command starts what has to wait for one",
    "resumption-unheard": "a keeper that is alone goes on although the pause is over",
    "two-lives-take-up": "a second life begins beside the first, and takes up the same session",
    "unfenced-dropped": "who takes the key does not pass on whom others still had to fence",
    "node-ignores-deadline": "neither node nor keeper ends a section when its session runs out",
}
"""Name → what is wrong with it."""


class LateHolder(Holder):
    """Counts from the reply. The driver sets ``reply_at`` before each acknowledgement."""

    reply_at = 0.0

    def on_ack(self, stream: str, sent_at: float, revision: int) -> None:
        """The break."""
        super().on_ack(stream, self.reply_at, revision)


class HastyObserver(Observer):
    """Buries everywhere as soon as one stream is stale."""

    def tombstones(self, now: float, *, except_for: SessionId | None = None) -> list[Tombstone]:
        """The break."""
        due: list[Tombstone] = []
        for session, known in self._known.items():
            if known.over or session == except_for:
                continue
            heard = [n for n, h in self._heard.items() if now - h.last_at <= self.timing.gap]
            if any(now >= self._stale_at(n, known) for n in heard):
                for name in heard:
                    seen = known.keys.get(name)
                    if seen is None or not seen.tombstone:
                        due.append(Tombstone(name, session, seen.revision if seen else 0))
        return due


class CredulousObserver(Observer):
    """Takes one tombstone for the end."""

    def _check_over(self, sessions: Iterable[SessionId]) -> list[SessionId]:
        newly: list[SessionId] = []
        for session in sessions:
            known = self._known[session]
            if not known.over and any(seen.tombstone for seen in known.keys.values()):
                known.over = True
                newly.append(session)
        return newly


class UnlistedMember(Member):
    """Takes over although it is not listed."""

    def takeover(
        self,
        me: str,
        app: str,
        leader: LeaderRecord,
        members: MemberList | None,
        revision: int,
        *,
        gone: bool,
    ) -> Takeover:
        """The break."""
        takeover = super().takeover(me, app, leader, members, revision, gone=gone)
        return Takeover(self.bound_until(app)) if takeover.not_before == ALWAYS else takeover


class ForgetfulMember(Member):
    """Is bound for a tenth of what it has promised."""

    def bound_until(self, app: str) -> float:
        """The break."""
        return super().bound_until(app) - 0.9 * self.timing.observe


class CarelessClaim(Claim):
    """Goes on with those promises that it has."""

    def until(self, now: float) -> float:
        """The break."""
        return max((self._promised.get(n, NEVER) for n in self.asked), default=now) + self.timing.hold


class Rules(msgspec.Struct, frozen=True):
    """Which rule is broken, as the driver asks."""

    broken: str = ""

    @property
    def no_cas(self) -> bool:
        """Tombstones without compare-and-set."""
        return self.broken == "tombstone-without-cas"

    def session_ends_section(self, *, paused: bool) -> bool:
        """Whether a section ends because its session does."""
        return ends_section(
            Cause.FAILED if self.broken == "paused-past-the-session" else Cause.SESSION_ENDS, paused=paused
        )

    def to_be_fenced(
        self, me: SessionId, leader: LeaderRecord, ended_itself: Callable[[SessionId], bool], *, fences: bool
    ) -> tuple[SessionId, ...]:
        """Whom a takeover has to have fenced."""
        if self.broken == "unfenced-dropped":
            leader = msgspec.structs.replace(leader, unfenced=())
        return to_be_fenced(me, leader, ended_itself, fences=fences)

    def choose(
        self, me: SessionId, candidates: Iterable[Candidate], is_over: Callable[[SessionId], bool]
    ) -> str | None:
        """Whom a release names."""
        if self.broken == "successor-by-name":
            candidates = [msgspec.structs.replace(candidate, priority=0) for candidate in candidates]
        return choose_successor(me, candidates, is_over)

    def holder(self, session: SessionId, streams: StreamList, timing: Timing) -> Holder:
        """The holder to drive."""
        kind = LateHolder if self.broken == "keeper-deadline-from-reply" else Holder
        return kind(session, streams, timing)

    def member(self, timing: Timing, now: float) -> Member:
        """The member to drive."""
        kinds = {"hold-unlisted-follows": UnlistedMember, "hold-promise-forgotten": ForgetfulMember}
        began = NEVER if self.broken == "hold-restarted-follows" else now
        return kinds.get(self.broken, Member)(timing, began)

    def claim(self, timing: Timing, me: str) -> Claim:
        """The claim to drive."""
        return (CarelessClaim if self.broken == "hold-missing-ignored" else Claim)(timing, me)

    def observer(self, streams: StreamList, timing: Timing, now: float) -> Observer:
        """The observer to drive."""
        kinds = {"tombstone-into-fresh-stream": HastyObserver, "expiry-from-first-stream": CredulousObserver}
        return kinds.get(self.broken, Observer)(streams, timing, now)

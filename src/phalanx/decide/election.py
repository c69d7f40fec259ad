"""Who leads an active-passive app, given what this node knows.

The leader key changes only when the leader changes, so its revision is the epoch. A candidate
replaces it by compare-and-set when nobody holds it, or when the holder's session is over; since an
ended session stays ended, checking first and replacing after is safe. How long a candidate waits
before it tries decides only who usually wins, never whether it is correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import msgspec

from phalanx.decide.hold import Takeover
from phalanx.types import Candidate, LeaderRecord, Nomination, SessionId

HEAD_START_SECONDS = 0.030
"""What a named successor has before everybody else."""

RANK_STEP_SECONDS = 0.020
"""What each less preferred candidate waits longer. About ten times a compare-and-set's round trip."""


class LeaderBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the leader key holds; the revision is the epoch and comes with the record."""

    session: SessionId | None = None
    successor: str | None = None
    nonce: str = ""
    reason: str = ""
    unfenced: tuple[SessionId, ...] = ()
    fences: bool = False
    hold: bool = False


class View(msgspec.Struct, frozen=True):
    """What one node knows about one app's election.

    ``vacant_since``: when this node learned that the seat is free (meaningless while it is not).
    ``not_before``: this node steps aside until then, after failures of its own. ``no_failover``: this node
    leads only if it is named. ``nomination``: the last one by an operator, for whichever reign.
    """

    me: SessionId
    session_valid: bool
    eligible: bool
    leader: LeaderRecord
    leader_over: bool
    vacant_since: float
    candidates: tuple[Candidate, ...] = ()
    not_before: float = float("-inf")
    leading: int | None = None
    """The epoch this node holds and acts under, if it does."""
    handicap_seconds: float = 0.0
    """How much longer this node waits because another one is likely to have more of the app's data."""
    ended: int = 0
    """The latest epoch whose reign has ended on this node: it never begins again (G2)."""
    no_failover: bool = False
    nomination: Nomination | None = None
    paused: bool = False
    """Nobody takes the key, whatever has become of who held it."""
    held: bool = False
    """The reign of this node goes on without its session: its members have promised so."""
    takeover: Takeover = Takeover()
    """What it takes to take the key from who has it, or has had it."""


class Idle(msgspec.Struct, frozen=True):
    """Nothing to do until something changes."""


class Wait(msgspec.Struct, frozen=True):
    """Look again at that moment."""

    until: float


class Acquire(msgspec.Struct, frozen=True):
    """Replace the leader key by compare-and-set on this revision (0: create it). ``members``: only while the
    member list is at that revision; None: whatever it is at."""

    expected_revision: int
    members: int | None = None


class Begin(msgspec.Struct, frozen=True):
    """The key names this very session although it does not act yet: take up the reign."""

    epoch: int


class Deposed(msgspec.Struct, frozen=True):
    """This node acts under an epoch that is no longer the key's: stop at once."""

    reason: str


Action: TypeAlias = Idle | Wait | Acquire | Begin | Deposed


def rank(me: SessionId, candidates: Iterable[Candidate], is_over: Callable[[SessionId], bool]) -> int:
    """How many live, eligible candidates are preferred to *me*: higher priority, then node name. Those that
    never take over by themselves do not count."""
    offers = [c for c in candidates if c.eligible and not is_over(c.session)]
    mine = next((c for c in offers if c.session == me), None)
    priority = mine.priority if mine else 0
    return sum(
        1
        for c in offers
        if c.session != me and not c.no_failover and (-c.priority, c.session.node) < (-priority, me.node)
    )


def choose_successor(
    me: SessionId, candidates: Iterable[Candidate], is_over: Callable[[SessionId], bool]
) -> str | None:
    """The node that a release names unless an operator did: the most preferred live, eligible candidate but
    oneself. Never one with ``no_failover``: to be named is what lets such a node lead."""
    offers = [
        c
        for c in candidates
        if c.eligible and not c.no_failover and c.session != me and not is_over(c.session)
    ]
    best = min(offers, key=lambda c: (-c.priority, c.session.node), default=None)
    return best.session.node if best else None


def named_successor(leader: LeaderRecord, nomination: Nomination | None) -> str | None:
    """Who was named to follow *leader*: an operator's nominee for this very reign goes first.

    The last leader's own word counts only once it has released: its session may end at any time after it
    has chosen.
    """
    if nomination is not None and nomination.epoch == leader.revision:
        return nomination.node
    return leader.successor if leader.session is None else None


def begins_anew(epoch: int, *, highest: int, is_taken_up: bool, adopted: int) -> bool:
    """Whether a key that names this session at *epoch* has to be taken again before it is acted under (G2).

    So it is if a later epoch than that was known (*highest*), and under a session that an earlier life of the
    node began (*is_taken_up*): of that only what runs on, of epoch *adopted* (0: nothing), does so.
    """
    return epoch <= highest or (is_taken_up and epoch != adopted)


def next_action(view: View, now: float, is_over: Callable[[SessionId], bool]) -> Action:
    """What this node should do about the app's leader key."""
    mine = view.leader.session == view.me
    if view.leading is not None:
        if not (view.session_valid or view.held):
            return Deposed("the session is no longer valid")
        if not mine or view.leader.revision != view.leading:
            holder = view.leader.session.node if view.leader.session else "nobody"
            return Deposed(f"the leader key names {holder} at epoch {view.leader.revision}")
        return Idle()
    if not view.session_valid:
        return Idle()
    if mine and view.leader.revision > view.ended:
        # Our own write, found by the watch after its reply was lost or late.
        return Begin(view.leader.revision)
    # A key that still names this session for a reign that has ended is as good as released.
    if view.leader.session is not None and not view.leader_over and not mine:
        return Idle()
    if view.paused or not view.eligible:
        return Idle()
    if view.no_failover and named_successor(view.leader, view.nomination) != view.me.node:
        return Idle()
    start = max(view.vacant_since + _delay(view, is_over), view.not_before)
    members = None
    if not mine:
        start, members = max(start, view.takeover.not_before), view.takeover.members
    if start == float("inf"):
        return Idle()
    if now < start:
        return Wait(start)
    return Acquire(view.leader.revision, members)


def _delay(view: View, is_over: Callable[[SessionId], bool]) -> float:
    named = named_successor(view.leader, view.nomination)
    if named == view.me.node:
        return view.handicap_seconds
    delay = view.handicap_seconds + rank(view.me, view.candidates, is_over) * RANK_STEP_SECONDS
    if named:
        delay += HEAD_START_SECONDS
    return delay

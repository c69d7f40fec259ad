"""``on_nats_loss = "hold"``: being active past the end of one's session, by promises of all who could follow.

A session ends when NATS no longer takes its renewals; whether NATS is gone, or only this node cut off,
cannot be told from there. So the leader of an app that holds asks every node that could take the app over,
without NATS, to promise that it will not for the length of a lease. While it has the promises of all of them
its section goes on, session or not.

The parts, and why no two sections overlap (the simulator checks it):

* The *member list*, in the app's bucket: who may follow a session that is over. Only the leader adds to it,
  by a write that is fenced with its epoch, and it needs the promise of who is new from before it sends that.
  So whoever is listed while an epoch is the leader key's has to promise. A takeover is stored only if the
  list is at the revision in which the candidate found itself: one atomic write. A key that was *released*,
  and a session that was ended by its own side, are open to all: nothing of that reign runs any more.
* A *promise* binds its giver for ``Timing.observe`` from when it received the question; who asked counts
  ``Timing.hold`` from when it SENT it. By the reasoning of :mod:`.timing` the latter ends first.
* A node that has started knows nothing of earlier promises. It follows nobody before the longest of them is
  over.
* What has once lapsed never comes back, also if promises arrive later: a :class:`Claim` is over then.

Hence: a takeover that is stored was sent by a listed node that was bound by no promise, when the session was
over. The leader needed that node's promise, so it was not covered at that moment, and never was again.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from phalanx.decide.switchover import MAX_SPOOL_BYTES
from phalanx.decide.timing import OBSERVE_FACTOR, Timing
from phalanx.types import LeaderRecord, SessionId

NEVER = float("-inf")
ALWAYS = float("inf")


class MemberList(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who may follow a session that is over, and where each is reached without NATS (``host:port``; empty:
    nowhere, so that it never promises).

    ``lease_seconds``: how long a promise may bind its giver, at most.
    """

    nodes: dict[str, str] = {}
    lease_seconds: float = 0.0


class Ask(msgspec.Struct, frozen=True):
    """Promise not to take *app* over from *epoch*, for a lease. ``number`` grows with each question of a
    session; ``lease_seconds`` 0 asks only whether it would be promised."""

    app: str
    epoch: int
    session: SessionId
    number: int
    lease_seconds: float


class Takeover(msgspec.Struct, frozen=True):
    """What a node has to keep to when it follows a session that is over.

    ``not_before``: +inf, if it is not listed. ``members``: the revision at which the member list has to be
    still; None: it does not matter.
    """

    not_before: float = NEVER
    members: int | None = None


class Member:
    """A node's side, as one that could follow. Made when the node starts: it lives as long as its memory."""

    def __init__(self, timing: Timing, now: float) -> None:
        self.timing = timing
        self._began = now
        self._attempts: dict[str, int] = {}
        self._bound: dict[str, float] = {}
        self._bound_epoch: dict[str, int] = {}
        """The latest epoch of those promises, by app."""
        self._numbers: dict[SessionId, int] = {}

    def attempt(self, app: str, epoch: int) -> None:
        """This node is about to try to follow *epoch*: it promises nothing more for that."""
        self._attempts[app] = max(self._attempts.get(app, 0), epoch)

    def answer(self, ask: Ask, *, seen: int, leads: bool, now: float) -> str:
        """Promise it, if nothing is in the way: then the answer is empty. Else why not.

        *seen*: the revision of the leader key as this node knows it. *leads*: whether it is active itself.
        """
        if ask.number <= self._numbers.get(ask.session, 0):
            return "it was asked before"
        self._numbers.pop(ask.session, None)  # so that the oldest is first
        self._numbers[ask.session] = ask.number
        if len(self._numbers) > 1024:
            del self._numbers[next(iter(self._numbers))]
        if leads:
            return "it is active here"
        if seen > ask.epoch:
            return f"the leader key is at epoch {seen}"
        if self._attempts.get(ask.app, 0) >= ask.epoch:
            return "this node has tried to take it over"
        if ask.lease_seconds > 0:
            bound = now + self._bind(ask.lease_seconds)
            self._bound[ask.app] = max(self._bound.get(ask.app, NEVER), bound)
            self._bound_epoch[ask.app] = max(self._bound_epoch.get(ask.app, 0), ask.epoch)
        return ""

    def bound_until(self, app: str) -> float:
        """Until when it has promised not to take *app* over."""
        return self._bound.get(app, NEVER)

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
        """What it takes that node *me* follows *leader*, whose session is over or who has given the key back.

        *members*: the list at *revision*; None and 0: nothing is there. *gone*: its own side has ended that
        session, or somebody has fenced it, so that nothing of it runs.

        A key older than a reign it has promised is that of servers which have lost writes: whatever it
        says, that reign may go on.
        """
        lost = leader.revision < self._bound_epoch.get(app, 0)
        if leader.session is None or not leader.hold or gone:
            return Takeover(self.bound_until(app) if lost else NEVER)
        lease = self.timing.ttl
        if members is not None:
            if me not in members.nodes:
                return Takeover(ALWAYS)
            lease = max(lease, members.lease_seconds)
        quarantined = self._began + self._bind(lease)
        return Takeover(max(quarantined, self.bound_until(app)), revision)

    def _bind(self, lease_seconds: float) -> float:
        return lease_seconds * OBSERVE_FACTOR


class Claim:
    """The leader's side of one reign: whose promises it needs, and how far they reach.

    ``revision`` and ``members``: the list as it was read from the stream's leader after the reign began, or
    as it was stored since. Until it was read nothing is claimed.
    """

    def __init__(self, timing: Timing, me: str) -> None:
        self.timing, self.me = timing, me
        self.revision = -1
        self.members = MemberList()
        self._attempts: list[tuple[int, MemberList]] = []
        """Lists that were sent, each with the revision it expects: they may be stored still."""
        self._promised: dict[str, float] = {}
        """When the question was sent that each node has answered last, with a promise."""
        self.has_lapsed = False

    def on_list(self, revision: int, members: MemberList | None) -> None:
        """The list as its stream's leader has it (0 and None: there is none); an older one is ignored."""
        if revision < self.revision:
            return
        self.revision, self.members = revision, members or MemberList()
        self._attempts = [(expect, sent) for expect, sent in self._attempts if expect >= revision]

    def sends(self, members: MemberList) -> int:
        """*members* is about to be sent as the new list: whoever is new there counts from now on. Returns the
        revision that has to be expected."""
        self._attempts.append((self.revision, members))
        return self.revision

    @property
    def is_known(self) -> bool:
        """Whether it is known who could follow: the list was read, and there is one. If it vanishes, anybody
        could."""
        return self.revision > 0 and bool(self.members.nodes)

    @property
    def asked(self) -> dict[str, str]:
        """Who has to promise, and where each is reached."""
        every: dict[str, str] = {}
        for _, sent in self._attempts:
            every |= sent.nodes
        every |= self.members.nodes
        every.pop(self.me, None)
        return every

    def on_promise(self, node: str, sent_at: float, now: float, valid_until: float) -> None:
        """*node* has promised what it was asked at *sent_at*; this is known from *now* on. Too late, if the
        right has lapsed before: *node* may have been bound by nothing meanwhile."""
        self.right_until(now, valid_until)
        if not self.has_lapsed:
            self._promised[node] = max(self._promised.get(node, NEVER), sent_at)

    def missing(self, now: float) -> list[str]:
        """Of whom no promise holds now."""
        return [n for n in self.asked if now >= self._promised.get(n, NEVER) + self.timing.hold]

    def until(self, now: float) -> float:
        """How long the promises reach that hold now; -inf if one is missing. Where nobody else is listed that
        is a lease from now."""
        if not self.is_known or self.has_lapsed:
            return NEVER
        return min((self._promised.get(n, NEVER) for n in self.asked), default=now) + self.timing.hold

    def right_until(self, now: float, valid_until: float) -> float:
        """Until when the section may go on: by the session, which is valid until *valid_until*, or by
        promises. Once that has passed it is over for good."""
        until = max(valid_until, self.until(now))
        self.has_lapsed = self.has_lapsed or now >= until
        return NEVER if self.has_lapsed else until


def asks_now(now: float, valid_until: float, timing: Timing) -> bool:
    """Whether it is time to ask for promises: a renewal of the session is overdue.

    As ``fence_budget + grace + 3 × renew_every < hold``, there is time to ask again before it stands down.
    """
    return valid_until - now < timing.hold - 1.5 * timing.renew_every


def hands_over(
    now: float, back_since: float, timing: Timing, *, has_successor: bool, spool_bytes: int = 0
) -> bool:
    """Whether a reign that has outlived its session ends now, as NATS is there again since *back_since*: as
    soon as somebody can follow, or when nobody has come for two TTLs. It cannot go on under another session:
    its epoch is that of a leader key that names the old one.

    *spool_bytes*: what waits for the log of its database, all of the time without NATS. As a hand-over has
    seconds for that, it is shipped first: the successor would begin without it.
    """
    if spool_bytes > MAX_SPOOL_BYTES:
        return False
    return has_successor or now - back_since > 2 * timing.ttl


def wanted(members: MemberList, offers: Iterable[tuple[str, str]], lease_seconds: float) -> MemberList:
    """The list that a leader wants: all that are on it, and all of *offers* (node and address).

    Also who says no address: it does not hold, or knows nothing of that (an older version, which follows
    whether it is listed or not). It can promise nothing, so nothing is held while it is listed.
    """
    return MemberList({**members.nodes, **dict(offers)}, lease_seconds)

"""Apps that hold: how members talk without NATS, and one node's part in it, as ``coord.hold`` drives it.

A schedule has it or not (``World.holds``); one without it is what it was before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phalanx.decide.hold import Ask, Claim, Member, MemberList, Takeover, asks_now, hands_over, wanted
from phalanx.types import LeaderRecord

from .host import PIPE
from .nats import REFUSED, RPC_TIMEOUT, UNANSWERED

if TYPE_CHECKING:
    from .host import Host
    from .node import Node
    from .world import World

APP = "app"


class Peers:
    """The network between the nodes: what is sent may be lost, or come when it means nothing any more."""

    def __init__(self, world: World, hosts: int) -> None:
        self.world = world
        self.reaches = [[True] * hosts for _ in range(hosts)]
        self.loss = self.slow = 0.0
        self.late = [0.0] * hosts
        """What is sent to that host comes so much later."""

    def heal(self) -> None:
        """All is well."""
        self.reaches = [[True] * len(row) for row in self.reaches]
        self.loss = self.slow = 0.0
        self.late = [0.0] * len(self.late)

    def send(self, sender: Host, receiver: str, what: str, *args: Any) -> None:
        """Deliver to whatever life of a node is on that host then."""
        world, random = self.world, self.world.rng.random
        target = next(host for host in world.hosts if host.name == receiver)
        if not self.reaches[sender.index][target.index] or (self.loss and random() < self.loss):
            return
        delay = 0.0005 + 0.003 * random() + self.slow * random() + self.late[target.index]
        world.after(delay, self._arrive, sender, target, what, args)

    def _arrive(self, sender: Host, target: Host, what: str, args: tuple[Any, ...]) -> None:
        node = target.node
        if node is None or node.hold is None or not self.reaches[sender.index][target.index]:
            return
        node.run(getattr(node.hold, what), *args)


class Hold:
    """One life of a node: what it has promised, and whose promises it has."""

    def __init__(self, node: Node) -> None:
        self.node, self.world, self.host, self.timing = node, node.world, node.host, node.timing
        self.member: Member = self.host.member or node.world.rules.member(self.timing, self.host.clock())
        self.host.member = None
        self.members: tuple[int, MemberList | None] = (0, None)
        """The list as this node knows it, and its revision."""
        self.claim: Claim | None = None
        self._number = 0
        self._sent: dict[int, float] = {}
        self._is_busy = False
        self._extended = float("-inf")
        self._connected_since: float | None = None

    # --- as one that could follow

    def learn(self, revision: int, members: MemberList | None) -> None:
        """The list was written, or read from some replica."""
        if revision > self.members[0]:
            self.members = revision, members
        if self.claim is not None and self.claim.revision >= 0:
            self.claim.on_list(revision, members)

    def takeover(self, leader: LeaderRecord, *, gone: bool) -> Takeover:
        """What it takes to follow *leader*."""
        revision, members = self.members
        return self.member.takeover(self.host.name, APP, leader, members, revision, gone=gone)

    def attempt(self, epoch: int) -> None:
        """A takeover is about to be sent."""
        self.member.attempt(APP, epoch)

    def on_ask(self, ask: Ask, sender: str) -> None:
        """A leader wants a promise."""
        leads = self.node.election.reign is not None
        refusal = self.member.answer(
            ask, seen=self.node.election.leader.revision, leads=leads, now=self.host.clock()
        )
        if refusal:
            self.world.count("promises refused")
            return
        if ask.lease_seconds:
            self.world.count("promises given")
        self.world.peers.send(self.host, sender, "on_promise", self.host.name, ask.number)

    # --- as the leader

    def begin(self) -> None:
        """A reign begins."""
        self.claim = self.world.rules.claim(self.timing, self.host.name) if self.host.holds else None
        self._extended, self._connected_since = float("-inf"), None
        self._sent.clear()

    def until(self, now: float) -> float:
        """How far the promises reach."""
        return self.claim.until(now) if self.claim is not None else float("-inf")

    def right_until(self, now: float) -> float:
        """Until when there may be an active section."""
        valid_until = self.node.valid_until
        return self.claim.right_until(now, valid_until) if self.claim is not None else valid_until

    def is_held(self, now: float) -> bool:
        """Whether the reign goes on by promises, whatever becomes of the session."""
        return now < self.until(now)

    def on_promise(self, node: str, number: int) -> None:
        """A promise: it counts from when it was asked for."""
        if self.claim is None or number not in self._sent:
            return
        now = self.host.clock()
        sent_at = now if self.world.rules.broken == "hold-lease-from-receipt" else self._sent[number]
        self.claim.on_promise(node, sent_at, now, self.node.valid_until)
        self._extend(now)

    def step(self, now: float) -> None:
        """All that may be due of a reign."""
        if self.claim is None or self.node.election.reign is None:
            self.claim = None
            return
        self._admit(self.claim)
        if asks_now(now, self.node.valid_until, self.timing) and self.claim.is_known:
            self._ask(self.claim, now)
        self._extend(now)
        if now >= self.node.valid_until and self.node.app.section is not None:
            self.world.count("sections that outlived their session")
            self._return(now)

    def _ask(self, claim: Claim, now: float) -> None:
        for node in claim.asked:
            self._number += 1
            self._sent[self._number] = now
            ask = Ask(APP, self.node.election.reign or 0, self.node.session, self._number, self.timing.ttl)
            self.world.peers.send(self.host, node, "on_ask", ask, self.host.name)
        self._sent = {n: at for n, at in self._sent.items() if now - at < self.timing.ttl}

    def _extend(self, now: float) -> None:
        """The keeper kills later."""
        until, keeper = self.until(now), self.node.keeper
        if (
            until > self._extended
            and keeper is not None
            and asks_now(now, self.node.valid_until, self.timing)
        ):
            self._extended = until
            self.world.after(PIPE, keeper.run, keeper.on_extend, until)

    def _return(self, now: float) -> None:
        """NATS is there again: the reign ends in order, and the next one begins with a session."""
        election = self.node.election
        if self.node.conn is None or election.verify:
            self._connected_since = None
            return
        if self._connected_since is None:
            self._connected_since = now
        successor = election.choose()
        if hands_over(now, self._connected_since, self.timing, has_successor=successor is not None):
            self.world.count("handed over when NATS was back")
            self.node.app.end("NATS is back", successor)

    def _admit(self, claim: Claim) -> None:
        """Read the list, then add whoever offers to lead."""
        if self._is_busy or self.node.conn is None:
            return
        nats, node = self.node.nats, self.node
        epoch = node.election.reign
        assert epoch is not None
        if claim.revision < 0 or self._must_read:
            self._is_busy = True
            nats.call(node, None, lambda: nats.bucket.members, RPC_TIMEOUT, self._listed, claim)
            return
        offers = [(o.session.node, o.direct) for o in node.election.candidates.values()]
        offers.append((self.host.name, self.host.name))
        list_ = wanted(claim.members, offers, self.timing.ttl)
        if list_ == claim.members and claim.revision:
            return
        self._is_busy = True
        expect = claim.sends(list_)
        nats.call(
            node, None, lambda: nats.write_members(list_, expect, epoch), RPC_TIMEOUT,
            self._written, claim, list_,
        )  # fmt: skip

    _must_read = False

    def _listed(self, result: Any, claim: Claim) -> None:
        self._is_busy = False
        if result is UNANSWERED:
            return
        self._must_read = False
        claim.on_list(*result)
        self.learn(*result)

    def _written(self, result: Any, claim: Claim, list_: MemberList) -> None:
        self._is_busy = False
        if result is UNANSWERED or result is REFUSED:
            self._must_read = True
            return
        self.world.count("members admitted")
        claim.on_list(result, list_)
        self.learn(result, list_)

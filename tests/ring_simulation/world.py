"""The bucket and the sessions of a schedule, and the promises that are checked after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tests.virtual_time import VirtualTime

from phalanx.decide.ring import plan, targets
from phalanx.decide.ring_plan import SETTLE_SECONDS, RingPlan
from phalanx.types import SessionId

if TYPE_CHECKING:
    from .node import Node

PLAN = -1
"""The key of the plan, among those of the partitions."""

UNANSWERED = object()
REFUSED = object()


@dataclass(slots=True, eq=False)
class Acting:
    """One node's time of owning one partition, from its first work to when it can do none any more."""

    node: Node
    partition: int
    epoch: int
    ready: bool = False
    """Its hook has returned."""
    ending: str = ""
    excused: bool = False
    """Another one began while this one's host stood still with its keeper: it is killed when it wakes."""


@dataclass(slots=True, eq=False)
class Session:
    """One session, as all others see it. ``over``: for good."""

    id: SessionId
    over: bool = False
    expires: int = 0
    """Counts renewals: an expiry that was planned before the latest one is void."""


class World(VirtualTime):
    """One schedule: the clock, the bucket, the nodes, what is true about them."""

    NAME_WIDTH: ClassVar[int] = 8

    def __init__(self, seed: int, broken: str, *, tracing: bool = False) -> None:
        super().__init__(seed, tracing=tracing)
        self.broken = broken
        self.partitions = self.rng.choice((1, 3, 5, 8, 12, 16))
        self.settle_seconds = self.rng.choice((0.01, 0.05, SETTLE_SECONDS))
        self.loss = self.rng.choice((0.005, 0.02, 0.1))
        """How often a request, or an answer, is lost."""
        self.nodes: list[Node] = []
        self.hosts = 0
        self.acting: dict[int, list[Acting]] = {n: [] for n in range(self.partitions)}
        self.last_epoch = dict.fromkeys(range(self.partitions), 0)
        self.last_fenced = dict.fromkeys(range(self.partitions), 0)
        self.bucket: dict[int, tuple[int, Any]] = {}
        self.sequence = 0
        self.unavailable_until = 0.0
        self.sessions: dict[SessionId, Session] = {}
        self.calm = False
        """Everything is healed: messages are no longer lost."""

    def chance(self, probability: float) -> bool:
        """Whether something that happens so often happens now; nothing does once all is healed."""
        return not self.calm and self.rng.random() < probability

    # --- what must hold

    def begin(self, acting: Acting) -> None:
        """G6 and G2, where a node begins to own a partition."""
        node, number = acting.node, acting.partition
        begins = f"{node.session.id} begins with partition {number} at epoch {acting.epoch}"
        for other in self.acting[number]:
            if other.node.can_work or (other.node.keeper_runs and not other.node.host_frozen):
                self.fail("G6", f"{begins} while {other.node.session.id} owns it at {other.epoch}")
            self.count("excused: host stood still")
            other.excused = True
        if acting.epoch <= self.last_epoch[number]:
            self.fail("G2", f"{begins} after epoch {self.last_epoch[number]}")
        if self.last_epoch[number]:
            self.count("owner changes")
        self.last_epoch[number] = acting.epoch
        self.acting[number].append(acting)
        self.log(node.name, f"OWNS {number} at epoch {acting.epoch}")

    def end(self, acting: Acting, how: str) -> None:
        """Nothing of it runs any more."""
        if acting in self.acting[acting.partition]:
            self.acting[acting.partition].remove(acting)
            self.log(acting.node.name, f"owns {acting.partition} no more (epoch {acting.epoch}): {how}")

    def settled(self) -> bool:
        """Whether every partition has one owner that works, each node as many as its share."""
        members = {node.name: node.weight for node in self.nodes if node.is_member}
        if len(members) < self.hosts:
            return False
        counts = dict.fromkeys(members, 0)
        for owners in self.acting.values():
            if len(owners) != 1 or not owners[0].ready or owners[0].ending or not owners[0].node.can_work:
                return False
            if owners[0].node.name not in counts:
                return False
            counts[owners[0].node.name] += 1
        return counts == targets(self.partitions, members, counts)

    # --- sessions

    def renew(self, session: Session, sent_at: float) -> None:
        """A renewal is stored: nobody ends the session before 2.1 s after it was sent."""
        session.expires += 1
        expires = session.expires
        self.after(sent_at + 2.1 - self.now + self.rng.uniform(0.0, 0.3), self._expire, session, expires)

    def _expire(self, session: Session, expires: int) -> None:
        if session.expires == expires and not session.over:
            self.count("sessions expired")
            self.end_session(session)

    def end_session(self, session: Session) -> None:
        """A majority of tombstones is there: all learn of it."""
        if session.over:
            return
        session.over = True
        self.log("sessions", f"{session.id} is over")
        for node in self.nodes:
            if node.session is session and node.alive and node.can_work and self.now < node.valid_until:
                self.fail("session", f"{session.id} is over while its node holds it")
            node.hear(lambda node=node: node.on_session_over(session.id))

    # --- the bucket

    def store(self, key: int, value: Any, expected: int | None) -> Any:
        """A compare-and-set (None: without): its revision, or REFUSED."""
        revision, before = self.bucket.get(key, (0, None))
        if self.chance(0.004):
            self.count("spurious refusals")
            return REFUSED
        if expected is not None and revision != expected:
            self.count("refused writes")
            return REFUSED
        if key == PLAN:
            self._check_plan(before, value)
        self.sequence += 1
        self.bucket[key] = (self.sequence, value)
        for node in self.nodes:
            node.hear(lambda node=node, at=self.sequence: node.on_record(key, at, value))
        return self.sequence

    def _check_plan(self, before: RingPlan | None, after: RingPlan) -> None:
        """Every plan is balanced, and moves no more than it must."""
        old = before.owner_names() if before is not None else (None,) * self.partitions
        new, members = after.owner_names(), after.members
        self.count("plans")
        owned = {node: old.count(node) for node in members}
        wanted = targets(self.partitions, members, owned)
        if {node: new.count(node) for node in members} != wanted:
            self.fail("balance", f"a plan gives {new} to {members}")
        kept = sum(1 for was, is_now in zip(old, new, strict=True) if was == is_now and was is not None)
        if kept != sum(min(owned[node], wanted[node]) for node in members):
            self.fail(
                "movement", f"the plan {new} for {members} moves more of {old} than {plan(old, members)}"
            )

    def fenced_write(self, partition: int, epoch: int) -> Any:
        """A write under a partition's epoch: G2 at the server."""
        if self.bucket.get(partition, (0, None))[0] != epoch:
            self.count("fenced writes refused")
            return REFUSED
        if epoch < self.last_fenced[partition]:
            self.fail("G2", f"a write of epoch {epoch} is accepted after {self.last_fenced[partition]}")
        self.last_fenced[partition] = epoch
        return epoch

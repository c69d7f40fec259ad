"""Rule breaks, planted on purpose: the simulator must find each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.decide.ring import plan
from phalanx.decide.ring_ownership import Ownership, Write
from phalanx.decide.ring_plan import Planner, Propose, RingPlan, Wait

BREAKS = {
    "taken-from-the-living": "a partition is taken although its holder's session is not over",
    "released-before-its-end": "a partition's key is given back while the node still acts for it",
    "acts-without-a-session": "a node takes partitions and goes on whatever has become of its session",
    "ended-epoch-begins-again": "a partition that was ended is begun again under the same epoch",
    "begun-while-given-back": "an epoch begins although its release may still be under way",
    "no-compare-and-set": "a partition's key is written whatever it holds",
    "blind-release": "a partition is given back by a write without compare-and-set",
    "leaves-with-partitions": "a node that stops ends its session while it still owns partitions",
    "keeper-late": "the keeper ends the session of a dead node's host first, and kills the node then",
    "dead-stay-planned": "a node whose session is over stays in the plan",
    "newcomers-ignored": "a node that comes is never planned in",
    "planned-afresh": "each plan is made without regard to who owns what",
    "unanswered-is-done": "a release that nobody answered is taken for done",
}
"""Name → what is wrong with it."""


class ForgetfulOwnership(Ownership):
    """Does not remember which epochs have ended."""

    def on_ended(self, partition: int) -> None:
        """The break."""
        super().on_ended(partition)
        self._partitions[partition].ended = 0


class HastyOwnership(Ownership):
    """Does not count an epoch as over when it sends its release."""

    def _write(self, number: int, found: Any, *, take: bool) -> Write:
        """The break."""
        ended = found.ended
        write = super()._write(number, found, take=take)
        found.ended = ended
        return write


class CredulousOwnership(Ownership):
    """Does not ask what came of a write; and takes a key of its own for given back once it has tried."""

    def on_not_written(self, partition: int) -> None:
        """The break."""
        super().on_not_written(partition)
        found = self._partitions[partition]
        found.must_read = False
        if found.holder == self.me:
            self._replace(partition, found.revision + 1, None)


class ClosedPlanner(Planner):
    """Plans without those that are not in the plan yet."""

    def on_members(self, members: Mapping[str, int], now: float) -> None:
        """The break."""
        if self.plan is not None and self.plan.members.keys() & members.keys():
            members = {node: weight for node, weight in members.items() if node in self.plan.members}
        super().on_members(members, now)


class FreshPlanner(Planner):
    """Plans from nothing."""

    def next_action(self, now: float) -> Propose | Wait | None:
        """The break."""
        action = super().next_action(now)
        if not isinstance(action, Propose):
            return action
        members = action.plan.members
        fresh = plan((None,) * len(action.plan.owners), members)
        return Propose(RingPlan.of(fresh, members, action.plan.by), action.expected_revision)


OWNERSHIPS: dict[str, type[Ownership]] = {
    "begun-while-given-back": HastyOwnership,
    "ended-epoch-begins-again": ForgetfulOwnership,
    "unanswered-is-done": CredulousOwnership,
}
PLANNERS: dict[str, type[Planner]] = {"newcomers-ignored": ClosedPlanner, "planned-afresh": FreshPlanner}

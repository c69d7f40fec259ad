"""When the plan of a ring is made anew, and by which node.

The plan is one key of the app's bucket, replaced by compare-and-set, so that all nodes act on the very same
one; there is no coordinator: whoever finds first that it no longer fits its members proposes another. It
decides only who *shall* own what. Safety never hangs on it: see :mod:`phalanx.decide.ring_ownership`.

A member that is gone (its session is over, it is leaving, its checks fail) is planned out at once. A member
that comes, or another weight, waits until nothing has changed for a while: ten nodes that start within a
second shall move the partitions once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from phalanx.decide.ring import plan
from phalanx.types import SessionId

SETTLE_SECONDS = 0.5
"""Members that come are planned in once nothing has changed for this long."""

LONGEST_SETTLE_SECONDS = 5.0
"""… and after this long at the latest."""

RANK_STEP_SECONDS = 0.020
"""What each node after the first (by name) waits longer: so the first one usually makes the plan."""


class RingMember(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node's offer to own partitions. ``ready``: it may be planned in; else ``reason`` says why not.
    ``fences``: it declares a fence command: whoever takes its partitions over has to have it fenced."""

    session: SessionId
    weight: int = 1
    ready: bool = True
    reason: str = ""
    fences: bool = False


class RingPlan(msgspec.Struct, frozen=True):
    """What the plan's key holds: for each partition the place of its owner in ``nodes``, -1 for nobody.

    ``weights``: those of ``nodes``, by which it was made. ``by``: the node that has made it.
    """

    nodes: tuple[str, ...]
    weights: tuple[int, ...]
    owners: tuple[int, ...]
    by: str = ""

    @classmethod
    def of(cls, owners: tuple[str | None, ...], weights: Mapping[str, int], by: str) -> RingPlan:
        """The plan in which the partitions have these *owners*, nodes of *weights*."""
        nodes = tuple(sorted(weights))
        place = {node: number for number, node in enumerate(nodes)}
        found = tuple(-1 if owner is None else place[owner] for owner in owners)
        return cls(nodes, tuple(weights[node] for node in nodes), found, by)

    @property
    def members(self) -> dict[str, int]:
        """The weight of each node."""
        return dict(zip(self.nodes, self.weights, strict=True))

    def owner_names(self) -> tuple[str | None, ...]:
        """The owner of each partition by name."""
        return tuple(self.nodes[place] if place >= 0 else None for place in self.owners)


def wanted(members: Mapping[str, RingMember], is_over: Callable[[SessionId], bool]) -> dict[str, int]:
    """The nodes that can be planned in, with their weights."""
    return {
        node: member.weight
        for node, member in sorted(members.items())
        if member.ready and not is_over(member.session)
    }


class Propose(msgspec.Struct, frozen=True):
    """Replace the plan by compare-and-set on this revision (0: create it)."""

    plan: RingPlan
    expected_revision: int


class Wait(msgspec.Struct, frozen=True):
    """Look again at that moment."""

    until: float


PlanAction: TypeAlias = Propose | Wait | None


class Planner:
    """One node's part in planning. Tell it of members and plans; ask it what to do."""

    def __init__(self, node: str, partitions: int, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._node, self._partitions, self._settle = node, partitions, settle_seconds
        self.plan: RingPlan | None = None
        self.revision = 0
        self._wanted: dict[str, int] = {}
        self._changed_at = float("-inf")
        self._differs_since: float | None = None
        """Since when members and plan differ; None while they agree."""
        self._lost_since: float | None = None
        """Since when the plan names a node that is gone; None while it does not."""

    def on_members(self, members: Mapping[str, int], now: float) -> None:
        """These nodes can be planned in now, with their weights (see :func:`wanted`)."""
        if members != self._wanted:
            self._wanted, self._changed_at = dict(members), now
        self._compare(now)

    def on_plan(self, revision: int, found: RingPlan | None, now: float, *, force: bool = False) -> None:
        """The plan's key holds *found*. An older revision is ignored, except what the stream's leader
        answered (*force*): servers may have lost writes."""
        if revision > self.revision or force:
            self.revision, self.plan = revision, found
            self._compare(now)

    def _compare(self, now: float) -> None:
        planned = self.plan.members if self.plan is not None else {}
        differs, lost = self._wanted != planned, bool(planned.keys() - self._wanted.keys())
        self._differs_since = (
            (now if self._differs_since is None else self._differs_since) if differs else None
        )
        self._lost_since = (now if self._lost_since is None else self._lost_since) if lost else None

    def next_action(self, now: float) -> PlanAction:
        """What this node should do about the plan; None: nothing until something changes."""
        if self._differs_since is None or not any(self._wanted.values()):
            # Where nobody can own anything the plan may as well stay: it says what was where.
            return None
        planned = self.plan.members if self.plan is not None else {}
        kept = {node: weight for node, weight in planned.items() if node in self._wanted}
        if self._lost_since is not None:
            start = self._lost_since
            weights = kept if any(kept.values()) else self._wanted
        else:
            start = min(self._changed_at + self._settle, self._differs_since + LONGEST_SETTLE_SECONDS)
            weights = self._wanted
        start += self._rank() * RANK_STEP_SECONDS
        if now < start:
            return Wait(start)
        before = self.plan.owner_names() if self.plan is not None else (None,) * self._partitions
        return Propose(RingPlan.of(plan(before, weights), weights, self._node), self.revision)

    def _rank(self) -> int:
        return sum(1 for node in self._wanted if node < self._node or self._node not in self._wanted)

"""A ring as it is seen from outside of its nodes: who shall own what, who does, and what is wrong there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from phalanx.decide.ring_ownership import PartitionBody
from phalanx.decide.ring_plan import RingMember, RingPlan
from phalanx.errors import ConfigError
from phalanx.names import RING_KEYS
from phalanx.types import AppStatus, RingState

if TYPE_CHECKING:
    from phalanx.client import PlatformClient
    from phalanx.client_views import NodeView


class RingNode(msgspec.Struct, frozen=True):
    """One node's part. ``planned``: partitions that it shall own; ``owned``: that its session holds;
    ``serving``: of these, those that its ``on_own`` is done with, by its own word (None: it does not answer).
    ``because``: why it is given nothing."""

    node: str
    weight: int
    share: float
    planned: int
    owned: int
    serving: int | None
    is_live: bool
    because: str = ""


class RingReport(msgspec.Struct, frozen=True):
    """A whole ring. ``moving``: partitions that are not (yet) where they shall be, ``unowned`` those of them
    that no living session holds. ``planned_by``: the node that has made the plan."""

    app: str
    partitions: int
    nodes: tuple[RingNode, ...]
    moving: int
    unowned: int
    planned_by: str
    pause: str
    warnings: tuple[str, ...]


async def report(client: PlatformClient, app: str) -> RingReport:
    """What is so with the ring of *app* now. Raises ConfigError for an app that there is not, or no ring."""
    await client.check_app(app)
    views = [view for view in await client.nodes() if app in view.apps]
    names, bus = client.names, client.bus
    bucket = names.app_bucket(app)
    prefix = names.key_subject(bucket, f"{RING_KEYS}.")
    records = await bus.snapshot(names.bucket_stream(bucket), f"{prefix}>")
    held = {record.subject.removeprefix(prefix): record.data for record in records if not record.removed}
    plan = msgspec.json.decode(held["plan"], type=RingPlan) if "plan" in held else None
    said = {view.node: status.ring for view in views for status in _of(view, app) if status.ring is not None}
    if plan is None and not said:
        raise ConfigError("app", app, "it is no ring", "see: phalanx app show APP")
    members = {
        key.removeprefix("member."): msgspec.json.decode(data, type=RingMember)
        for key, data in held.items()
        if key.startswith("member.")
    }
    holders = {
        int(key.removeprefix("part.")): msgspec.json.decode(data, type=PartitionBody).session
        for key, data in held.items()
        if key.startswith("part.")
    }
    live = {str(view.member.session) for view in views if view.is_live and view.member is not None}
    owners = {n: s.node for n, s in holders.items() if s is not None and str(s) in live}
    pause = next((str(s.pause) for view in views for s in _of(view, app) if s.pause is not None), "")
    return _report(app, plan, members, owners, views, said, pause)


def _of(view: NodeView, app: str) -> list[AppStatus]:
    return [status for status in view.status.apps if status.name == app] if view.status is not None else []


def _report(
    app: str,
    plan: RingPlan | None,
    members: dict[str, RingMember],
    owners: dict[int, str],
    views: list[NodeView],
    said: dict[str, RingState],
    pause: str,
) -> RingReport:
    names = plan.owner_names() if plan is not None else ()
    count = len(names) or max((state.partitions for state in said.values()), default=0)
    is_live = {view.node: view.is_live for view in views}
    named = {*names, *owners.values()}
    nodes = [name for name in sorted(members) if is_live.get(name) or name in named]
    wanted = {name: members[name].weight for name in nodes if is_live.get(name) and members[name].ready}
    total = sum(wanted.values())
    found = tuple(
        RingNode(
            node,
            members[node].weight,
            round(count * wanted.get(node, 0) / total, 2) if total else 0.0,
            sum(1 for name in names if name == node),
            sum(1 for name in owners.values() if name == node),
            said[node].owned if node in said else None,
            is_live.get(node, False),
            _because(node, members[node], is_live),
        )
        for node in nodes
    )
    moving = sum(1 for number, name in enumerate(names) if owners.get(number) != name)
    unowned = sum(1 for number in range(count) if number not in owners)
    by = plan.by if plan is not None else ""
    warnings = tuple(_warnings(count, total, unowned, found, pause))
    return RingReport(app, count, found, moving, unowned, by, pause, warnings)


def _because(node: str, member: RingMember, is_live: dict[str, bool]) -> str:
    if not is_live.get(node):
        return "its session is over"
    if not member.ready:
        return member.reason or "it is not ready"
    return "its weight is 0" if not member.weight else ""


def _warnings(count: int, total: int, unowned: int, nodes: tuple[RingNode, ...], pause: str) -> list[str]:
    found: list[str] = []
    able = [node for node in nodes if node.share]
    if not total:
        found.append("no node can be given partitions")
    if unowned:
        found.append(f"{unowned} of {count} partitions are owned by nobody")
    if len(able) == 1:
        found.append(f"{able[0].node} has all of it: nobody else could take over")
    if able and count < 4 * len(able):
        found.append(f"{count} partitions for {len(able)} nodes: whole lumps of the load move")
    if pause and (unowned or any(node.owned != node.planned for node in nodes)):
        found.append("what has no owner stays so until the pause is over")
    return found


__all__ = ["RingNode", "RingReport", "report"]

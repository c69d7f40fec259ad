"""What ``status`` and ``health`` show, as objects: the JSON of docs/cli.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from phalanx.client import NO_ANSWER, NodeView
from phalanx.types import AppStatus, Health, PlannedSwitchover, PoolState, ProgramStatus, RingState, Role


class AppOnNode(msgspec.Struct, frozen=True):
    """One app on one node that answers. ``since``: Unix seconds."""

    node: str
    role: str
    health: str
    epoch: int
    leader: str | None
    since: float
    reason: str
    program: ProgramStatus | None = None
    priority: int = 0
    no_failover: bool = False
    hold: str = ""
    ring: RingState | None = None
    pool: PoolState | None = None


class AppView(msgspec.Struct, frozen=True):
    """One app on the whole platform. ``active`` is None while no node is active; of a pool it is one of them.
    ``pause``: who has paused it and why, empty while it is not. ``planned``: the switchover that is planned
    for it, null if none is."""

    name: str
    active: str | None
    epoch: int
    health: str
    nodes: tuple[AppOnNode, ...]
    pause: str = ""
    planned: PlannedSwitchover | None = None
    pattern: str = "active-passive"

    @property
    def actives(self) -> list[AppOnNode]:
        """Nodes that say that they are active."""
        return [each for each in self.nodes if each.role == Role.ACTIVE]

    @property
    def pool(self) -> PoolState | None:
        """What the nodes of a pool say of it; None for other apps."""
        return next((each.pool for each in self.nodes if each.pool is not None), None)


class NodeRow(msgspec.Struct, frozen=True):
    """One node. Times are Unix seconds, 0 where unknown; texts are empty where unknown."""

    node: str
    answers: bool
    live: bool
    ready: bool
    connected: bool
    session: str
    session_left_seconds: float
    since: float
    version: str
    host: str
    pid: int
    http: str
    nats_server: str
    labels: dict[str, str]
    apps: tuple[str, ...]
    problems: tuple[str, ...]


class PlatformView(msgspec.Struct, frozen=True):
    """Everything that ``status`` knows."""

    platform: str
    nodes: tuple[NodeRow, ...]
    apps: tuple[AppView, ...]


def platform_view(
    platform: str, nodes: Sequence[NodeView], planned: Mapping[str, PlannedSwitchover] | None = None
) -> PlatformView:
    """The whole from its parts."""
    names = sorted({app for node in nodes for app in node.apps})
    apps = (_app(name, nodes) for name in names)
    return PlatformView(
        platform,
        tuple(_row(node) for node in nodes),
        tuple(msgspec.structs.replace(app, planned=(planned or {}).get(app.name)) for app in apps),
    )


def _row(view: NodeView) -> NodeRow:
    member, status = view.member, view.status
    silent = NO_ANSWER if view.is_live else "the node does not answer, its session is over"
    problems = status.problems if status is not None else (silent,)
    return NodeRow(
        node=view.node,
        answers=view.answers,
        live=view.is_live,
        ready=status.ready if status is not None else False,
        connected=status.connected if status is not None else False,
        session=status.session if status is not None else str(member.session) if member is not None else "",
        session_left_seconds=status.session_left_seconds if status is not None else 0.0,
        since=member.since if member is not None else 0.0,
        version=status.version if status is not None else member.version if member is not None else "",
        host=member.host if member is not None else "",
        pid=member.pid if member is not None else 0,
        http=member.http if member is not None else "",
        nats_server=status.nats_server if status is not None else "",
        labels=dict(status.labels if status is not None else member.labels if member is not None else {}),
        apps=view.apps,
        problems=problems,
    )


def _app(name: str, nodes: Sequence[NodeView]) -> AppView:
    found = [
        (view.node, app)
        for view in nodes
        if view.status is not None
        for app in view.status.apps
        if app.name == name
    ]
    # Of two that say they are active (one has not heard yet) the higher epoch is right.
    active = max(
        ((app.epoch, node, app) for node, app in found if app.role is Role.ACTIVE),
        key=lambda each: each[:2],
        default=None,
    )
    return AppView(
        name,
        active[1] if active is not None else None,
        active[0] if active is not None else max((app.epoch for _, app in found), default=0),
        str(active[2].health if active is not None else Health.UNKNOWN),
        tuple(_on_node(node, app) for node, app in found),
        next((str(app.pause) for _, app in found if app.pause is not None), ""),
        pattern=next((app.pattern for _, app in found), "active-passive"),
    )


def _on_node(node: str, app: AppStatus) -> AppOnNode:
    ill = f"unhealthy: {app.health_reason}" if app.health is Health.UNHEALTHY else ""
    return AppOnNode(
        node,
        str(app.role),
        str(app.health),
        app.epoch,
        app.leader,
        app.since,
        app.reason or ill,
        app.program,
        app.standing.priority,
        app.standing.no_failover,
        app.hold,
        app.ring,
        app.pool,
    )


def verdict(view: PlatformView) -> list[str]:
    """Why the platform is not healthy; empty if it is."""
    reasons: list[str] = []
    if not view.nodes:
        reasons.append("the platform has no nodes")
    for node in view.nodes:
        if not node.answers:
            reasons.append(f"node {node.node}: {'; '.join(node.problems)}")
        else:
            reasons += [f"node {node.node}: {problem}" for problem in node.problems]
            if not node.connected:
                reasons.append(f"node {node.node}: not connected to NATS")
    for app in view.apps:
        if app.pattern == "ring":
            reasons += _of_ring(app)
        elif app.pattern == "pool":
            reasons += _of_pool(app)
        elif len(app.actives) > 1:
            reasons.append(f"app {app.name}: several nodes say they are active: {_named(app.actives)}")
        elif app.active is None:
            reasons.append(f"app {app.name}: no node is active")
        elif app.health == Health.UNHEALTHY:
            reasons.append(f"app {app.name}: unhealthy on {app.active}")
    return reasons


def _of_ring(app: AppView) -> list[str]:
    states = [node.ring for node in app.nodes if node.ring is not None]
    count, owned = max((s.partitions for s in states), default=0), sum(s.owned for s in states)
    reasons = [f"app {app.name}: unhealthy on {n.node}" for n in app.nodes if n.health == Health.UNHEALTHY]
    if owned < count or not count:
        reasons.append(f"app {app.name}: {owned} of {count} partitions are served by a node that answers")
    return reasons


def _of_pool(app: AppView) -> list[str]:
    """As many as there can be are to be active, and well."""
    wanted = app.pool.replicas if app.pool is not None else None
    able = len(app.nodes) if wanted is None else min(wanted, len(app.nodes))
    ill = [node.node for node in app.nodes if node.health == Health.UNHEALTHY]
    reasons = [f"app {app.name}: unhealthy on {node}" for node in ill]
    if len(app.actives) < able:
        reasons.append(f"app {app.name}: {len(app.actives)} of {able} instances are active")
    return reasons


def _named(nodes: Sequence[AppOnNode]) -> str:
    return ", ".join(f"{each.node} (epoch {each.epoch})" for each in nodes)


def without_clock(view: PlatformView) -> Any:
    """What has to differ for ``status --watch`` to show it again."""
    return msgspec.structs.replace(
        view, nodes=tuple(msgspec.structs.replace(node, session_left_seconds=0.0) for node in view.nodes)
    )

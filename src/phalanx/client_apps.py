"""The apps of a platform from outside: what each is on its nodes, whatever its pattern."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from phalanx.client_pool import statuses_of
from phalanx.client_views import NodeView
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.ports import Bus
from phalanx.types import AppStatus, Health, PoolState, RingState, Role

if TYPE_CHECKING:
    from phalanx.client import PlatformClient

METHODS_SECONDS = 0.5
"""How long the instances of an app may take to say which methods they have."""


class AppNode(msgspec.Struct, frozen=True, kw_only=True):
    """An app on one node that answers. ``ready``: of a pool, whether calls come to it; None for others.
    ``partitions``: of a ring, how many it owns. ``since``: Unix seconds."""

    node: str
    role: str
    health: str
    epoch: int
    since: float
    reason: str
    ready: bool | None = None
    partitions: int = 0


class AppReport(msgspec.Struct, frozen=True, kw_only=True):
    """One app. ``pattern`` is empty if no node that answers declares it. ``active``: the nodes that are;
    ``ready``: how many of them calls come to. ``methods``: those that it answers, where that is known.
    ``pool``, ``ring``: as one of its nodes says."""

    app: str
    pattern: str
    nodes: tuple[AppNode, ...]
    active: tuple[str, ...]
    ready: int
    methods: tuple[str, ...] = ()
    pause: str = ""
    pool: PoolState | None = None
    ring: RingState | None = None


async def reports(client: PlatformClient) -> list[AppReport]:
    """All apps that were ever made, by name."""
    names, views = await client.apps(), await client.nodes()
    return [_report(name, views) for name in sorted({*names, *(app for view in views for app in view.apps)})]


async def report(client: PlatformClient, app: str) -> AppReport:
    """*app*. Raises ConfigError for one that the platform does not have."""
    await client.check_app(app)
    found = _report(app, await client.nodes())
    answering = len(found.nodes)
    methods = await _methods(client.bus, app, answering) if answering else ()
    return msgspec.structs.replace(found, methods=methods)


def _report(app: str, views: Sequence[NodeView]) -> AppReport:
    statuses = statuses_of(views, app)
    nodes = tuple(_on(node, status) for node, status in statuses)
    return AppReport(
        app=app,
        pattern=next((status.pattern for _, status in statuses), ""),
        nodes=nodes,
        active=tuple(node for node, status in statuses if status.role is Role.ACTIVE),
        ready=sum(1 for node in nodes if node.ready),
        pause=next((str(status.pause) for _, status in statuses if status.pause is not None), ""),
        pool=next((status.pool for _, status in statuses if status.pool is not None), None),
        ring=next((status.ring for _, status in statuses if status.ring is not None), None),
    )


def _on(node: str, status: AppStatus) -> AppNode:
    ill = f"unhealthy: {status.health_reason}" if status.health is Health.UNHEALTHY else ""
    return AppNode(
        node=node,
        role=str(status.role),
        health=str(status.health),
        epoch=status.epoch,
        since=status.since,
        reason=status.reason or ill,
        ready=status.pool.ready if status.pool is not None else None,
        partitions=status.ring.owned if status.ring is not None else 0,
    )


async def _methods(bus: Bus, app: str, most: int) -> tuple[str, ...]:
    """What its instances say by the NATS micro protocol; nothing where that may not be asked."""
    try:
        answers = await bus.gather(Names.service_subject("INFO", app), timeout=METHODS_SECONDS, most=most)
    except BusError:
        return ()
    found: set[str] = set()
    for answer in answers:
        try:
            said: dict[str, Any] = json.loads(answer.data)
            found.update(str(endpoint["name"]) for endpoint in said.get("endpoints", ()))
        except (ValueError, KeyError, TypeError):
            continue
    return tuple(sorted(found))


__all__ = ["AppNode", "AppReport", "report", "reports"]

"""Scaling a pool: an operator's word in its bucket, which goes before what the nodes declare."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from phalanx import system
from phalanx.client_caller import record
from phalanx.client_views import NodeView
from phalanx.coord.seats import write_scale
from phalanx.decide.pool import MAX_SEATS, PoolScale, replicas_text
from phalanx.errors import ConfigError
from phalanx.names import Names
from phalanx.ports import Bus
from phalanx.types import AppStatus, PoolState


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """What came of scaling *app*: how many instances were wanted before, and are now; None: all nodes.

    ``is_reset``: it is as the nodes declare it again.
    """

    app: str
    before: int | None
    replicas: int | None
    is_reset: bool = False


def check_replicas(replicas: object) -> int | None:
    """A number of instances, or None. Raises ConfigError."""
    if replicas is None:
        return None
    if isinstance(replicas, bool) or not isinstance(replicas, int) or not 0 <= replicas <= MAX_SEATS:
        problem = "no number of instances"
        raise ConfigError("replicas", replicas, problem, f"choose 0 to {MAX_SEATS}, or None for all nodes")
    return replicas


async def scale(
    bus: Bus, names: Names, app: str, replicas: int | None, *, by: str, declared: int | None, reset: bool
) -> Scaled:
    """Have *app* run on *replicas* nodes (None: all) from now on, or (*reset*) on as many as is *declared*.

    Raises ConfigError, BusError.
    """
    replicas = declared if reset else check_replicas(replicas)
    word = None if reset else PoolScale(replicas, by, system.wall())
    before = await write_scale(bus, names, app, word)
    wanted_before = before.replicas if before is not None else declared
    text = "as declared" if reset else replicas_text(replicas)
    details = {"replicas": text, "before": replicas_text(wanted_before)}
    await record(bus, names, "scaled", app=app, reason=f"{text} instances, asked by {by}", details=details)
    return Scaled(app=app, before=wanted_before, replicas=replicas, is_reset=reset)


def statuses_of(views: Iterable[NodeView], app: str) -> list[tuple[str, AppStatus]]:
    """What each node that answers says of *app*."""
    return [
        (view.node, status)
        for view in views
        if view.status is not None
        for status in view.status.apps
        if status.name == app
    ]


def pool_in(views: Iterable[NodeView], app: str) -> PoolState:
    """What a node says of the pool *app*. Raises ConfigError if it is none, or nobody answers."""
    found = statuses_of(views, app)
    pool = next((status.pool for _, status in found if status.pool is not None), None)
    if pool is not None:
        return pool
    if found:
        problem = f"it is no pool, but {found[0][1].pattern}"
        raise ConfigError("app", app, problem, "declare it with Pool(...); see docs/pool.md")
    raise ConfigError("app", app, "no node that has it answers", "see: phalanx status")


__all__ = ["Scaled", "check_replicas", "pool_in", "scale", "statuses_of"]

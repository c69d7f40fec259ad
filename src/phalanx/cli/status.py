"""``phalanx status`` and ``phalanx health``."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import Parameter

from phalanx import system
from phalanx.cli import exits, output, views
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.decide.pool import replicas_text
from phalanx.errors import BusError
from phalanx.types import PlannedSwitchover, PoolState, Role

_WATCH_SECONDS = 0.5
_WHERE = Where()

_STYLES = {
    Role.ACTIVE: "bold green",
    Role.ACTIVATING: "yellow",
    Role.STANDING_DOWN: "yellow",
    Role.INELIGIBLE: "red",
    Role.STOPPED: "dim",
}


def status(
    *,
    where: Where = _WHERE,
    watch: Annotated[bool, Parameter(help="Show it again whenever something changes.")] = False,
    json: Annotated[bool, Parameter(help="As JSON; with --watch one object a line.")] = False,
) -> int:
    """Show the nodes of a platform and which of them is active for each app."""
    platform, nats = where.find()
    asyncio.run(_status(PlatformClient(platform, nats, timeout=where.timeout), watch, json))
    return exits.OK


async def _status(client: PlatformClient, watch: bool, json: bool) -> None:
    async with client:
        view = await _look(client)
        _show(view, json=json, again=False, pretty=not watch)
        while watch:
            await asyncio.sleep(_WATCH_SECONDS)
            before, problem = view, ""
            try:
                view = await _look(client)
            except BusError as error:
                # Whoever watches wants to see it come back.
                problem = str(error)
                if not json:
                    output.note(problem)
                continue
            if views.without_clock(view) != views.without_clock(before):
                _show(view, json=json, again=True, pretty=False)


async def _look(client: PlatformClient) -> views.PlatformView:
    nodes, planned = await client.nodes(), await client.planned_switchovers()
    return views.platform_view(client.names.platform, nodes, planned)


def _show(view: views.PlatformView, *, json: bool, again: bool, pretty: bool) -> None:
    if json:
        output.emit(view, pretty=pretty)
        return
    if again:
        output.clear_screen()
        output.say((f"{output.clock(system.wall())}", "dim"))
    output.say("platform ", (view.platform, "bold"), f", {_count(len(view.nodes), 'node')}")
    if view.nodes:
        output.table(
            ("NODE", "STATE", "SINCE", "HOST", "PID", "HTTP", "VERSION", "PROBLEMS"), _node_rows(view)
        )
    if view.apps:
        output.say("")
        output.table(("APP", "ROLE", "NODE", "HEALTH", "EPOCH", "SINCE", "REASON"), _app_rows(view))
        for app in view.apps:
            if app.pool is not None:
                output.say(_instances(app, app.pool))
            if app.pause:
                output.say((f"{app.name}: {app.pause}; nothing changes hands", "bold yellow"))
            if app.planned is not None:
                output.say((f"{app.name}: {planned_text(app.planned)}", "yellow"))


def _node_rows(view: views.PlatformView) -> list[tuple[str | tuple[str, str], ...]]:
    return [
        (
            node.node,
            _state(node),
            _ago(node.since),
            node.host or "-",
            str(node.pid or "-"),
            node.http or "-",
            node.version or "-",
            ("; ".join(node.problems), "red"),
        )
        for node in view.nodes
    ]


def _state(node: views.NodeRow) -> tuple[str, str]:
    if not node.answers:
        return ("silent", "bold red") if node.live else ("dead", "red")
    return ("ready", "green") if node.ready else ("not ready", "yellow")


def _app_rows(view: views.PlatformView) -> list[tuple[str | tuple[str, str], ...]]:
    rows: list[tuple[str | tuple[str, str], ...]] = []
    for app in view.apps:
        pool = app.pool
        if app.active is None and (pool is None or pool.replicas != 0):
            rows.append(
                (app.name, ("nobody is active", "bold red"), "-", "-", str(app.epoch or "-"), "-", "")
            )
        # The active one first.
        for each in sorted(app.nodes, key=lambda each: (each.node != app.active, each.node)):
            rows.append(
                (
                    app.name,
                    (each.role, _STYLES.get(Role(each.role), "")),
                    each.node,
                    each.health,
                    str(each.epoch or "-"),
                    _ago(each.since),
                    "; ".join(part for part in (_share(each), each.reason, each.hold) if part),
                )
            )
    return rows


def _instances(app: views.AppView, pool: PoolState) -> str:
    ready = sum(1 for each in app.nodes if each.pool is not None and each.pool.ready)
    scaled = f", scaled by {pool.scaled_by}" if pool.scaled_by else ""
    wanted = replicas_text(pool.replicas)
    return f"{app.name}: {len(app.actives)} of {wanted} instances active, {ready} ready{scaled}"


def _share(each: views.AppOnNode) -> str:
    ring = each.ring
    if ring is None:
        return ""
    moving = f", {ring.moving} moving" if ring.moving else ""
    return f"{ring.owned} of {ring.partitions} partitions{moving}"


def planned_text(planned: PlannedSwitchover) -> str:
    """A planned switchover in words."""
    why = f": {planned.reason}" if planned.reason else ""
    whom = planned.to or "the best standby"
    return f"switchover to {whom} planned at {output.clock(planned.at)} by {planned.by}{why}"


def _ago(unix_seconds: float) -> str:
    return output.span(system.wall() - unix_seconds) if unix_seconds else "-"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def health(
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Say whether all is well; exit code 1 if not.

    All is well when every app has one active node that is not unhealthy, and all nodes answer.
    """
    platform, nats = where.find()
    view = asyncio.run(_view(PlatformClient(platform, nats, timeout=where.timeout)))
    reasons = views.verdict(view)
    if json:
        output.emit({"platform": platform, "healthy": not reasons, "reasons": reasons}, pretty=True)
    elif reasons:
        for reason in reasons:
            output.say((reason, "red"))
    else:
        output.say(
            ("healthy", "green"), f": {_count(len(view.nodes), 'node')}, {_count(len(view.apps), 'app')}"
        )
    return exits.NO if reasons else exits.OK


async def _view(client: PlatformClient) -> views.PlatformView:
    async with client:
        return await _look(client)

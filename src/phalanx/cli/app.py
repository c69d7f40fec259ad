"""``phalanx app``: the apps of a platform, whatever their pattern."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from phalanx import client_apps
from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_apps import AppReport
from phalanx.decide.pool import replicas_text

app = App(name="app", help="The apps of a platform: their patterns, nodes and methods.")

_WHERE = Where()


@app.command(name="list")
def list_(
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show the apps of a platform, also those that no node declares any more."""
    platform, nats = where.find()
    found = asyncio.run(_list(PlatformClient(platform, nats, timeout=where.timeout)))
    if json:
        output.emit({"apps": found}, pretty=True)
    elif not found:
        output.say("the platform has no apps")
    else:
        rows = [
            (each.app, each.pattern or "-", str(len(each.nodes)), ", ".join(each.active) or "-", _short(each))
            for each in found
        ]
        output.table(("APP", "PATTERN", "NODES", "ACTIVE", ""), rows)
    return exits.OK


@app.command
def show(
    name: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show what an app is on each node, and which methods it answers. Exit code 2 for an unknown app."""
    platform, nats = where.find()
    found = asyncio.run(_look(PlatformClient(platform, nats, timeout=where.timeout), name))
    if json:
        output.emit(found, pretty=True)
        return exits.OK
    output.say((found.app, "bold"), f": {found.pattern or 'no node that answers declares it'}")
    if short := _short(found):
        output.say(f"  {short}")
    if found.methods:
        output.say(f"  methods: {', '.join(found.methods)}")
    rows = [
        (
            node.node,
            node.role,
            node.health,
            str(node.epoch or "-"),
            _yes(node.ready),
            node.reason,
        )
        for node in found.nodes
    ]
    if rows:
        output.table(("NODE", "ROLE", "HEALTH", "EPOCH", "READY", "REASON"), rows)
    if found.pause:
        output.say((f"{found.pause}; nothing changes hands", "bold yellow"))
    return exits.OK


async def _list(client: PlatformClient) -> list[AppReport]:
    async with client:
        return await client_apps.reports(client)


async def _look(client: PlatformClient, name: str) -> AppReport:
    async with client:
        return await client_apps.report(client, name)


def _short(found: AppReport) -> str:
    """What its pattern has to say in a line."""
    if found.pool is not None:
        scaled = f", scaled by {found.pool.scaled_by}" if found.pool.scaled_by else ""
        wanted = replicas_text(found.pool.replicas)
        return f"{len(found.active)} of {wanted} instances active, {found.ready} ready{scaled}"
    if found.ring is not None:
        owned = sum(node.partitions for node in found.nodes)
        return f"{owned} of {found.ring.partitions} partitions owned"
    return ""


def _yes(ready: bool | None) -> str:
    return "-" if ready is None else "yes" if ready else "no"

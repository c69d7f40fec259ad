"""``phalanx ring``: who owns the partitions of a ring."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from phalanx import client_ring
from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_ring import RingReport
from phalanx.decide.partition import partition_of

_WHERE = Where()

ring = App(name="ring", help="Who owns the partitions of a ring.")


@ring.command
def show(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    key: Annotated[str | None, Parameter(help="Also say to which partition this key belongs.")] = None,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show each node's share of an app's partitions, what it owns of it, and what is moving.

    Exit code 2 for an unknown app, and one that is no ring.
    """
    platform, nats = where.find()
    found = asyncio.run(_look(PlatformClient(platform, nats, timeout=where.timeout), app))
    if json:
        output.emit(found, pretty=True)
        return exits.OK
    _show(found)
    if key is not None:
        output.say(f"key {key!r}: partition {partition_of(key, found.partitions)}")
    return exits.OK


async def _look(client: PlatformClient, app: str) -> RingReport:
    async with client:
        return await client_ring.report(client, app)


def _show(found: RingReport) -> None:
    by = f", planned by {found.planned_by}" if found.planned_by else ""
    output.say((found.app, "bold"), f": {found.partitions} partitions, {found.moving} moving{by}")
    rows = [
        (
            node.node if node.is_live else (node.node, "red"),
            str(node.weight),
            f"{node.share:g}",
            str(node.planned),
            str(node.owned),
            "-" if node.serving is None else str(node.serving),
            (node.because, "yellow"),
        )
        for node in found.nodes
    ]
    output.table(("NODE", "WEIGHT", "SHARE", "PLANNED", "OWNED", "SERVING", "REASON"), rows)
    if found.pause:
        output.say((f"{found.pause}; nothing changes hands", "bold yellow"))
    for warning in found.warnings:
        output.say(("  warning: ", "yellow"), warning)

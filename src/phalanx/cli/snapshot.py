"""``phalanx snapshot``: an app's database as it was, made, listed, verified, deleted, restored."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from phalanx.cli import exits, output, progress
from phalanx.cli.target import Where
from phalanx.client import PlatformClient

snapshot = App(name="snapshot", help="Snapshots of an app's database, and restores from them.")

_WHERE = Where()


@snapshot.command
def create(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    node: Annotated[str | None, Parameter(help="The node that makes it; else a standby.")] = None,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Make a snapshot now, on a standby if there is one."""
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    with progress.bar(f"snapshot of {app}", shown=not json) as report:
        name = asyncio.run(_create(client, app, node, report))
    if json:
        output.emit({"app": app, "name": name}, pretty=True)
    else:
        output.say(f"{app}: snapshot ", (name, "bold"))
    return exits.OK


async def _create(client: PlatformClient, app: str, node: str | None, report: progress.Report) -> str:
    async with client:
        return await client.databases.create_snapshot(
            app, node, on_progress=lambda step: report(step.done_bytes, step.total_bytes)
        )

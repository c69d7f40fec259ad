"""``phalanx forget``: a node that will not return."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient

_WHERE = Where()


def forget(
    node: Annotated[str, Parameter(help="The node that will not return.")],
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Take a dead node off the member list, so that `health` no longer waits for it.

    A node that stopped gracefully has left the list by itself. Exit code 2 for one that is unknown or alive.
    """
    platform, nats = where.find()
    asyncio.run(_forget(PlatformClient(platform, nats, timeout=where.timeout), node))
    if json:
        output.emit({"node": node, "forgotten": True}, pretty=True)
    else:
        output.say(f"{node}: no longer a member")
    return exits.OK


async def _forget(client: PlatformClient, node: str) -> None:
    async with client:
        await client.forget(node)

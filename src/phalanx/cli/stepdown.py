"""``phalanx stepdown``: a planned hand-over."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import HandOver, PlatformClient
from phalanx.errors import ConfigError

_WHERE = Where()


def stepdown(
    app: Annotated[str, Parameter(help="The app whose active node should hand over.")],
    /,
    *,
    node: Annotated[str | None, Parameter(help="Who should take over; else the best standby.")] = None,
    reason: Annotated[str, Parameter(help="Why, for the audit log.")] = "",
    wait: Annotated[float, Parameter(help="How long to wait for the next one, in seconds.")] = 60.0,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Have the active node of an app hand over to another one.

    It says who took over, and after how long. Needs a NATS login that may publish on the platform's control
    subjects. Exit code 1 when no node is active or nobody took over, 2 for an unknown app or a node that
    cannot take over.
    """
    if not 0.1 <= wait <= 86400:
        raise ConfigError("--wait", wait, "out of range", "choose 0.1 to 86400 seconds")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    try:
        done = asyncio.run(_step_down(client, app, node, reason, wait))
    except ConfigError as error:
        if error.key == "node":
            raise ConfigError("--node", error.value, error.problem, error.remedy) from None
        raise
    if json:
        output.emit(done, pretty=True)
    else:
        output.say(
            f"{app}: ",
            (done.active or "?", "bold green"),
            f" took over from {done.previous} after {output.span(done.seconds)} (epoch {done.epoch})",
        )
    return exits.OK


async def _step_down(
    client: PlatformClient, app: str, node: str | None, reason: str, wait: float
) -> HandOver:
    async with client:
        return await client.step_down(app, node, reason=reason, timeout=wait)

"""``phalanx scale``: how many nodes are active for a pool."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_pool import Scaled
from phalanx.decide.pool import MAX_SEATS, replicas_text
from phalanx.errors import ConfigError

_WHERE = Where()


def scale(
    app: Annotated[str, Parameter(help="The pool.")],
    replicas: Annotated[str, Parameter(help="How many nodes shall be active: a number, or all.")] = "",
    /,
    *,
    reset: Annotated[bool, Parameter(help="As many as the nodes declare again.")] = False,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Have a pool run on so many nodes, whatever they declare, until --reset.

    It counts at once: free nodes begin, and what is too much ends gracefully. Exit code 2 for an unknown app,
    and one that is no pool.
    """
    number = _number(replicas, reset=reset)
    platform, nats = where.find()
    done = asyncio.run(_scale(PlatformClient(platform, nats, timeout=where.timeout), app, number, reset))
    if json:
        output.emit(done, pretty=True)
    else:
        as_declared = ", as declared" if done.is_reset else ""
        output.say(
            (done.app, "bold"),
            f": {_wanted(done.replicas)}{as_declared} ({replicas_text(done.before)} before)",
        )
    return exits.OK


def _number(text: str, *, reset: bool) -> int | None:
    if bool(text) is reset:
        problem = "both a number and --reset" if reset else "neither a number nor --reset"
        raise ConfigError("replicas", text, problem, "say one of them")
    if reset or text == "all":
        return None
    if not text.isascii() or not text.isdecimal() or int(text[:9]) > MAX_SEATS:
        raise ConfigError("replicas", text, "no number of instances", f"choose 0 to {MAX_SEATS}, or all")
    return int(text)


async def _scale(client: PlatformClient, app: str, replicas: int | None, reset: bool) -> Scaled:
    async with client:
        return await client.scale(app, replicas, reset=reset)


def _wanted(replicas: int | None) -> str:
    if replicas is None:
        return "an instance on every node wanted"
    return f"{replicas} instance{'' if replicas == 1 else 's'} wanted"

"""``phalanx why``: the present state of an app, explained."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.decide.why import Explanation

_WHERE = Where()


def why(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Explain why an app is on the node where it is, why not on the others, and what it waits for.

    Exit code 2 for an unknown app.
    """
    platform, nats = where.find()
    found = asyncio.run(_why(PlatformClient(platform, nats, timeout=where.timeout), app))
    if json:
        output.emit(found, pretty=True)
    else:
        _show(found)
    return exits.OK


async def _why(client: PlatformClient, app: str) -> Explanation:
    async with client:
        return await client.operator.why(app)


def _show(found: Explanation) -> None:
    for number, sentence in enumerate(found.here):
        output.say((sentence, "bold" if number == 0 else ""))
    for each in found.not_there:
        output.say(f"  not {each.node}: {each.because}")
    for sentence in found.waits_for:
        output.say(("  waits for: ", "yellow"), sentence)
    for sentence in found.hints:
        output.say(("  note: ", "dim"), sentence)

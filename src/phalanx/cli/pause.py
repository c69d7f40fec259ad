"""``phalanx pause`` and ``phalanx resume``: while an operator works, nothing changes hands."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PauseDone, PlatformClient

_WHERE = Where()


def pause(
    app: Annotated[str | None, Parameter(help="The app; without it all apps of the platform.")] = None,
    /,
    *,
    reason: Annotated[str, Parameter(help="Why, for status and the audit log.")] = "",
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Let nothing change hands until it is resumed: programs run on, whatever their checks say.

    What fails is only reported. A node that loses its session still ends what it runs, and nobody takes over
    before the pause is over. Exit code 2 for an unknown app.
    """
    platform, nats = where.find()
    done = asyncio.run(_pause(PlatformClient(platform, nats, timeout=where.timeout), app, reason))
    if json:
        output.emit(_shown(done, paused=True), pretty=True)
        return exits.OK
    what = done.app or f"platform {platform}"
    if done.changed:
        output.say((what, "bold"), ": paused")
    else:
        output.say((what, "bold"), f": was {done.pause} already")
    for name, node, why in done.unkept:
        output.note(f"app {name} would end with node {node}, in spite of the pause: {why}")
    for node in done.unaware:
        output.note(f"node {node} has not said yet that it knows: see phalanx status")
    return exits.OK


async def _pause(client: PlatformClient, app: str | None, reason: str) -> PauseDone:
    async with client:
        return await client.pause(app, reason=reason)


def resume(
    app: Annotated[str | None, Parameter(help="The app; without it the pause of the platform.")] = None,
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """End a pause: what has failed meanwhile counts from now on, and what nobody leads is taken over.

    Resuming the platform leaves apps paused that were paused by their name. Exit code 2 for an unknown app,
    and for one that is paused only with its platform.
    """
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    done, others = asyncio.run(_resume(client, app))
    if json:
        output.emit(
            _shown(done, paused=False)
            if done is not None
            else {"app": app or "", "changed": False, "paused": False},
            pretty=True,
        )
        return exits.OK
    output.say(
        (app or f"platform {platform}", "bold"), ": resumed" if done is not None else ": was not paused"
    )
    for other in others:
        output.note(f"app {other} stays paused: phalanx resume {other}")
    return exits.OK


async def _resume(client: PlatformClient, app: str | None) -> tuple[PauseDone | None, list[str]]:
    async with client:
        done = await client.resume(app)
        return done, sorted(name for name in await client.pauses() if name) if app is None else []


def _shown(done: PauseDone, *, paused: bool) -> dict[str, object]:
    return {
        "app": done.app,
        "paused": paused,
        "changed": done.changed,
        "pause": msgspec.to_builtins(done.pause),
        "unaware": list(done.unaware),
        "unkept": [{"app": name, "node": node, "reason": why} for name, node, why in done.unkept],
    }

"""``phalanx fence``: by hand what is done before an app is taken over from a node that did not end itself."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

from cyclopts import Parameter

from phalanx import system
from phalanx.cli import exits, output
from phalanx.cli.target import Where, nats_options
from phalanx.client import PlatformClient
from phalanx.client_caller import caller
from phalanx.config import Fence
from phalanx.coord.fencer import is_for_each_app, run_fence_command
from phalanx.errors import ConfigError
from phalanx.types import FenceNote

_WHERE = Where()


def fence(
    node: Annotated[str, Parameter(help="The node whose host is to run nothing any more.")],
    /,
    *,
    confirm_off: Annotated[
        bool, Parameter(help="Run no command: you have seen yourself that it is off, or runs nothing.")
    ] = False,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Run the declared fence command for a node, from here; takeovers that wait for it go on.

    With --confirm-off it is your word that counts: say it only after you have seen it, as two programs may
    run otherwise. Exit code 1: the command fails. 2: an unknown node, or a live one that is confirmed off.
    """
    config, _ = where.node()
    client = PlatformClient(config.name, nats_options(config), timeout=where.timeout)
    if confirm_off:
        notes = [asyncio.run(_confirm(client, node))]
    elif config.fence is None:
        raise ConfigError(
            "fence",
            None,
            "no fence command is declared",
            "give --config FILE with one; or see that the node is off, and say --confirm-off",
        )
    else:
        # The error says what the last run said; standard error is for one line.
        logging.getLogger("phalanx.fence").addHandler(logging.NullHandler())
        notes = asyncio.run(_fence(client, config.fence, node))
    if json:
        output.emit({"node": node, "session": str(notes[0].session), "said": notes[-1].said}, pretty=True)
    else:
        output.say((node, "bold"), f": nothing of session {notes[0].session} runs any more: {notes[-1].said}")
    return exits.OK


async def _confirm(client: PlatformClient, node: str) -> FenceNote:
    async with client:
        return await client.confirm_off(node)


async def _fence(client: PlatformClient, declared: Fence, node: str) -> list[FenceNote]:
    notes: list[FenceNote] = []
    async with client:
        member = await client.to_be_fenced(node)
        for app in member.apps if is_for_each_app(declared) else ("",):
            said = await run_fence_command(declared, node, member.host or node, app)
            notes.append(
                await client.note_fenced(FenceNote(member.session, caller(), system.wall(), said, app))
            )
    return notes

"""``phalanx run``: this node of a platform, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Overrides, load
from phalanx.config import Logging
from phalanx.errors import PhalanxError


def run(
    target: Annotated[str, Parameter(help="A phalanx.toml, or module:name of a Platform.")],
    /,
    *,
    overrides: Overrides = Overrides(),  # noqa: B008 - frozen
    json: Annotated[bool, Parameter(help="Log as JSON, one object a line.")] = False,
) -> int:
    """Run this node of a platform.

    Until SIGTERM or Ctrl-C, which hand its apps over first; a second one ends it at once. TARGET is a file,
    or a Platform in a Python module of the current folder (module:platform), or a function there that
    returns one.
    """
    with overrides.applied():
        platform = load(target)
    if json:
        log = Logging(format="json", level=platform.config.logging.level)
        platform.config = msgspec.structs.replace(platform.config, logging=log)
    try:
        asyncio.run(platform.check())
    except PhalanxError as error:
        # A node that cannot start ends with 2, whatever the reason: nothing was started.
        output.error(error)
        return exits.BAD_INPUT
    platform.run()
    return exits.OK

"""How the other nodes reach this one without NATS, for apps that hold."""

from __future__ import annotations

import contextlib

from phalanx.config import PlatformConfig
from phalanx.coord.direct import Direct, DirectSecret
from phalanx.coord.hold import Holds
from phalanx.coord.membership import PlatformState
from phalanx.names import Names


async def open_direct(
    stack: contextlib.AsyncExitStack, config: PlatformConfig, names: Names, state: PlatformState, holds: Holds
) -> bool:
    """Listen where ``direct`` says; False where nothing is declared. Raises StartError."""
    if not config.direct:
        return False
    secret = await state.create_or_read(names.DIRECT_KEY, DirectSecret.new())
    direct = holds.direct = Direct(names.platform, config.node, secret, holds)
    host, _, port = config.direct.rpartition(":")
    holds.address = await direct.start(host.strip("[]"), int(port))
    stack.callback(direct.stop)
    return True


__all__ = ["open_direct"]

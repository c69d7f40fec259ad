"""``python -m phalanx.keeper FD PID``: started by a node, never by hand.

FD is its end of a socket pair; PID the node. Everything else comes as the first message, so that no
secret appears on a command line.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.keeper import wire
from phalanx.keeper.process import Keeper, harden
from phalanx.observe.logs import configure_logging


async def _connect(options: NatsOptions, name: str, ping_interval: float) -> NatsBus:
    return await NatsBus.connect(options, name=name, ping_interval=ping_interval)


async def _main(channel: socket.socket, node_pid: int) -> None:
    await Keeper(channel, node_pid, _connect, _configure_logging).run()


def _configure_logging(start: wire.Start) -> None:
    """The keeper's lines stand between those of its node, so they have the same form."""
    if start.logging is not None:
        configure_logging(start.logging, platform=start.platform, node=start.session.node)


def main() -> None:
    """Run one keeper to its end."""
    if len(sys.argv) != 3:
        sys.exit("phalanx.keeper is started by a node: python -m phalanx.keeper FD PID")
    # A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group. The keeper must
    # outlive its node, so it ends only by the node's word or the node's death.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    harden()
    asyncio.run(_main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))


main()

"""``python -m phalanx.keeper FD PID``: started by a node, never by hand.

FD is its end of a socket pair; PID the node. Everything else comes as the first message, so that no
secret appears on a command line.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.keeper import wire
from phalanx.keeper.hardening import harden, ignore_signals, log_without_waiting
from phalanx.keeper.process import Keeper
from phalanx.keeper.warden import Warden
from phalanx.observe.logs import configure_logging


async def _connect(options: NatsOptions, name: str, ping_interval: float) -> NatsBus:
    return await NatsBus.connect(options, name=name, ping_interval=ping_interval)


async def _main(channel: socket.socket, node_pid: int, warden: Warden) -> None:
    await Keeper(channel, node_pid, _connect, warden, _configure_logging).run()


def _configure_logging(start: wire.Start) -> None:
    """The keeper's lines stand between those of its node, so they have the same form."""
    if start.logging is not None:
        configure_logging(start.logging, platform=start.platform, node=start.session.node)
        # What asyncio and the NATS client say too, and by the same handler: no other one may block.
        logging.getLogger().handlers = list(logging.getLogger("phalanx").handlers)


def main() -> None:
    """Run one keeper to its end."""
    if len(sys.argv) != 3:
        sys.exit("phalanx.keeper is started by a node: python -m phalanx.keeper FD PID")
    ignore_signals()
    log_without_waiting()
    harden()
    # After all imports: each page that either of the two writes to afterwards is there twice.
    warden = Warden.fork()
    try:
        asyncio.run(_main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), warden))
    except Exception as error:
        # Told by the log: the interpreter's own traceback would wait for a reader where stderr is a socket.
        logging.getLogger("phalanx.keeper").critical("the keeper failed", exc_info=error)
        sys.exit(1)


if __name__ == "__main__":
    main()

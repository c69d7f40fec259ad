"""What a node opens before it reaches NATS: its data directory, and its server where it has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx import system
from phalanx.config import EmbeddedNats
from phalanx.errors import StartError

if TYPE_CHECKING:
    # At run time only by nodes that embed a server.
    from phalanx.bus.embedded import EmbeddedServer

SERVER_READY_SECONDS = 60.0


def lock_data_dir(stack: contextlib.AsyncExitStack, data_dir: Path) -> None:
    """Only one node at a time has it. Raises StartError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = system.lock_file(data_dir / "lock")
    except BlockingIOError as error:
        raise StartError(
            f"another node runs in {data_dir} ({error.strerror})",
            "give each node its own data_dir (PHALANX_DATA)",
        ) from None
    except OSError as error:
        raise StartError(
            f"the data directory {data_dir} cannot be used ({error.strerror})",
            "set data_dir (or PHALANX_DATA) to a folder that this user can write",
        ) from None
    stack.callback(lock.release)


async def start_server(
    stack: contextlib.AsyncExitStack,
    nats: EmbeddedNats,
    *,
    platform: str,
    node: str,
    data_dir: Path,
    on_event: Callable[[str, str], None],
) -> EmbeddedServer:
    """The embedded NATS server, ready."""
    from phalanx.bus.embedded import EmbeddedServer

    server = EmbeddedServer(nats, platform=platform, node=node, data_dir=data_dir, on_event=on_event)
    await server.start()
    stack.push_async_callback(server.stop)
    await server.wait_ready(SERVER_READY_SECONDS)
    return server


__all__ = ["lock_data_dir", "start_server"]

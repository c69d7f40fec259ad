"""NATS: connections, streams, the embedded server. Nobody else imports nats-py."""

from __future__ import annotations

import sys


def _import_nats() -> None:
    """nats-py imports aiohttp, wherever that is installed, for NATS over WebSocket, which we do not offer.

    It would cost each node and each keeper 0.2 s of CPU and 14 MB. Only nodes with a container as backend
    need aiohttp, and import it themselves, later.
    """
    hidden = [name for name in ("aiohttp", "multidict") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment] # the import system's way to say: not there
    try:
        import nats.aio.client  # pyright: ignore[reportUnusedImport] # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


_import_nats()

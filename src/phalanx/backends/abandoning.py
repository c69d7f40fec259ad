"""Giving up a start that has failed, or was cancelled: it is over only when nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from phalanx.errors import BackendError

log = logging.getLogger("phalanx.backend")

RETRY_SECONDS = 0.5


async def until_gone(app: str, kill: Callable[[], Awaitable[None]]) -> None:
    """Call *kill* again and again until it does not raise BackendError, however long that takes."""
    while True:
        try:
            await kill()
            return
        except BackendError as error:
            log.critical("%s; trying on", error, extra={"app": app})
        await asyncio.sleep(RETRY_SECONDS)

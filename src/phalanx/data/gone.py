"""Whether a stream of an app's database is gone for good: deleted, or lost by NATS.

NATS answers a read of a stream without a leader as it answers one of a stream that never was: not at all. So
where something could not be had, the stream itself is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from phalanx import system
from phalanx.errors import BusError, BusUnavailable, StreamGone
from phalanx.ports import STREAM_NOT_FOUND, Bus

GONE_SECONDS = 2.0
"""So long NATS has to say so: a server that has just started may not know all streams yet."""

_LOOK_SECONDS = 0.25
_ANSWER_SECONDS = 0.5


async def check_there(bus: Bus, stream: str) -> None:
    """Raises StreamGone if *stream* does not exist; returns if it does, or if nobody can tell."""
    deadline = system.now() + GONE_SECONDS
    while True:
        try:
            await bus.api(f"STREAM.INFO.{stream}", {}, timeout=_ANSWER_SECONDS)
            return
        except BusError as error:
            if error.code != STREAM_NOT_FOUND:
                return
        if system.now() >= deadline:
            raise StreamGone(stream)
        await asyncio.sleep(_LOOK_SECONDS)


def may_be_gone(bus: Bus, error: BusError) -> bool:
    """Whether *error* is what a stream that is gone leads to."""
    return error.code == STREAM_NOT_FOUND or (isinstance(error, BusUnavailable) and bus.is_connected)


@contextlib.asynccontextmanager
async def telling(bus: Bus, stream: str) -> AsyncGenerator[None]:
    """What fails within since *stream* is gone, fails with StreamGone."""
    try:
        yield
    except StreamGone:
        raise
    except BusError as error:
        if may_be_gone(bus, error):
            await check_there(bus, stream)
        raise

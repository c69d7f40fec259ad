"""Runs what starts processes so that they end with it, also when it is asked to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], *, as_nodes: bool = True) -> T:
    """Like ``asyncio.run``; SIGTERM too cancels *work*, which cleans up. Raises KeyboardInterrupt then.

    *as_nodes*: on the event loop that nodes use, uvloop. Its transports raise where asyncio's only drop
    what is written after a reset, which ``TcpProxy`` counts on.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with asyncio.Runner(loop_factory=_loop_factory() if as_nodes else None) as runner:
            return runner.run(work)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    signal.raise_signal(signal.SIGINT)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop

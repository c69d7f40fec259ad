"""Two things that asyncio leaves to everybody: an event with a deadline, and tasks that have an owner."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any


async def wait_at_most(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for *event* for at most *seconds* (None: for ever); whether it is set.

    Not ``asyncio.wait_for``: that of Python 3.11 swallows a cancellation which comes as the event is set.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


class Background:
    """Tasks that nobody waits for, until :meth:`close`. One that fails is logged, never lost."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run *work* to its end, whatever happens to the task that asks for it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("%s failed", task.get_name(), exc_info=error)

    async def close(self, grace_seconds: float = 0.0) -> None:
        """Wait for what is left for at most *grace_seconds*, then cancel it and see its end."""
        if grace_seconds and self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_seconds)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

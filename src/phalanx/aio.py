"""What asyncio leaves to everybody: an event with a deadline, tasks that have an owner, many deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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


class Deadlines(Generic[T]):
    """Many deadlines of which few are ever over: a third of what a timer for each costs.

    *on_over* is told of each that is, up to 8 ms late. It must not raise.
    """

    _PER_SECOND = 128

    def __init__(self, on_over: Callable[[T], None]) -> None:
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._slots: dict[int, tuple[set[T], asyncio.TimerHandle]] = {}

    def add(self, item: T, seconds: float) -> int:
        """*item* is over in so many seconds. Returns what :meth:`remove` wants."""
        number = int((self._loop.time() + seconds) * self._PER_SECOND) + 1
        slot = self._slots.get(number)
        if slot is None:
            timer = self._loop.call_at(number / self._PER_SECOND, self._over, number)
            slot = self._slots[number] = (set(), timer)
        slot[0].add(item)
        return number

    def remove(self, item: T, number: int) -> None:
        """It is of no interest any more; harmless if it is over."""
        slot = self._slots.get(number)
        if slot is not None:
            slot[0].discard(item)
            # A timer that is due soon costs less than its cancellation, and the one for the next call.
            if not slot[0] and slot[1].when() > self._loop.time() + 10:
                del self._slots[number]
                slot[1].cancel()

    def _over(self, number: int) -> None:
        for item in self._slots.pop(number)[0]:
            self._on_over(item)

    def close(self) -> None:
        """Forget all of them."""
        for _, timer in self._slots.values():
            timer.cancel()
        self._slots.clear()

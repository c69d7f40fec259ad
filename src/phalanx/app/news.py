"""Tells the hooks that only hear of a change, and only when the app has nothing better to do."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NoReturn

from phalanx.errors import HookFailed
from phalanx.hooks import Hooks

log = logging.getLogger("phalanx.app")

MAX_WAITING_EVENTS = 64
"""Leader and health changes that wait for their hook; older ones make room and are logged."""

NEWS_LINGER_SECONDS = 0.02
"""Hooks that only tell of a change leave the machine to the failover that goes on just then."""


class News:
    """What ``on_leader_change`` and ``on_health_change`` are still to be told, in its order.

    They share their turn with ``on_active``, for which a failover waits: nothing is told while the app is
    becoming active.
    """

    def __init__(self, app: str, hooks: Hooks, on_failed: Callable[[str], None]) -> None:
        self._app, self._hooks, self._on_failed = app, hooks, on_failed
        self._events: deque[tuple[str, object]] = deque()
        self._event_waits = asyncio.Event()

    def tell(self, hook: str, argument: object) -> None:
        """Have *hook* called with *argument* in its turn. Nothing to do if the app has none."""
        if hook not in self._hooks:
            return
        if len(self._events) >= MAX_WAITING_EVENTS:
            dropped = self._events.popleft()
            log.error("app %s: %s is too slow, an event was dropped: %s", self._app, *dropped)
        self._events.append((hook, argument))
        self._event_waits.set()

    async def run(self, wait_unless_becoming_active: Callable[[], Awaitable[None]]) -> NoReturn:
        """Call the hooks until cancelled. What is left then is told by the next run."""
        while True:
            await self._event_waits.wait()
            self._event_waits.clear()
            await asyncio.sleep(NEWS_LINGER_SECONDS)
            while self._events:
                # on_active goes first: a failover must not wait for a hook that only tells of it.
                await wait_unless_becoming_active()
                hook, argument = self._events.popleft()
                try:
                    await self._hooks.call(hook, argument)
                except HookFailed as error:
                    self._on_failed(str(error))


__all__ = ["News"]

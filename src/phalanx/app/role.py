"""This node's role for one app, and the waiting for a change of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from phalanx import system
from phalanx.types import Role


class AppRole:
    """What this node is for the app, since when (Unix seconds) and why.

    Whoever waits for a change is woken by every change that an app's status shows, not only by those of the
    role (:meth:`wake`): it looks again at what it waits for.
    """

    def __init__(self) -> None:
        self.role, self.since, self.reason = Role.STOPPED, system.wall(), ""
        self.on_change: Callable[[], None] = lambda: None
        """Told of a new role, before whoever waits is woken."""
        self._changed = asyncio.Event()

    def set(self, role: Role, reason: str) -> None:
        """It is *role* now. Nothing happens if it was so already, for the same reason."""
        if role is self.role and reason == self.reason:
            return
        changed = role is not self.role
        self.role, self.reason = role, reason
        if changed:
            self.since = system.wall()
            self.on_change()
        self.wake()

    def wake(self) -> None:
        """Something has changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_changed(self) -> None:
        """Wait until something changes."""
        await self._changed.wait()

    async def wait_for(self, *roles: Role, timeout: float) -> Role:
        """Wait until the role is one of *roles*. Raises TimeoutError after *timeout* seconds."""
        async with asyncio.timeout(timeout):
            while self.role not in roles:
                await self.wait_changed()
        return self.role


__all__ = ["AppRole"]

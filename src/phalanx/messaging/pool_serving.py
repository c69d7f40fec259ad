"""The calls to a pool on one node: any of its instances answers, as long as it is ready.

The instances that are ready form one queue group: NATS gives each call to one of them, by chance. An instance
is in it only while it is active and healthy; so no call waits for one that is not, and none is lost when one
goes: what was on its way to it is answered "moved", and its caller tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from phalanx.messaging import call_wire as wire
from phalanx.messaging.handlers import Handlers
from phalanx.messaging.serving import CallServer
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription

LAST_CALLS_SECONDS = 1.0
"""How long an instance that is ready no more waits for what is on its way to it."""


class PoolCallServer(CallServer):
    """What one instance of a pool answers on this node."""

    def __init__(self, app: str, node: str, handlers: Handlers, bus: Bus, names: Names, kv: Any) -> None:
        super().__init__(app, node, handlers, bus, names, kv)
        self._leading = wire.Leading(idempotent=handlers.idempotent, pattern="pool")
        self._micro.is_pool = True
        self._ready: Subscription | None = None
        self._changing = asyncio.Lock()

    def _route_of_all(self) -> tuple[str, Callable[[Message], None]]:
        """Who asks for the leader is told at once that there is none."""
        if not self._handlers:
            return super()._route_of_all()  # it is told that there are no handlers
        return self._names.call_leader_subject(self._app), self._on_leader_call

    def _on_leader_call(self, message: Message) -> None:
        problem = f"app {self._app} is a pool, which has no leader; call it with to=Any"
        self._turn_away(message, "wrong-route", problem)

    async def begin(self, epoch: int, active: Any) -> None:
        """Calls may run from now on, in the section of *epoch*; they come once the instance is ready."""
        self._active, self._epoch = active, epoch

    async def set_ready(self, ready: bool) -> None:
        """Whether calls for any instance come here. Raises BusError.

        Returns when the last one of them has come.
        """
        async with self._changing:
            if ready and self._epoch and self._ready is None:
                subject, queue = self._names.call_any_subject(self._app), self._names.call_queue(self._app)
                self._ready = await self._subscribe(subject, self._on_any, queue)
            elif not ready and self._ready is not None:
                subscription, self._ready = self._ready, None
                await subscription.drain(LAST_CALLS_SECONDS)

    @property
    def is_ready(self) -> bool:
        """Whether calls for any instance come here."""
        return self._ready is not None

    async def end(self, *, graceful: bool) -> None:
        """See SectionCalls."""
        if graceful:
            await self.set_ready(False)
        elif self._ready is not None:
            await self._ready.unsubscribe()
            self._ready = None
        await super().end(graceful=graceful)

    def on_leader(self, node: str | None, epoch: int) -> None:
        """Nobody leads."""

    def _passive(self, method: str, *, node_route: bool) -> tuple[str, str]:
        problem = f"node {self._node} is no active instance of app {self._app} (any more)"
        return ("wrong-route", f"{problem}; call it with to=Any") if node_route else (wire.MOVED, problem)


__all__ = ["PoolCallServer"]

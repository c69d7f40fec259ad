"""A ring on one node under one session: its partitions, their hooks, its locks. Nothing outlives that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from phalanx import system
from phalanx.app.owning import PartitionContext, PartitionHook, PartitionHooks
from phalanx.app.parts import NodeParts
from phalanx.app.preparing import Preparing
from phalanx.app.presence import SharedPresence
from phalanx.app.ring_fencing import FencingRegister
from phalanx.config import Ring
from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Locks
from phalanx.coord.register import Register
from phalanx.coord.ring import RingPartitions
from phalanx.coord.session import Session
from phalanx.errors import HookFailed
from phalanx.ports import Fence, SectionCalls
from phalanx.types import RingState, SessionId

if TYPE_CHECKING:
    from phalanx.app.ring_app import RingApp

log = logging.getLogger("phalanx.app")

GIVE_BACK_SECONDS = 3.0
"""How long a node that leaves waits for NATS to store that it has given its partitions back. After that the
end of its session says so."""


LOOK_SECONDS = 0.02
PLAN_LOOKS = 50
"""How often, and how many times, a node that gives everything back looks for a plan that says to whom."""


class RingTerm:
    """One session's part in the ring. Call :meth:`run`, at the end :meth:`close`."""

    def __init__(
        self,
        app: RingApp,
        pattern: Ring,
        parts: NodeParts,
        session: Session,
        register: Register,
        *,
        calls: Callable[[int], SectionCalls | None],
        paused: Callable[[], bool],
        on_failed: Callable[[int, HookFailed], None],
        on_stuck: Callable[[int], None],
        on_change: Callable[[], None],
    ) -> None:
        self._app, self._parts, self.session = app, parts, session
        self._pattern = pattern
        self._is_barred = False
        self._empty_since = float("-inf")
        self.locks = Locks(parts.bus, parts.names, app.name, session, register)
        self.register = FencingRegister(
            app.name,
            parts,
            register,
            holders=lambda: self.ring.holders(),
            wants_fence=self._wants_fence,
            rank=self._rank,
        )
        timeouts = app.config.hook_timeouts
        self._preparing: Preparing | None = None
        if (on_prepare := app.partition_hook("on_prepare")) is not None:
            self._preparing = Preparing(
                app.name,
                parts.node,
                on_prepare,
                parts.bus,
                parts.names,
                seconds=float(timeouts.on_prepare),
                most_at_once=pattern.parallel,
                on_failed=on_failed,
            )
        self.ring = RingPartitions(
            parts.bus,
            parts.names,
            app.name,
            session,
            self.register,
            pattern.partitions,
            on_begin=lambda partition, fence: self.hooks.begin(partition, fence),
            on_end=lambda partition, reason, hard: self.hooks.end(partition, reason, hard),
            on_change=on_change,
            paused=paused,
            fences=parts.fencer is not None and parts.fencer.has_command,
            settle_seconds=float(pattern.settle),
        )
        self.hooks = PartitionHooks(
            app.name,
            parts.node,
            self.ring,
            on_own=self._own_hook(),
            on_release=app.partition_hook("on_release"),
            own_seconds=float(timeouts.on_own),
            release_seconds=float(timeouts.on_release),
            most_at_once=pattern.parallel,
            retry=app.config.retry,
            context=self._context,
            calls=calls,
            prepare=self._prepare_next,
            presence=SharedPresence(parts, app.name, "partitions"),
            on_failed=on_failed,
            on_stuck=on_stuck,
            on_change=on_change,
        )

    def _own_hook(self) -> PartitionHook | None:
        preparing, hook = self._preparing, self._app.partition_hook("on_own")
        if preparing is None:
            return hook

        async def own(partition: int, context: PartitionContext) -> None:
            await preparing.end(partition)
            if hook is not None:
                await hook(partition, context)

        return own

    async def _prepare_next(self, partition: int) -> None:
        """Before *partition* is released: have its next owner get ready, if there is one."""
        if self._preparing is None or not self.session.may_begin:
            return
        # A node that stops asks before the others have planned: the plan is looked at until it names one.
        for _ in range(PLAN_LOOKS):
            if self.ring.planned_owner(partition) != self._parts.node:
                break
            await asyncio.sleep(LOOK_SECONDS)
        node = self.ring.planned_owner(partition)
        if node is not None and node != self._parts.node:
            await self._preparing.ask(partition, node)

    def _context(self, partition: int, fence: Fence) -> PartitionContext:
        name, parts, epoch = self._app.name, self._parts, fence.revision
        return PartitionContext(
            name,
            parts.node,
            partition,
            fence,
            AppKV(parts.bus, parts.names, name, fence=lambda: fence, epoch=lambda: epoch),
            self.locks.under(fence, epoch),
        )

    def _wants_fence(self, session: SessionId) -> bool:
        member = self.ring.members.get(session.node)
        return member is not None and member.session == session and member.fences

    def _rank(self) -> int:
        ready = (node for node, member in self.ring.members.items() if member.ready)
        return sum(1 for node in ready if node < self._parts.node)

    def offer(self, unready_because: str) -> None:
        """Say whether this node may be given partitions."""
        ready = not unready_because
        self.ring.offer(ready=ready, weight=self._pattern.weight, reason=unready_because)

    def bar(self, reason: str) -> None:
        """Give everything back and take nothing more; empty: take part again."""
        self._is_barred, self._empty_since = bool(reason), float("-inf")
        self.ring.bar(reason)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, and if the node leaves, all was given back (or tried to)."""
        if not self.hooks.is_empty:
            return False
        if not self._is_barred or self.ring.is_clear or not self._parts.bus.is_connected:
            return True
        now = system.now()
        if self._empty_since == float("-inf"):
            self._empty_since = now
        return now - self._empty_since > GIVE_BACK_SECONDS

    async def run(self) -> None:
        """Until cancelled. Raises ConfigError if the ring has another number of partitions."""
        if self._preparing is not None:
            await self._preparing.open()
        await self.ring.run()

    async def close(self) -> None:
        """Nothing of it is left afterwards."""
        await self.hooks.close()
        if self._preparing is not None:
            await self._preparing.close()
        await self.register.close()
        await self.locks.close()

    def state(self) -> RingState:
        """What status shows of it."""
        plan, node = self.ring.plan, self._parts.node
        planned = sum(1 for owner in plan.owner_names() if owner == node) if plan is not None else 0
        owned = len(self.hooks.ready)
        return RingState(
            self._pattern.partitions,
            self._pattern.weight,
            planned,
            owned,
            len(self.hooks) - owned,
        )


__all__ = ["RingTerm"]

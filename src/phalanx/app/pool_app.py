"""One pool: the public face of its declaration and of its instance on this node."""

from __future__ import annotations

import asyncio
import logging

from phalanx.app.parts import NodeParts
from phalanx.app.pool_term import PoolTerm
from phalanx.app.section_app import SectionApp
from phalanx.config import AppConfig, Pool
from phalanx.coord.kv import AppKV
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.errors import BusError, ConfigError
from phalanx.messaging.pool_serving import PoolCallServer
from phalanx.messaging.serving import CallServer
from phalanx.ports import Backend, SectionCalls
from phalanx.types import AppStatus, Health, PoolState, Succession

log = logging.getLogger("phalanx.app")

RETRY_SECONDS = 0.2


class PoolApp(SectionApp[PoolTerm]):
    """An app of which several nodes are active at once. Made by :meth:`phalanx.Platform.app`, never directly.

    Hooks are those of an active-passive app, with the same meaning and order, on each node by itself.
    ``ctx.epoch`` is that of the seat under which the node is active: larger than that of whoever had the seat
    before. Those of two instances say nothing about each other.
    """

    def __init__(self, config: AppConfig, backend: Backend | None) -> None:
        super().__init__(config, backend)
        assert isinstance(config.pattern, Pool), "the platform makes no PoolApp of another pattern"
        self.pattern = config.pattern
        self._instance_calls: PoolCallServer | None = None

    # --- what is so

    @property
    def spool_bytes(self) -> int:
        """A pool has no database."""
        return 0

    @property
    def replicas(self) -> int | None:
        """How many instances are wanted: by ``phalanx scale``, else as declared; None: all nodes."""
        return self._term.seats.replicas if self._term is not None else self.pattern.replicas

    @property
    def is_ready(self) -> bool:
        """Whether this node's instance works: it is active, healthy, and not being restarted.

        With checks the first healthy answer is waited for.
        """
        section = self._reigns.section
        if not self.is_active or section is None:
            return False
        if section.program is not None and section.program.is_restarting:
            return False
        verdict = self.health.verdict
        return verdict is Health.HEALTHY or (verdict is Health.UNKNOWN and not self.config.checks)

    def status(self) -> AppStatus:
        """The app on this node, as /status shows it."""
        section, context = self._reigns.section, self._reigns.context
        return AppStatus(
            self.name,
            self.role,
            self.health.verdict,
            context.epoch if context is not None else 0,
            since=self._role.since,
            reason=self._role.reason,
            program=section.program.status() if section is not None and section.program else None,
            pause=self.pause,
            standing=self._standing(),
            unkept=self.unkept_because() if self.is_active else "",
            health_reason=self.health.reason,
            pattern="pool",
            pool=self._state(),
        )

    def _state(self) -> PoolState:
        seats = self._term.seats if self._term is not None else None
        scale = seats.scale if seats is not None else None
        return PoolState(
            self.replicas,
            self.pattern.replicas,
            scale.by if scale is not None else "",
            seats.seat if seats is not None else None,
            self.is_ready,
        )

    # --- life on a node

    async def check(self) -> None:
        """See :meth:`Declared.check`. Raises ConfigError for handlers of events that one node must have."""
        if self.event_handlers.in_section:
            problem = "a pool has several active instances, and these events are handled by one"
            remedy = "declare them anywhere=True, or in an ActivePassive() app"
            raise ConfigError(f"apps.{self.name}.on_event", "(in the active section)", problem, remedy)
        await super().check()

    def _make_calls(self, parts: NodeParts, kv: AppKV) -> CallServer:
        self._instance_calls = calls = PoolCallServer(
            self.name, self.node, self.handlers, parts.bus, parts.names, kv
        )
        return calls

    def _make_term(self, session: Session, register: Register, calls: SectionCalls | None) -> PoolTerm:
        return PoolTerm(
            self,
            self.pattern,
            self._running_parts,
            session,
            register,
            calls,
            highest=self._highest_epoch,
            paused=lambda: self.is_paused,
            on_change=self._on_seats,
            on_acquired=self._on_seat,
        )

    def _begin_tasks(self, tasks: asyncio.TaskGroup, term: PoolTerm) -> None:
        super()._begin_tasks(tasks, term)
        if self.handlers and self._instance_calls is not None:
            tasks.create_task(self._keep_ready(self._instance_calls), name=f"{self.name} readiness")

    async def _keep_ready(self, calls: PoolCallServer) -> None:
        """Have calls come here as long as the instance is ready."""
        while True:
            ready = self.is_ready
            if ready is not calls.is_ready:
                try:
                    await calls.set_ready(ready)
                except BusError as error:
                    log.warning("app %s: calls for any instance: %s", self.name, error)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if ready is not self.is_ready:
                    continue  # it has changed meanwhile
            await self._role.wait_changed()

    # --- what happens

    def on_fenced(self) -> None:
        """A node was said to be off: seats that wait for that are taken now."""
        super().on_fenced()
        if self._term is not None:
            self._term.register.on_fenced()

    def _on_seats(self) -> None:
        if self._term is not None and self._reigns.section is None:
            self._term.check_adopted(is_covered=self._term.has_key)
        self._role.wake()

    def _on_seat(self, seat: int, succession: Succession) -> None:
        self._reigns.succession = succession
        self._journal.report(
            "seat-taken",
            succession.reason,
            succession.vacant_seconds,
            epoch=succession.epoch,
            seat=str(seat),
            previous=succession.previous,
            previous_epoch=str(succession.previous_epoch),
            how=succession.how,
        )

    def _on_health(self, health: Health, reason: str) -> None:
        super()._on_health(health, reason)
        self._role.wake()  # whether it is ready hangs on that


__all__ = ["PoolApp"]

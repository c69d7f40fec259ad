"""What every app is on its node, whatever its pattern."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from phalanx.app.contexts import AppContext
from phalanx.app.declared import Declared
from phalanx.app.journal import AppJournal
from phalanx.app.news import News
from phalanx.app.parts import NodeParts
from phalanx.app.pausing import Pausing
from phalanx.app.role import AppRole
from phalanx.config import AppConfig
from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Lock, Locks, Semaphore
from phalanx.errors import HookFailed, StartError
from phalanx.messaging.serving import CallServer
from phalanx.observe.health import HealthMonitor
from phalanx.ports import Backend, SectionAddresses
from phalanx.types import Health, Pause, Role

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class OnNode(Declared):
    """One app on one node (see :class:`phalanx.app.node_app.NodeApp`). Its pattern says when it works."""

    def __init__(
        self, config: AppConfig, backend: Backend | None = None, addresses: SectionAddresses | None = None
    ) -> None:
        self._journal = journal = AppJournal(config.name)
        super().__init__(config, backend, addresses, journal.hook)
        self.health = HealthMonitor(config.name, config.checks, self._on_health)
        self._role = role = AppRole()
        self._pausing = Pausing(self.name, role, journal)
        self._news = News(self.name, self.hooks, self._on_hook_failed)
        self._parts: NodeParts | None = None
        self._kv: AppKV | None = None
        self._calls: CallServer | None = None
        self.database: AppDatabase | None = None
        """The app's database on this node, while the node runs and the app declares one."""

    # --- what is so

    @property
    def _running_parts(self) -> NodeParts:
        if self._parts is None:
            raise StartError(f"app {self.name!r} does not run yet", "start its platform first")
        return self._parts

    @property
    def node(self) -> str:
        """This node's id. Raises StartError before the platform was started."""
        return self._running_parts.node

    @property
    def role(self) -> Role:
        """What this node is for the app."""
        return self._role.role

    @property
    def is_active(self) -> bool:
        """Whether this node is active for the app; of a ring, whether it serves any partition."""
        return self.role is Role.ACTIVE

    @property
    def kv(self) -> AppKV:
        """The app's own key-value store, for any node and any role (not fenced: see ``ctx.kv``)."""
        if self._kv is None:
            raise StartError(f"app {self.name!r} has no KV yet", "use it while the platform runs")
        return self._kv

    @property
    def locks(self) -> Locks:
        """The app's locks. Raises StartError while this node has no session."""
        locks = self._locks_now()
        if locks is None:
            raise StartError(f"app {self.name!r} has no locks yet", "use them while the platform runs")
        return locks

    def _locks_now(self) -> Locks | None:
        """Those of the present session."""
        raise NotImplementedError

    def lock(
        self, name: str, *, timeout: float = 10.0, cancel: bool = False
    ) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held through this node's session: ``async with app.lock("x") as held``."""
        return self.locks.lock(name, timeout=timeout, cancel=cancel)

    def semaphore(self, name: str, *, permits: int) -> Semaphore:
        """One of the app's semaphores: at most *permits* are held at a time. Raises ConfigError."""
        return Semaphore(lambda: self.locks, name, permits)

    @property
    def pause(self) -> Pause | None:
        """The pause that the app is under, its own or its platform's, as far as this node knows."""
        return self._pausing.pause

    @property
    def is_paused(self) -> bool:
        """Whether nothing of the app may change hands."""
        return self._pausing.is_paused

    async def wait_for_role(self, *roles: Role, timeout: float) -> Role:
        """Wait until this node's role is one of *roles*. Raises TimeoutError after *timeout* seconds."""
        return await self._role.wait_for(*roles, timeout=timeout)

    # --- life on a node

    def _take_up(self, parts: NodeParts) -> None:
        """The node runs: its parts can be used from now on."""
        self._parts = parts
        self._journal.write_to(parts.journal)
        self._pausing.look_at(lambda: parts.pauses)
        self._role.on_change = lambda: parts.on_app_changed(self.name)
        self._kv = AppKV(parts.bus, parts.names, self.name)

    async def _run_hook(self, name: str) -> str:
        """Run ``on_start`` or ``on_stop``; what was wrong, which is reported."""
        try:
            await self.hooks.call(name, AppContext(self.name, self.node, self.kv))
        except HookFailed as error:
            self._on_hook_failed(str(error))
            return str(error)
        return ""

    # --- what happens

    def _on_health(self, health: Health, reason: str) -> None:
        raise NotImplementedError

    def _on_hook_failed(self, problem: str) -> None:
        self._journal.report("hook-failed", problem, level=logging.ERROR)


__all__ = ["OnNode"]

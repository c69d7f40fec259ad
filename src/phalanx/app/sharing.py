"""What apps have in common whose work several nodes share: no election, no leader, no backend that moves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from phalanx.app.contexts import AppContext, HealthChange
from phalanx.app.declared import Declared
from phalanx.app.journal import AppJournal
from phalanx.app.news import News
from phalanx.app.parts import NodeParts, instances_of
from phalanx.app.pausing import Pausing
from phalanx.app.role import AppRole
from phalanx.config import AppConfig
from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Lock, Locks
from phalanx.errors import HookFailed, StartError
from phalanx.messaging.serving import CallServer
from phalanx.observe.health import HealthMonitor
from phalanx.ports import Backend, SectionAddresses
from phalanx.types import Health, Pause, Role

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class SharingApp(Declared):
    """An app that several nodes may work for at once; see :class:`phalanx.app.node_app.NodeApp`."""

    can_adopt = False
    """What it runs is code inside the node."""
    stays_in_pause = False
    spool_bytes = 0

    def __init__(
        self, config: AppConfig, backend: Backend | None = None, addresses: SectionAddresses | None = None
    ) -> None:
        self._journal = journal = AppJournal(config.name)
        super().__init__(config, backend, addresses, journal.hook)
        self.database: AppDatabase | None = None
        self.health = HealthMonitor(config.name, config.checks, self._on_health)
        self._role = role = AppRole()
        self._pausing = Pausing(self.name, role, journal)
        self._news = News(self.name, self.hooks, self._on_hook_failed)
        self._parts: NodeParts | None = None
        self._kv: AppKV | None = None
        self._locks: Locks | None = None
        self._calls: CallServer | None = None
        self._barred = ""
        """Why this node does nothing for the app as long as it lives; empty: it does."""
        self._leaving = ""
        """Why it begins nothing more under this session, which is being given up."""
        self._is_started = False
        self._when_idle: Callable[[], None] | None = None

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
        """Whether this node works for the app."""
        return self.role is Role.ACTIVE

    @property
    def kv(self) -> AppKV:
        """The app's own key-value store, for any node (not fenced: see ``ctx.kv``)."""
        if self._kv is None:
            raise StartError(f"app {self.name!r} has no KV yet", "use it while the platform runs")
        return self._kv

    @property
    def locks(self) -> Locks:
        """The app's locks."""
        if self._locks is None:
            raise StartError(f"app {self.name!r} has no locks yet", "use them while the platform runs")
        return self._locks

    def lock(self, name: str, *, timeout: float = 10.0) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held through this node's session: ``async with app.lock("x") as held``."""
        return self.locks.lock(name, timeout=timeout)

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

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        self._when_idle = callback

    def _unready_because(self) -> str:
        """Why this node should do nothing for the app now; empty if it may."""
        if self._barred or self._leaving:
            return self._barred or self._leaving
        if self.health.verdict is Health.UNHEALTHY:
            return f"unhealthy: {self.health.reason}"
        if self.health.verdict is Health.UNKNOWN and self.config.checks:
            return "its health checks have not answered yet"
        return ""

    # --- life on a node

    async def start(self, parts: NodeParts) -> None:
        """Run ``on_start``. A failure bars this node from the app; the others are not affected."""
        self._parts = parts
        self._journal.write_to(parts.journal)
        self._pausing.look_at(lambda: parts.pauses)
        self._role.on_change = lambda: parts.on_app_changed(self.name)
        self._kv = AppKV(parts.bus, parts.names, self.name)
        self._role.set(Role.STARTING, "")
        if "on_start" in self.hooks:
            try:
                await self.hooks.call("on_start", AppContext(self.name, self.node, self.kv))
            except HookFailed as error:
                self._barred = str(error)
                self._on_hook_failed(str(error))
        self._calls = self._make_calls(parts)
        self._calls.instances = instances_of(parts, self.name)
        await self._calls.open()
        self._is_started = True

    def _make_calls(self, parts: NodeParts) -> CallServer:
        return CallServer(self.name, parts.node, self.handlers, parts.bus, parts.names, self.kv)

    async def stop(self) -> None:
        """Run ``on_stop``. What ran has ended before."""
        if not self._is_started:
            return
        if self._calls is not None:
            await self._calls.close()
        try:
            await self.hooks.call("on_stop", AppContext(self.name, self.node, self.kv))
        except HookFailed as error:
            self._on_hook_failed(str(error))
        self.hooks.close()
        self._role.set(Role.STOPPED, "")
        self._is_started = False

    async def _tell_news(self) -> None:
        async def at_once() -> None:
            """Nothing that is becoming active shares its turn with them."""

        await self._news.run(at_once)

    # --- what happens

    def on_fenced(self) -> None:
        """A node was said to be off."""

    def on_pauses(self) -> None:
        """Something was paused or resumed; if it was this app, what was only reported counts now."""
        if self._pausing.has_changed():
            self._look()
            self._role.wake()

    def _on_health(self, health: Health, reason: str) -> None:
        self._journal.report("health-changed", f"{health}: {reason}" if reason else str(health))
        self._news.tell("on_health_change", HealthChange(self.name, health, reason))
        self._look()

    def _on_hook_failed(self, problem: str) -> None:
        self._journal.report("hook-failed", problem, level=logging.ERROR)

    def _look(self) -> None:
        """Whether this node may do something for the app may have changed."""
        raise NotImplementedError

    async def _until_cancelled(self) -> None:
        await asyncio.get_running_loop().create_future()


__all__ = ["SharingApp"]

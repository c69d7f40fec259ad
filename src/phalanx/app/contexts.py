"""What hooks are given: the contexts of a start and of an active section, and what the news are about."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import msgspec

from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Lock, Locks, Semaphore
from phalanx.errors import StartError
from phalanx.messaging.events import Events
from phalanx.ports import Fence
from phalanx.types import Health

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import ActiveDatabase, AppDatabase


class LeaderChange(msgspec.Struct, frozen=True):
    """What ``on_leader_change`` is told. ``leader`` is a node id, None while nobody leads."""

    app: str
    leader: str | None
    previous: str | None
    epoch: int
    reason: str = ""


class HealthChange(msgspec.Struct, frozen=True):
    """What ``on_health_change`` is told."""

    app: str
    health: Health
    reason: str


class AppContext:
    """What ``on_start`` and ``on_stop`` get. There may be no session then, so there are no locks here."""

    def __init__(self, app: str, node: str, kv: AppKV) -> None:
        self.app, self.node, self.kv = app, node, kv


class ActiveContext:
    """What ``on_active`` and ``on_passive`` get: everything that belongs to one active section.

    Writes through ``kv``, ``events`` and ``lock`` carry the epoch; once another node leads the server refuses
    them (``Fenced``).
    """

    def __init__(
        self,
        app: str,
        node: str,
        epoch: int,
        fence: Fence,
        kv: AppKV,
        locks: Locks,
        database: AppDatabase | None = None,
        events: Events | None = None,
    ) -> None:
        self.app, self.node, self.epoch, self.kv = app, node, epoch, kv
        self._database = database.active if database is not None else None
        self._events = events
        self.fence = fence
        self._locks = locks
        self.cancelled_event = asyncio.Event()
        self.ready_event = asyncio.Event()
        self.is_cooperative = False
        self._loop = asyncio.get_running_loop()

    @property
    def cancelled(self) -> asyncio.Event:
        """Set when the section has to end.

        An ``on_active`` that has looked at this is given the time of ``hook_timeouts.on_passive`` to end
        by itself; one that has not is cancelled (``asyncio.CancelledError``) at once.
        """
        self.is_cooperative = True
        return self.cancelled_event

    @property
    def db(self) -> ActiveDatabase:
        """The app's live database. Raises StartError for an app that declares none."""
        if self._database is None:
            raise StartError(f"app {self.app!r} has no database", "declare one: database=SQLite(path)")
        return self._database

    @property
    def events(self) -> Events:
        """The app's events under this epoch. Raises StartError for an app that declares none."""
        if self._events is None:
            raise StartError(f"app {self.app!r} has no events of its own", "declare them: events=Events()")
        return self._events

    @property
    def is_cancelled(self) -> bool:
        """Whether the section has to end. Also for hooks that run in a thread."""
        self.is_cooperative = True
        return self.cancelled_event.is_set()

    def ready(self) -> None:
        """Say that the app serves now, from an ``on_active`` that goes on running. From any thread."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self.ready_event.set()
        else:
            self._loop.call_soon_threadsafe(self.ready_event.set)

    def lock(
        self, name: str, *, timeout: float = 10.0, cancel: bool = False
    ) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held under this epoch. *timeout* in seconds."""
        return self._locks.lock(name, timeout=timeout, cancel=cancel)

    def semaphore(self, name: str, *, permits: int) -> Semaphore:
        """One of the app's semaphores, its permits held under this epoch. Raises ConfigError."""
        return self._locks.semaphore(name, permits=permits)


__all__ = ["ActiveContext", "AppContext", "HealthChange", "LeaderChange"]

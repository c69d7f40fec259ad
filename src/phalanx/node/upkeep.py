"""What a node looks after as long as it lives: streams, the server it uses, its own loop, pauses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from typing import NoReturn

from phalanx import system
from phalanx.app import App, NodeApp, PoolApp
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.observe.journal import Journal
from phalanx.observe.metrics import Metrics

log = logging.getLogger("phalanx.node")

VANISHED_LOOK_SECONDS = 10.0
"""Between looks whether all streams are there."""

PAUSE_REMINDER_SECONDS = 600.0
"""Between log lines that say that an app is still paused: a pause that was forgotten is an outage to come."""


class StreamCheck:
    """Whether all that was made in NATS for the platform and these apps is still there.

    What is not stands in *problems*, by ``stream <name>``, until it is back.
    """

    def __init__(
        self,
        bus: NatsBus,
        names: Names,
        apps: Collection[NodeApp],
        journal: Journal,
        problems: dict[str, str],
    ) -> None:
        self._bus, self._names, self._apps = bus, names, apps
        self._journal, self._problems = journal, problems

    async def run(self) -> NoReturn:
        """Say so when a stream vanishes while everything runs: nothing else would be noticed but errors."""
        while True:
            await asyncio.sleep(VANISHED_LOOK_SECONDS)
            for stream, what in self._streams_needed().items():
                if (gone := await self._has_vanished(stream)) is None:
                    continue
                key = f"stream {stream}"
                if not gone:
                    self._problems.pop(key, None)
                elif key not in self._problems:
                    self._problems[key] = f"{what} has vanished; see docs/operations.md"
                    action = "bucket-vanished" if stream.startswith("KV_") else "stream-vanished"
                    self._journal.platform(action, self._problems[key], logging.CRITICAL)
            for app in self._apps:
                if app.database is not None:
                    stream = self._names.wal_stream(app.name)
                    app.database.note_missing(self._problems.get(f"stream {stream}", ""))

    def _streams_needed(self) -> dict[str, str]:
        """What has to be there, once it was made, and how to call it."""
        names = self._names
        buckets = [names.platform_bucket, *(names.app_bucket(app.name) for app in self._apps)]
        needed = {names.bucket_stream(bucket): f"the bucket {bucket!r}" for bucket in buckets}
        for name in (app.name for app in self._apps if isinstance(app, App | PoolApp) and app.events_config):
            stream = names.events_stream(name)
            needed[stream] = f"the stream {stream!r}, the events of app {name!r},"
        for name in (app.name for app in self._apps if app.database is not None):
            log_stream, objects = names.wal_stream(name), names.object_stream(names.snapshots_bucket(name))
            needed[log_stream] = f"the stream {log_stream!r}, the log of the database of app {name!r},"
            needed[objects] = f"the stream {objects!r}, the object store of app {name!r},"
        return needed

    async def _has_vanished(self, stream: str) -> bool | None:
        """None: nobody can tell now. A server that has just started may not know all streams yet."""
        try:
            for _ in range(3):
                if await provision.stream_info(self._bus, stream) is not None:
                    return False
                await asyncio.sleep(0.5)
        except BusError:
            return None  # NATS is away: that is told elsewhere
        return True


async def leave_isolated_server(
    bus: NatsBus, register: Register, ttl: float, session: Callable[[], Session | None]
) -> NoReturn:
    """A server that answers pings but has lost its routes tells us nothing of the others any more.

    Then another one is chosen. *ttl* in seconds, *session*: the present one.
    """
    patience = max(1.0, 0.4 * ttl)
    left_at = system.now()
    while True:
        await asyncio.sleep(patience / 4)
        current = session()
        if current is None or not current.is_valid or not bus.is_connected:
            left_at = system.now()
        elif system.now() - max(left_at, register.heard_at) > patience:
            # The session is renewed all the time, so its own renewals at least should have come.
            left_at = system.now()
            await bus.switch_server(f"no session was heard of for {patience:g} s")


async def measure_lag(metrics: Metrics) -> NoReturn:
    """How late this loop is; tells systemd's watchdog, where there is one, that it runs."""
    interval = system.watchdog_interval() or 1.0
    while True:
        before = system.now()
        await asyncio.sleep(min(1.0, interval))
        metrics.set_loop_lag(max(0.0, system.now() - before - min(1.0, interval)))
        # Also without a session: a restart would bring no NATS back, but would end an embedded server.
        if system.watchdog_interval() is not None:
            with contextlib.suppress(OSError):
                system.notify("WATCHDOG=1")


async def remind_of_pauses(apps: Collection[NodeApp]) -> NoReturn:
    """Say in the log, again and again, which apps are still paused."""
    while True:
        await asyncio.sleep(PAUSE_REMINDER_SECONDS)
        for app in apps:
            if (pause := app.pause) is not None:
                since = (system.wall() - pause.since) / 60
                log.warning("app %s: still %s, for %.0f min now", app.name, pause, since)


__all__ = ["StreamCheck", "leave_isolated_server", "measure_lag", "remind_of_pauses"]

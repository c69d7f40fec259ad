"""Keeps the leader of an app's streams off the host of the app's active node.

A dead host often takes its NATS server with it. If that server led the app's stream too, the takeover
would have to wait for the stream's election (4-8 s measured); so it is moved away beforehand.

A move takes some 20 ms. A message that is on its way to the old leader meanwhile may get lost: the writer of
a WAL log misses its answer after a tenth of a second or so, looks, and sends it again (``data.patience``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any, Protocol

from phalanx.aio import wait_at_most
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.ports import Bus

log = logging.getLogger("phalanx.steering")

CHECK_SECONDS = 10.0
"""Leaders move by themselves now and then (restarts, elections)."""

SETTLE_SECONDS = 0.3
"""After an activation: its own writes come first."""


class Platform(Protocol):
    """What steering reports to."""

    def platform(self, action: str, reason: str = "", level: int = ..., **details: str) -> None: ...


class Steering:
    """One task that looks after every app that is active on this node.

    *local_server*: the NATS server on this host; empty when there is none, and nothing is done.
    *with_databases*: the apps that have a WAL log.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        local_server: str,
        journal: Platform,
        with_databases: Collection[str] = (),
    ) -> None:
        self._bus, self._names, self._local, self._journal = bus, names, local_server, journal
        self._with_databases = with_databases
        self._look = asyncio.Event()

    def look(self) -> None:
        """An app has become active here: look soon."""
        self._look.set()

    async def run(self, active_apps: Callable[[], list[str]]) -> None:
        """Steer until cancelled."""
        if not self._local:
            return
        while True:
            if await wait_at_most(self._look, CHECK_SECONDS):
                self._look.clear()
                await asyncio.sleep(SETTLE_SECONDS)
            for app in active_apps():
                for stream in self._streams(app):
                    try:
                        await self._steer(app, stream)
                    except BusError as error:
                        log.debug("steering %s: %s", stream, error)
                        asyncio.get_running_loop().call_later(1.0, self._look.set)

    def _streams(self, app: str) -> list[str]:
        """Those that a takeover of *app* needs: its bucket, and the log of its database."""
        streams = [self._names.bucket_stream(self._names.app_bucket(app))]
        if app in self._with_databases:
            streams.append(self._names.wal_stream(app))
        return streams

    async def _steer(self, app: str, stream: str) -> None:
        info = await self._bus.api(f"STREAM.INFO.{stream}", {}, timeout=2.0)
        cluster: dict[str, Any] = info.get("cluster") or {}
        if cluster.get("leader") != self._local:
            return
        target = _best_replica(cluster)
        if target is None:
            return
        await self._bus.api(
            f"STREAM.LEADER.STEPDOWN.{stream}", {"placement": {"preferred": target}}, timeout=2.0
        )
        self._journal.platform(
            "stream-leader-moved", f"off the host of the active node of {app}", stream=stream, to=target
        )
        # A preference is no promise: look again.
        asyncio.get_running_loop().call_later(1.0, self._look.set)


def _best_replica(cluster: dict[str, Any]) -> str | None:
    """The replica that is up to date and was heard of most recently."""
    replicas: list[dict[str, Any]] = cluster.get("replicas") or []
    able = [r for r in replicas if r.get("current") and not r.get("offline")]
    best = min(able, key=lambda r: (int(r.get("lag", 0)), int(r.get("active", 0))), default=None)
    return str(best["name"]) if best is not None else None

"""The schedule of an app's snapshots, with a standby that makes them, or dies while it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
from tests.e2e.site import Site
from tests.e2e.wal import APP, NAMES, connected, make_log
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.config import SQLite
from phalanx.data import schedule
from phalanx.data.database import AppDatabase
from phalanx.data.schedule import SnapshotSchedule
from phalanx.data.status import SnapshotProgress, SnapshotRequest
from phalanx.ports import Message
from phalanx.testing.nats import NatsServer

STANDBY = "n2"


class Standby:
    """Says how far it is, so many times, and then which snapshot it has made, if it lives that long."""

    def __init__(self, bus: NatsBus, signs: int, name: str = "") -> None:
        self._bus, self._signs, self._name = bus, signs, name
        self.asked: list[SnapshotRequest] = []

    async def on_request(self, message: Message) -> None:
        self.asked.append(msgspec.json.decode(message.data, type=SnapshotRequest))
        for done in range(self._signs):
            await self._say(message, SnapshotProgress(done_bytes=done, total_bytes=9))
            await asyncio.sleep(0.3)
        if self._name:
            await self._say(message, SnapshotProgress(name=self._name))

    async def _say(self, message: Message, progress: SnapshotProgress) -> None:
        await self._bus.publish(message.reply, msgspec.json.encode(progress))


@asynccontextmanager
async def scheduled(site: Site, bus: NatsBus, standby: Standby | None) -> AsyncGenerator[list[str]]:
    """A schedule at work: what its node itself was asked to make."""
    own: list[str] = []

    async def make_snapshot(*, kind: str) -> None:
        own.append(kind)
        await site.snapshots.create(site.source)

    database = SimpleNamespace(
        app=APP,
        node="n1",
        bus=bus,
        names=NAMES,
        config=SQLite(str(site.live), log_limit=1 << 20),
        snapshots=site.snapshots,
        log=site.log,
        position=site.positions[-1],
        standbys=lambda: [STANDBY],
        make_snapshot=make_snapshot,
        report=lambda *_, **__: None,  # pyright: ignore
    )
    running = SnapshotSchedule(cast(AppDatabase, database))
    if standby is not None:
        await bus.subscribe(NAMES.database_subject(APP, "snapshot", STANDBY), standby.on_request)
    await running.start()
    try:
        yield own
    finally:
        await running.stop()


@pytest.mark.parametrize("standby_is", ["slow", "dying at once", "dying", "dead"])
async def test_snapshot_is_made_whatever_the_standby_does(
    standby_is: str, tmp_path: Path, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is heard of is waited for, however long it takes; for one that is silent the node makes it."""
    monkeypatch.setattr(schedule, "SILENT_SECONDS", 0.6)
    async with connected(nats_server.url()) as bus:
        with closing(Site(tmp_path, bus, await make_log(bus), 4096)) as site:
            await site.begin(7)
            for _ in range(3):
                await site.commit(rows=10, size=60_000)
            standbys = {
                "slow": Standby(bus, 4, "snapshot-1"),
                "dying at once": Standby(bus, 0),
                "dying": Standby(bus, 2),
                "dead": None,
            }
            standby = standbys[standby_is]
            tidied = asyncio.Event()
            monkeypatch.setattr(SnapshotSchedule, "tidy", partial(noted, tidied))
            async with scheduled(site, bus, standby) as own:
                await until(tidied.is_set)
            assert own == ([] if standby_is == "slow" else ["scheduled"])
            assert standby is None or [request.kind for request in standby.asked] == ["scheduled"]


async def noted(event: asyncio.Event) -> None:
    """Set it."""
    event.set()

"""Disks that are too small for what a node or an operator wants to put there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.cli import Cli
from tests.e2e.disks import small_disk_at
from tests.e2e.site import Site
from tests.e2e.test_database import audited, client, database_stage
from tests.e2e.wal import APP, NAMES, connected, make_log

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.data import disk
from phalanx.data.snapshots import Snapshot
from phalanx.errors import DiskFull
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import since_now

MIB = 1 << 20


def resize(folder: Path, mebibytes: int) -> None:
    """Give the small disk another size."""
    subprocess.run(("mount", "-o", f"remount,size={mebibytes}m", folder), check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of node n2: a disk of 8 MiB."""
    with small_disk_at(tmp_path / "n2") as folder:
        yield folder


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    """A connection."""
    async with connected(nats_server.url()) as bus:
        yield bus


@pytest.fixture
async def site(tmp_path: Path, bus: NatsBus) -> AsyncIterator[Site]:
    """A site in its first reign, with a database of 12 MB."""
    with closing(Site(tmp_path, bus, await make_log(bus), 4096)) as made:
        await made.begin(7)
        await made.commit(rows=200, size=60_000)
        yield made


async def made(site: Site) -> Snapshot:
    """Its snapshot."""
    return await site.snapshots.create(site.source)


@pytest.mark.parametrize("is_late", [False, True])
async def test_snapshot_that_has_no_room_is_not_begun_or_leaves_nothing(
    site: Site, small_disk: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """The error says where, what for and how much; also where the room goes only while it is unpacked."""
    snapshot = await made(site)
    if is_late:
        monkeypatch.setattr(disk, "check_room", lambda *_: None)
    begun: list[int] = []
    with pytest.raises(DiskFull) as raised:
        await site.snapshots.unpack(snapshot, small_disk / "image", lambda done, _: begun.append(done))
    assert bool(begun) == is_late
    assert f"the disk of {small_disk} has no room for {snapshot.name}" in str(raised.value)
    assert f"needs {snapshot.raw_bytes // MIB} MiB" in str(raised.value)
    assert os.listdir(small_disk) == []


async def test_snapshot_verify_without_room_says_nothing_about_the_snapshot(
    site: Site, bus: NatsBus, nats_server: NatsServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good snapshot is never called bad because there is no place to look at it."""
    bucket = NAMES.platform_bucket
    await create_stream(bus, bucket_config(NAMES, bucket, None, history=4, replicas=1))
    for key in (NAMES.app_key(APP), NAMES.database_key(APP)):
        await bus.write(NAMES.key_subject(bucket, key), b"{}")
    await made(site)
    monkeypatch.setenv("TMPDIR", str(small_disk))
    cli = Cli(nats_server.url(), small_disk)
    for options in ((), ("--json",)):
        said = await cli.refused("snapshot", "verify", APP, *options, code=1)
        assert "cannot be looked at" in said
        assert "has no room" in said


async def test_standby_without_room_for_the_snapshot_says_so_once_and_goes_on_when_there_is(
    tmp_path: Path, small_disk: Path, nats_server: NatsServer
) -> None:
    """However often it is tried; and it leaves the room that there is to others."""
    with database_stage(tmp_path, nats_server, count=2, commit_seconds=0.2, sync_every=0) as running:
        running.nodes["n2"].stop()
        active = await running.nodes.wait_for_active("wiki")
        await running.wait_for("committed", 0.0, node=active)
        with closing(sqlite3.connect(tmp_path / active / "wiki.db", timeout=20)) as database:
            database.execute("CREATE TABLE large (x)")
            database.execute("INSERT INTO large VALUES (randomblob(12000000))")
            database.commit()
        async with client(nats_server) as platform:
            await running.wait_for("committed", since_now(), node=active)
            await platform.databases.create_snapshot("wiki")
        await asyncio.to_thread(clear, small_disk)
        running.nodes["n2"].start()
        await running.nodes.wait_until(
            lambda: "has no room" in str(running.nodes["n2"].status()), 20, "it is not reported"
        )
        least = 8.0 * MIB
        for _ in range(40):  # so long it is tried again and again
            await asyncio.sleep(0.1)
            space = os.statvfs(small_disk)
            least = min(least, space.f_bavail * space.f_frsize)
        assert least > 6 * MIB
        resize(small_disk, 64)
        await running.nodes.wait_for_standbys("wiki", 1)
        entries = [e for e in await audited(nats_server, "database-unavailable") if e.node == "n2"]
        assert len(entries) == 1
        assert "make room" in entries[0].reason


async def test_standby_whose_disk_is_full_for_a_while_goes_on_with_its_replica(
    tmp_path: Path, small_disk: Path, nats_server: NatsServer
) -> None:
    """What it has is as good as before: no new beginning, and few lines in the audit log."""
    options = {"sync": "server"}
    with database_stage(
        tmp_path, nats_server, count=2, commit_seconds=0.02, sync_every=0, database_options=options
    ) as running:
        await running.settled()
        if (await running.nodes.wait_for_active("wiki")) == "n2":
            running.nodes["n2"].stop()
            await running.nodes.wait_for_active("wiki")
            running.nodes["n2"].start()
            await running.settled()
        filler = small_disk / "filler"
        await asyncio.to_thread(fill, filler)
        with closing(sqlite3.connect(tmp_path / "n1" / "wiki.db", timeout=20)) as database:
            database.execute("CREATE TABLE large (x)")
            database.execute("INSERT INTO large VALUES (randomblob(1000000))")
            database.commit()
        await running.nodes.wait_until(
            lambda: "No space" in str(running.nodes["n2"].status()), 30, "it is not noticed"
        )
        await asyncio.sleep(3)  # so long it is tried again and again
        filler.unlink()
        await running.nodes.wait_for_standbys("wiki", 1)
        entries = [
            e
            for e in await audited(nats_server, "replica-disk-full", "replica-lost", "replica-bootstrapped")
            if e.node == "n2"
        ]
        assert [e.action for e in entries] == ["replica-disk-full"], json.dumps([e.reason for e in entries])
        running.check()


def fill(filler: Path) -> None:
    """Take all the room that there is."""
    with filler.open("wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def clear(folder: Path) -> None:
    """Remove all in it."""
    subprocess.run(("find", folder, "-mindepth", "1", "-delete"), check=True)

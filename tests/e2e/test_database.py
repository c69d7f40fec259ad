"""An app's database survives its node: replicas follow, failovers promote (G3, G8)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.data.entries import SealKind
from phalanx.data.log import WalLog
from phalanx.data.objects import ObjectStore
from phalanx.data.status import RestoreRequest
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry, read_audit
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess
from phalanx.testing.stage import Stage, since_now, stage


@contextmanager
def database_stage(tmp_path: Path, nats: NatsServer, **settings: Any) -> Generator[Stage]:
    """Nodes whose app commits rows to a database, each in a folder of its own."""
    settings = {"database": str(tmp_path / "{node}" / "wiki.db"), "tick_seconds": 0.01, **settings}
    with stage(tmp_path, nats, **settings) as running:
        yield running


def kill_all_of(node: NodeProcess) -> None:
    """SIGKILL the node and all its processes at one moment, as a loss of power would end them."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    victims = [node.keeper_pid, node.pid, *(int(child) for child in children)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    node.wait(10)


async def audited(nats: NatsServer, *actions: str) -> list[AuditEntry]:
    """The audit entries with one of *actions*; waits until there is one."""
    bus = await NatsBus.connect(NatsOptions(urls=(nats.url(0),)))
    try:
        deadline = system.now() + 20
        while True:
            entries = await read_audit(bus, Names("test"), limit=10_000)
            found = [entry for entry in entries if entry.action in actions]
            if found or system.now() > deadline:
                return found
            await asyncio.sleep(0.02)
    finally:
        await bus.close()


def set_aside(folder: Path) -> list[Path]:
    """What was set aside on any node."""
    return list(folder.glob("*/*.diverged-*"))


def listed(folder: Path) -> list[Path]:
    """All files below *folder*, but those that are only there while a node runs."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def rows_of(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What *query* gives in the database at *path*."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


async def test_three_nodes_sigkill_of_the_active_one_the_next_has_every_confirmed_row_g3(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What a barrier has confirmed is there on the node that takes over, and rows go on from there."""
    with database_stage(tmp_path, nats_server) as running:
        active = await running.settled()
        await running.wait_for("confirmed", 0.0)
        since = since_now()
        running.nodes[active].kill()
        opened = await running.wait_for("opened", since)
        confirmed = [e.data["number"] for e in running.history.events("confirmed") if e.at < since]
        assert opened.data["number"] >= max(confirmed)
        await running.wait_for("confirmed", opened.at)
        running.check()


async def test_three_nodes_planned_hand_over_loses_no_row(tmp_path: Path, nats_server: NatsServer) -> None:
    """All rows, confirmed or not, are on the next node; the old one becomes a standby with the same file."""
    with database_stage(tmp_path, nats_server, sync_every=0) as running:
        active = await running.settled()
        await running.wait_for("committed", 0.0, node=active)
        since = since_now()
        running.nodes[active].terminate()
        opened = await running.wait_for("opened", since)
        assert opened.node != active
        written = [e.data["number"] for e in running.history.events("committed") if e.node == active]
        assert opened.data["number"] == max(written)
        running.nodes[active].wait(20)
        running.nodes[active].start()
        await running.nodes.wait_for_standbys(running.app, 2)
        assert not list((tmp_path / active).glob("*.diverged-*"))
        running.check()


async def test_two_nodes_node_keeper_and_litestream_killed_what_was_lost_is_kept_and_counted_g3(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What the old node had beyond the log lies beside its database, with the very number of transactions."""
    with database_stage(tmp_path, nats_server, count=2, sync_every=0, commit_seconds=0.001) as running:
        active = await running.settled()
        await running.wait_for("committed", 0.0, node=active)
        await running.nodes.wait_until(
            lambda: len(running.history.events("committed")) > 200, 20, "too few commits"
        )
        since = since_now()
        kill_all_of(running.nodes[active])
        opened = await running.wait_for("opened", since)
        running.nodes[active].start()
        await running.nodes.wait_for_standbys(running.app, 1)
        written = max(e.data["number"] for e in running.history.events("committed") if e.node == active)
        for file in (tmp_path / active).glob("*.diverged-[0-9]"):
            # The last one may have been killed before it could note its commit.
            [(number,)] = rows_of(file, "SELECT max(number) FROM entries")
            assert number in (written, written + 1)
            written = number
        lost = written - opened.data["number"]
        entries = await audited(nats_server, "database-diverged", "database-returned")
        said = next(e for e in entries if e.node == active)
        assert (int(said.details["transactions"]), said.details.get("exact", "true")) == (lost, "true")
        assert bool(list((tmp_path / active).glob("*.diverged-*.json"))) == (lost > 0)
        running.check()


async def test_a_replica_that_was_too_far_behind_is_a_standby_once_it_has_caught_up(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What a node missed is older than max_lag when it comes back: no candidate until that is applied."""
    options = {"max_lag": 0.5, "sync": "server"}
    with database_stage(tmp_path, nats_server, count=2, database_options=options) as running:
        active = await running.settled()
        await running.wait_for("committed", 0.0, node=active)
        late = running.nodes["n1" if active == "n2" else "n2"]
        late.kill()
        killed = since_now()
        await running.wait_for("committed", killed + 2.0)
        late.start()
        await running.nodes.wait_for_standbys(running.app, 1)
        running.check()


def client(nats: NatsServer) -> PlatformClient:
    """What the command line uses."""
    return PlatformClient("test", NatsOptions(urls=(nats.url(0),)))


async def test_a_node_that_joins_late_begins_with_a_snapshot_when_the_log_does_not_reach_back(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """The log was purged behind the snapshot: the newcomer takes that, then follows, and has every row."""
    with database_stage(tmp_path, nats_server, sync_every=5) as running:
        late = running.nodes["n3"]
        late.stop()
        await running.settled(standbys=1)
        await running.wait_for("confirmed", 0.0)
        async with client(nats_server) as platform:
            name = await platform.databases.create_snapshot("wiki")
            assert name
            wal = WalLog(platform.bus, Names("test"), "wiki")
            assert await wal.purge(int(name.removeprefix("snapshot-"))) > 0
        late.start()
        await running.nodes.wait_for_standbys(running.app, 2)
        entries = await audited(nats_server, "replica-bootstrapped")
        assert [e.details["snapshot"] for e in entries if e.node == "n3"] == [name]
        running.nodes["n1"].stop()
        running.nodes["n2"].stop()
        since = since_now()
        opened = await running.wait_for("opened", since, node="n3")
        confirmed = [e.data["number"] for e in running.history.events("confirmed") if e.at < since]
        assert opened.data["number"] >= max(confirmed)
        running.check()


async def test_a_node_that_joins_late_goes_back_to_an_older_snapshot_where_the_newest_is_damaged(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What is damaged is reported, and costs no standby."""
    with database_stage(tmp_path, nats_server, sync_every=5) as running:
        late = running.nodes["n3"]
        late.stop()
        await running.settled(standbys=1)
        await running.wait_for("confirmed", 0.0)
        async with client(nats_server) as platform:
            good = await platform.databases.create_snapshot("wiki")
            await running.wait_for("confirmed", since_now())
            bad = await platform.databases.create_snapshot("wiki")
            objects = ObjectStore(platform.bus, Names("test"), "wiki")
            info = await objects.info(bad)
            assert info is not None
            data = bytearray(b"".join([chunk async for chunk in objects.get(bad)]))
            data[len(data) // 2] ^= 1

            async def pieces() -> AsyncGenerator[bytes]:
                yield bytes(data)

            await objects.put(bad, pieces(), info.metadata)
        late.start()
        await running.nodes.wait_for_standbys(running.app, 2)
        entries = await audited(nats_server, "replica-bootstrapped")
        assert [e.details["snapshot"] for e in entries if e.node == "n3"] == [good]
        entries = await audited(nats_server, "snapshot-bad")
        assert [e.details["snapshot"] for e in entries if e.node == "n3"] == [bad]
        running.check()


async def test_g3_a_node_that_returns_after_the_log_was_purged_does_not_lead_with_its_old_database(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Nothing of the log says that somebody has led since but its end: the old database is set aside."""
    options = {"sync": "server"}
    with database_stage(tmp_path, nats_server, count=2, sync_every=5, database_options=options) as running:
        old = await running.settled()
        await running.wait_for("confirmed", 0.0)
        since = since_now()
        kill_all_of(running.nodes[old])
        new = (await running.wait_for("opened", since)).node
        await running.wait_for("confirmed", since_now())
        async with client(nats_server) as platform:
            name = await platform.databases.create_snapshot("wiki")
            wal = WalLog(platform.bus, Names("test"), "wiki")
            await running.wait_for("confirmed", since_now())
            assert await wal.purge(int(name.removeprefix("snapshot-"))) > 0
            assert not await wal.seals(0)
        running.nodes[old].start()
        await running.nodes.wait_for_standbys(running.app, 1)
        since = since_now()
        kill_all_of(running.nodes[new])
        opened = await running.wait_for("opened", since, node=old)
        confirmed = [e.data["number"] for e in running.history.events("confirmed") if e.at < since]
        assert opened.data["number"] >= max(confirmed)
        entries = [e for e in await audited(nats_server, "database-diverged") if e.node == old]
        assert [e.details["exact"] for e in entries] == ["false"]
        assert Path(entries[0].details["file"]) in set_aside(tmp_path)
        running.check()


async def test_g3_a_kept_database_whose_node_ends_between_seal_and_resume_stays_the_database(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """A seal of its own under which nothing was written does not make it the database of somebody else."""
    with database_stage(tmp_path, nats_server, count=1, sync_every=0, commit_seconds=0.003) as running:
        node = await running.nodes.wait_for_active("wiki")
        await running.nodes.wait_until(
            lambda: len(running.history.events("committed")) > 100, 20, "too few commits"
        )
        since = since_now()
        kill_all_of(running.nodes[node])
        written = max(e.data["number"] for e in running.history.events("committed"))
        async with client(nats_server) as platform:
            wal = WalLog(platform.bus, Names("test"), "wiki")
            await wal.seal((await wal.last()).epoch + 1, node, SealKind.OPEN, "becomes active")
        running.nodes[node].start()
        opened = await running.wait_for("opened", since, node=node)
        assert opened.data["number"] == written
        assert not set_aside(tmp_path)


async def test_restored_in_place_all_nodes_go_back_and_go_on(tmp_path: Path, nats_server: NatsServer) -> None:
    """The state of a snapshot becomes one more record, which every node follows; rows go on from there."""
    with database_stage(tmp_path, nats_server, sync_every=5) as running:
        await running.settled()
        await running.wait_for("confirmed", 0.0)
        async with client(nats_server) as platform:
            name = await platform.databases.create_snapshot("wiki")
            later = await running.wait_for("confirmed", since_now())
            since = since_now()
            await platform.databases.restore_in_place("wiki", RestoreRequest(snapshot=name))
        opened = await running.wait_for("opened", since)
        assert 0 < opened.data["number"] < later.data["number"]
        await running.settled()
        assert await audited(nats_server, "database-restored")
        assert not set_aside(tmp_path)
        running.check()


async def test_an_existing_database_is_adopted_and_a_second_one_keeps_its_node_from_leading(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """The first node's file becomes everybody's; a file in the same place elsewhere is never overwritten."""
    for node, text in (("n1", "kept"), ("n2", "foreign")):
        (tmp_path / node).mkdir()
        connection = sqlite3.connect(tmp_path / node / "wiki.db")
        connection.execute("CREATE TABLE old (text)")
        connection.execute("INSERT INTO old VALUES (?)", (text,))
        connection.commit()
        connection.close()
    with database_stage(tmp_path, nats_server) as running:
        await running.nodes.wait_until(lambda: running.nodes.actives("wiki"), 30, "nobody is active")
        first = running.nodes.actives("wiki")[0]
        assert first in ("n1", "n2")
        other = "n2" if first == "n1" else "n1"
        await running.nodes.wait_for_standbys("wiki", 1)
        await running.nodes.wait_until(
            lambda: "move it away" in str(running.nodes[other].status()), 20, "the file is not reported"
        )
        kept = rows_of(tmp_path / other / "wiki.db", "SELECT text FROM old")
        assert kept == [("foreign" if other == "n2" else "kept",)]
        running.nodes[first].kill()
        opened = await running.wait_for("opened", since_now() - 0.5, node="n3")
        assert rows_of(tmp_path / opened.node / "wiki.db", "SELECT text FROM old") != kept
        (tmp_path / other / "wiki.db").rename(tmp_path / other / "moved.db")
        await running.nodes.wait_until(
            lambda: running.nodes[other].is_standby("wiki"),
            20,
            "it is no candidate although the file is gone",
        )


async def test_a_folder_of_another_platform_is_left_alone(tmp_path: Path, nats_server: NatsServer) -> None:
    """The same path with another NATS: the node says so, is no candidate, and touches nothing."""
    with database_stage(tmp_path, nats_server, count=1) as running:
        await running.nodes.wait_for_active("wiki")
        await running.wait_for("committed", 0.0)
        running.nodes["n1"].terminate()
        running.nodes["n1"].wait(20)
    before = sorted((path.name, path.stat().st_ino) for path in listed(tmp_path / "n1"))
    with NatsServer() as other, database_stage(tmp_path, other, count=1) as running:
        await running.nodes.wait_until(
            lambda: "belongs to app 'wiki'" in str(running.nodes["n1"].status()), 20, "it is not reported"
        )
        assert running.nodes.actives("wiki") == []
    assert sorted((path.name, path.stat().st_ino) for path in listed(tmp_path / "n1")) == before

"""What a loss of power leaves of a node's captured files: it mends itself, and says which file it was."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.test_capture import Bench, is_full, rebuild
from tests.e2e.test_database import audited, database_stage, kill_all_of

from phalanx.data.litestream import Paths
from phalanx.data.records import Records
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import since_now

DAMAGES = {"empty": 0, "cut": 0.6, "zeros": 1.0}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        await made.dispose()


def damage(path: Path, how: str) -> None:
    """As a file that was renamed before its content was on the disk."""
    content = path.read_bytes()
    size = int(len(content) * DAMAGES[how])
    path.write_bytes(content[:size] if how == "cut" else bytes(size))


async def captured(bench: Bench, count: int = 5) -> sqlite3.Connection:
    """So many transactions, each in a file, of a capture that was ended."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    for number in range(count):
        db.execute("INSERT INTO t (x) VALUES (?)", (f"row {number}" * 100,))
        await one.sync(5)
    await bench.stop(one)
    return db


@pytest.mark.parametrize("how", DAMAGES)
async def test_newest_captured_file_is_damaged_but_in_the_log(
    bench: Bench, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody needs it: the next record holds every page, and the log names the file."""
    db = await captured(bench)
    newest = bench.level0()[-1]
    last = bench.captures[0].captured
    damage(newest, how)
    two = bench.capture()
    await two.start(last)
    db.execute("INSERT INTO t (x) VALUES ('after it')")
    await two.sync(5)
    await bench.stop(two)
    files = two.files(last)
    assert files[0][0] == last + 1
    assert is_full(files[0][1])
    assert "broken" not in bench.kinds()
    assert str(newest) in caplog.text
    bench.close()
    assert rebuild(files) == bench.live.read_bytes()


@pytest.mark.parametrize("how", DAMAGES)
async def test_newest_captured_file_is_damaged_and_nowhere_else(bench: Bench, how: str) -> None:
    """What it held is captured again, without a gap."""
    db = await captured(bench)
    damage(bench.level0()[-1], how)
    two = bench.capture()
    await two.start(1)
    db.execute("INSERT INTO t (x) VALUES ('after it')")
    await two.sync(5)
    await bench.stop(two)
    bench.assert_rebuilds(two.files(0))


async def test_an_earlier_captured_file_is_empty_and_nowhere_else(bench: Bench) -> None:
    """It goes with those that follow it, and all of it is captured again."""
    db = await captured(bench)
    damage(bench.level0()[2], "empty")
    two = bench.capture()
    await two.start(1)
    db.execute("INSERT INTO t (x) VALUES ('after it')")
    await two.sync(5)
    await bench.stop(two)
    bench.assert_rebuilds(two.files(0))


@pytest.mark.parametrize("exists", [True, False])
def test_no_captured_file_gets_its_name_before_its_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """A loss of power leaves the old file or the new one, never an empty one."""
    records = Records(Paths(tmp_path / "wiki.db", tmp_path / "phalanx"))
    if exists:
        records.open(1)
        records.prepare(4096, full=True)
    synced: set[int] = set()
    renamed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def see_sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def see_rename(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in synced, f"{target.name} is not on the disk yet"
        renamed.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", see_sync)
    monkeypatch.setattr(Path, "replace", see_rename)
    monkeypatch.setattr(Path, "rename", see_rename)
    again = Records(Paths(tmp_path / "wiki.db", tmp_path / "phalanx"))
    again.open(1)
    again.prepare(4096, full=True)
    assert renamed == ["0000000000000001-0000000000000001.ltx", "unverified"]


async def test_two_nodes_captured_file_of_the_old_leader_is_empty_and_it_returns(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Another one has led since: it becomes a standby, and its database is returned or set aside, once."""
    with database_stage(tmp_path, nats_server, count=2, sync_every=1, commit_seconds=0.05) as running:
        active = await running.settled()
        other = "n1" if active == "n2" else "n2"
        await running.wait_for("confirmed", 0.0)
        since = since_now()
        kill_all_of(running.nodes[active])
        await running.wait_for("opened", since, node=other)
        level0 = tmp_path / active / ".wiki.db-phalanx" / "capture" / "ltx" / "0"
        damage(max(level0.glob("*.ltx")), "empty")
        running.nodes[active].start()
        await running.nodes.wait_for_standbys(running.app, 1)
        entries = await audited(nats_server, "database-diverged", "database-returned", "database-unavailable")
        assert [entry.node for entry in entries] == [active]
        assert entries[0].action in ("database-diverged", "database-returned")
        running.check()


async def test_single_node_captured_file_is_empty_and_it_goes_on(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Nobody has led since: it leads again with all that was committed."""
    options = {"sync": "server"}
    with database_stage(
        tmp_path, nats_server, count=1, sync_every=1, commit_seconds=0.05, database_options=options
    ) as running:
        await running.nodes.wait_for_active(running.app)
        await running.wait_for("confirmed", 0.0)
        kill_all_of(running.nodes["n1"])
        level0 = tmp_path / "n1" / ".wiki.db-phalanx" / "capture" / "ltx" / "0"
        damage(max(level0.glob("*.ltx")), "empty")
        since = since_now()
        running.nodes["n1"].start()
        await running.wait_for("opened", since)
        await running.wait_for("confirmed", since_now())
        running.check()

"""``phalanx db`` and ``phalanx snapshot`` on three real nodes whose app commits all the time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cli import Cli
from tests.waiting import until

from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import Stage, since_now, stage

LATE = """
import os, sqlite3, sys
late = sqlite3.connect(sys.argv[1])
late.execute("INSERT INTO entries (number, epoch, node) VALUES (1000000, 0, 'late')")
late.commit()
os._exit(0)
"""


def commit_late(path: Path) -> None:
    """What a program commits that has outlived its node; it dies without closing, so the WAL stays."""
    subprocess.run([sys.executable, "-c", LATE, str(path)], check=True, timeout=30)


class Platform(Cli):
    """The command line, and the nodes behind it."""

    def __init__(self, url: str, folder: Path, running: Stage) -> None:
        super().__init__(url, folder, "test")
        self.running = running

    async def rows_confirmed(self, count: int = 20) -> int:
        """Wait until more rows are confirmed; the number of the last."""
        since = since_now()
        for _ in range(count):
            event = await self.running.wait_for("confirmed", since)
            since = event.at + 1e-9
            if event.data["number"] >= count:
                return int(event.data["number"])
        raise AssertionError("no rows")

    def rows(self, name: str) -> list[int]:
        """What a restored database holds."""
        with closing(sqlite3.connect(self.folder / name)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return [row[0] for row in connection.execute("SELECT number FROM entries ORDER BY number")]

    async def node(self, name: str) -> dict[str, Any]:
        """What ``db status`` says of one node."""
        [view] = (await self.json("db", "status", "wiki"))["databases"]
        return next(node for node in view["nodes"] if node["node"] == name)


@pytest.fixture
def platform(tmp_path: Path, nats_server: NatsServer) -> Iterator[Platform]:
    """Three nodes, each with a database of its own."""
    (tmp_path / "here").mkdir()
    for node in ("n1", "n2", "n3"):
        (tmp_path / node).mkdir()
    with stage(tmp_path, nats_server, database=str(tmp_path / "{node}" / "wiki.db")) as running:
        yield Platform(nats_server.url(), tmp_path / "here", running)


async def test_three_nodes_db_status_names_the_live_one_and_its_followers(platform: Platform) -> None:
    """One is live, the others follow and are near the end of the log."""
    active = await platform.running.settled()
    await platform.rows_confirmed()
    [view] = (await platform.json("db", "status"))["databases"]
    assert view["silent"] == []
    roles = {node["node"]: node["role"] for node in view["nodes"]}
    assert roles == {"n1": "following", "n2": "following", "n3": "following", active: "live"}
    assert {node["page_size"] for node in view["nodes"]} == {4096}
    live = await platform.node(active)
    assert live["position"]["txid"] > 0
    assert live["size_bytes"] > 0
    assert live["capture_pid"] > 0
    text, _ = await platform.call("db", "status")
    assert len(text.splitlines()) == 5


async def test_three_nodes_db_verify_under_writes(platform: Platform) -> None:
    """All databases are sound, and the same where they were seen at one position."""
    await platform.running.settled()
    await platform.rows_confirmed()
    await platform.json("snapshot", "create", "wiki")
    found = await platform.json("db", "verify", "wiki")
    assert len(found["nodes"]) == 3
    assert found["compared"] == ["n1", "n2", "n3"]


async def test_three_nodes_snapshot_made_by_a_standby_and_restored_to_a_file(platform: Platform) -> None:
    """A snapshot now, and the state at it, and a later one, in files."""
    active = await platform.running.settled()
    await platform.rows_confirmed()
    name = (await platform.json("snapshot", "create", "wiki"))["name"]
    shown = (await platform.json("snapshot", "list", "wiki"))["snapshots"]
    made = next(one for one in shown if one["name"] == name)
    assert made["node"] != active
    assert (await platform.json("snapshot", "verify", "wiki", name))["ok"]
    later = await platform.rows_confirmed()
    await platform.call("snapshot", "restore", "wiki", name, "--to", "then.db")
    await platform.call("snapshot", "restore", "wiki", "--to", "now.db")
    then, now = platform.rows("then.db"), platform.rows("now.db")
    assert now[: len(then)] == then
    assert now[-1] >= later > then[-1]


async def test_three_nodes_restore_in_place_by_position(platform: Platform) -> None:
    """The app goes on from the state that was asked for; every node follows, and nothing is set aside."""
    await platform.running.settled()
    await platform.rows_confirmed()
    await platform.json("snapshot", "create", "wiki")
    position = (await platform.node("n1"))["position"]["sequence"]
    await platform.rows_confirmed()
    before = platform.running.nodes.actives("wiki")[0]
    done = await platform.json(
        "snapshot", "restore", "wiki", "--position", str(position), "--in-place", "--yes"
    )
    assert done["node"] != before
    await platform.call("snapshot", "restore", "wiki", "--position", str(position), "--to", "then.db")
    await platform.call("snapshot", "restore", "wiki", "--to", "now.db")
    then, now = platform.rows("then.db"), platform.rows("now.db")
    assert now[: len(then)] == then
    await platform.running.settled()
    assert (await platform.json("db", "diverged", "wiki"))["files"] == []
    assert (await platform.json("db", "verify", "wiki"))["compared"] == ["n1", "n2", "n3"]


async def test_three_nodes_sigkill_what_the_dead_one_had_beyond_the_log_is_listed(platform: Platform) -> None:
    """If a node comes back with what the log lacks, it is listed, and its rows are shown; else nothing is."""
    await platform.running.settled()
    await platform.rows_confirmed()
    active = platform.running.nodes.actives("wiki")[0]
    platform.running.nodes[active].kill()
    await platform.running.nodes.wait_for_active("wiki", other_than=active)
    commit_late(platform.folder.parent / active / "wiki.db")
    platform.running.nodes[active].start()

    async def listed() -> Any:
        return (await platform.json("db", "diverged", "wiki"))["files"]

    async def follows() -> bool:
        return (await platform.node(active))["role"] == "following"

    await until(listed)
    assert [(file["node"], file["transactions"] >= 1) for file in await listed()] == [(active, True)]
    await until(follows)
    shown = await platform.json("db", "diverged", "wiki", "--diff")
    [table] = [t for t in shown["differences"][0]["tables"] if t["table"] == "entries"]
    assert any(row[table["columns"].index("number")] == "1000000" for row in table["diverged_rows"])

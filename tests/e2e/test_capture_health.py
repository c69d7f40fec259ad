"""A capture that cannot write its files: everybody who looks is told, and what waits in the WAL has a limit.

The folder of the files is made immutable (chattr), which binds root, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.e2e.cli import Cli
from tests.e2e.test_capture import Bench
from tests.e2e.test_database import audited, database_stage
from tests.waiting import until

from phalanx.data import syncing
from phalanx.data.capture_health import GRACE_SECONDS
from phalanx.testing.nats import NatsServer

MIB = 1 << 20


@contextmanager
def immutable(folder: Path) -> Iterator[None]:
    """Nobody can make a file in *folder*, or remove one."""
    if subprocess.run(("chattr", "+i", folder), capture_output=True, check=False).returncode:
        pytest.skip("this user or file system has no immutable folders")
    try:
        yield
    finally:
        subprocess.run(("chattr", "-i", folder), check=True)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A database, its capture, and their end."""
    made = Bench(tmp_path)
    yield made
    for one in made.captures:
        with contextlib.suppress(asyncio.CancelledError):
            await made.stop(one, 0.0)
    made.close()


async def test_capture_that_is_refused_says_since_when_and_how_much_waits_until_it_works_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a short grace, however often Litestream is started; and all of it is captured in the end."""
    monkeypatch.setattr(syncing, "FAILING_SECONDS", 3 * GRACE_SECONDS)
    monkeypatch.setattr(syncing, "FAILING_AT_FIRST_SECONDS", 0.5)
    db = bench.connect()
    capture = bench.capture()
    await capture.start()
    await capture.sync(5)
    assert capture.uncaptured_bytes == 0
    with immutable(bench.folder / "capture" / "ltx" / "0"):
        db.execute("INSERT INTO t (x) VALUES (?)", (bytes(50_000),))
        await until(lambda: capture.trouble, 3 * GRACE_SECONDS)
        assert capture.trouble.startswith("since 20")
        assert "not permitted" in capture.trouble
        assert 50_000 < capture.uncaptured_bytes < 90_000
        since = capture.trouble.partition(": ")[0]
        await until(lambda: capture.restarts > 1)
        assert capture.trouble.partition(": ")[0] == since
        assert capture.uncaptured_bytes > 50_000
    await until(lambda: not capture.trouble)
    await capture.sync(5)
    assert capture.uncaptured_bytes == 0


async def test_litestream_that_hangs_is_said_before_it_is_ended(bench: Bench) -> None:
    """While a sync gets nowhere, nothing is captured."""
    db = bench.connect()
    capture = bench.capture(stall_seconds=60.0)
    await capture.start()
    await capture.sync(5)
    assert capture.pid is not None
    os.kill(capture.pid, signal.SIGSTOP)
    db.execute("INSERT INTO t (x) VALUES (?)", (bytes(50_000),))
    await until(lambda: "a sync gets nowhere" in capture.trouble, 10)
    os.kill(capture.pid, signal.SIGCONT)
    await until(lambda: not capture.trouble)
    assert capture.uncaptured_bytes == 0


async def test_active_node_that_cannot_capture_is_seen_everywhere_and_ends_its_section_at_the_limit(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What waits in the WAL counts as what was captured does: the node is not alone with it for ever."""
    options = {"spool_limit": "2 MiB", "sync": "server"}
    with database_stage(
        tmp_path, nats_server, count=2, commit_seconds=0.1, sync_every=0, database_options=options
    ) as running:
        active = await running.settled()
        await running.wait_for("committed", 0.0, node=active)
        node, live = running.nodes[active], tmp_path / active / "wiki.db"
        with immutable(live.parent / ".wiki.db-phalanx" / "capture" / "ltx" / "0"):
            await running.nodes.wait_until(
                lambda: "is not captured since" in str(node.status()), 20, "it is not reported"
            )
            await _is_seen(Cli(nats_server.url(), tmp_path, "test"), active)
            lines = node.get("/metrics")[1].decode().splitlines()
            ok = [line for line in lines if line.startswith("phalanx_database_ok{")]
            assert [line[-2:] for line in ok] == [" 0"]
            with contextlib.closing(sqlite3.connect(live, timeout=20)) as database:
                database.execute("CREATE TABLE large (x)")
                database.execute("INSERT INTO large VALUES (randomblob(3000000))")
                database.commit()
            said = (await audited(nats_server, "spool-full"))[0]
            assert said.node == active
            assert "is not captured since" in said.reason
        running.check()


async def _is_seen(cli: Cli, active: str) -> None:
    status = await cli.json("status")
    problems = next(node["problems"] for node in status["nodes"] if node["node"] == active)
    assert any("is not captured since" in problem for problem in problems)
    view = (await cli.json("db", "status", "wiki"))["databases"][0]
    shown = next(node for node in view["nodes"] if node["node"] == active)
    assert "is not captured since" in shown["reason"]
    assert 0 < shown["spool_bytes"] < 2 * MIB
    found, _ = await cli.call("doctor")
    assert "is not captured since" in found

"""An app's database survives its node: replicas follow, failovers promote (G3, G8)."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import Stage, since_now, stage


@contextmanager
def database_stage(tmp_path: Path, nats: NatsServer, **settings: Any) -> Generator[Stage]:
    """Nodes whose app commits rows to a database, each in a folder of its own."""
    settings = {"database": str(tmp_path / "{node}" / "wiki.db"), "tick_seconds": 0.01, **settings}
    with stage(tmp_path, nats, **settings) as running:
        yield running


def rows(path: Path) -> list[tuple[int, int, str]]:
    """Everything in the database at *path*."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT number, epoch, node FROM entries ORDER BY number").fetchall()
    finally:
        connection.close()


async def test_three_nodes_sigkill_of_the_active_one_the_next_has_every_confirmed_row_G3(
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

"""The log or the object store of an app's database is deleted while all run: it is said, and where it matters
the section ends."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cli import CLI, Cli
from tests.e2e.test_database import audited, database_stage
from tests.e2e.wal import connected

from phalanx.bus.provision import create_stream, objects_config
from phalanx.names import Names
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import Stage, since_now

NAMES = Names("test")
LOG, OBJECTS = NAMES.wal_stream("wiki"), NAMES.object_stream(NAMES.snapshots_bucket("wiki"))


async def delete(nats: NatsServer, stream: str) -> None:
    async with connected(nats.url(0)) as bus:
        await bus.api(f"STREAM.DELETE.{stream}", {})


async def said(nats: NatsServer, folder: Path, *words: str) -> tuple[int | None, str]:
    """The exit code of a command, and all that it said."""
    cli = Cli(nats.url(), folder, "test")
    process = await asyncio.create_subprocess_exec(
        *CLI,
        *words,
        env=cli.environment,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return process.returncode, " ".join(output.decode().split())


def app_of(running: Stage, node: str) -> dict[str, Any]:
    status: dict[str, Any] = running.nodes[node].status()
    return next(app for app in status["apps"] if app["name"] == "wiki")


def is_held_back(running: Stage, node: str) -> bool:
    """Whether the node is no candidate, and says that it is for want of the log."""
    app = app_of(running, node)
    return app["role"] == "ineligible" and LOG in app["reason"]


@pytest.mark.parametrize("stream", [LOG, OBJECTS])
async def test_commands_say_what_is_gone_and_the_remedy(
    tmp_path: Path, nats_server: NatsServer, stream: str
) -> None:
    """Nodes, the audit log and each command name the stream; none says that there is no database."""
    with database_stage(tmp_path, nats_server, count=2, sync_every=0, commit_seconds=3600) as running:
        await running.settled()
        await delete(nats_server, stream)
        for words in (
            ("db", "status", "wiki"),
            ("snapshot", "list", "wiki"),
            ("snapshot", "create", "wiki"),
            ("snapshot", "restore", "wiki", "--to", str(tmp_path / "restored.db")),
            ("doctor",),
        ):
            code, output = await said(nats_server, tmp_path, *words)
            assert (code, stream in output, "docs/operations.md" in output) == (1, True, True), output
        entries = await audited(nats_server, "stream-vanished")
        assert stream in entries[0].reason


async def test_log_is_deleted_the_section_ends_at_its_next_commit_and_nobody_is_a_candidate(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Within some seconds, with the reason."""
    with database_stage(tmp_path, nats_server, count=2, sync_every=0, commit_seconds=0.1) as running:
        active = await running.settled()
        other = "n1" if active == "n2" else "n2"
        began = since_now()
        await delete(nats_server, LOG)
        await running.nodes.wait_until(
            lambda: app_of(running, active)["role"] == "ineligible", 15, "it is active still"
        )
        assert since_now() - began < 15
        refused = await audited(nats_server, "log-refused")
        assert LOG in refused[0].reason
        await running.nodes.wait_until(
            lambda: is_held_back(running, other), 20, "the standby does not say why"
        )
        await running.nodes.wait_until(lambda: is_held_back(running, active), 20, "the node does not say why")


async def test_object_store_is_deleted_small_records_go_on_and_a_large_one_waits(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What needs no object is confirmed as before; what does waits, is told of, and goes on later."""
    with database_stage(tmp_path, nats_server, count=2, sync_every=1, commit_seconds=0.1) as running:
        active = await running.settled()
        await delete(nats_server, OBJECTS)
        since = since_now()
        await running.wait_for("confirmed", since)
        await running.nodes.wait_until(
            lambda: any(OBJECTS in problem for problem in running.nodes[active].status()["problems"]),
            20,
            "nobody says so",
        )
        await running.wait_for("confirmed", since_now())
        with closing(sqlite3.connect(tmp_path / active / "wiki.db", timeout=10)) as database:
            database.execute("CREATE TABLE large AS SELECT randomblob(3000000) AS content")
            database.commit()
        await running.nodes.wait_until(
            lambda: OBJECTS in app_of(running, active)["database"]["problem"], 20, "nothing waits"
        )
        async with connected(nats_server.url(0)) as bus:
            await create_stream(bus, objects_config(NAMES, "wiki", replicas=1))
        await running.wait_for("confirmed", since_now())
        assert app_of(running, active)["role"] == "active"
        running.check()

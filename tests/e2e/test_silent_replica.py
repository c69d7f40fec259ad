"""A replica process that hangs: its node notices, is no candidate meanwhile, and starts another one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.e2e.origin import Origin
from tests.e2e.test_database import audited, database_stage
from tests.e2e.wal import connected, make_log

from phalanx import system
from phalanx.data import replica_client
from phalanx.data.entries import Draft, SealKind
from phalanx.data.reign import what_is_missing
from phalanx.data.replica_client import ReplicaProcess
from phalanx.errors import DatabaseError
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess
from phalanx.testing.stage import since_now
from phalanx.types import Position

exits: list[str] = []


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[ReplicaProcess]:
    """A running one, with an empty folder; why it ended is in ``exits``."""
    exits.clear()
    made = ReplicaProcess(tmp_path / "folder", exits.append)
    await made.start()
    yield made
    await made.close()


async def looking(process: ReplicaProcess, condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """What the tender does, but more often, until it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            if process.is_running:
                process.look()
            await asyncio.sleep(0.01)


def process_of(node: NodeProcess) -> int:
    """The process of the node's replica."""
    for child in Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split():
        if b"phalanx.data.replica_process" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return 0


async def test_process_of_which_nothing_is_asked_hangs_and_is_noticed_and_killed(
    process: ReplicaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First it is not relied on, then it is replaced."""
    monkeypatch.setattr(replica_client, "BRIEF_SECONDS", 1.0)
    process.look()
    await process.state()
    assert not process.is_silent
    os.kill(process.pid, signal.SIGSTOP)
    await looking(process, lambda: process.is_silent)
    assert not exits
    await looking(process, lambda: bool(exits))
    assert exits == ["the replica process gave no answer to state for 1 s"]
    assert not process.is_running
    await process.start()
    assert not process.is_silent


async def test_process_that_is_busy_for_long_is_let_alone(
    process: ReplicaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer begins a new time, and what may take long is given it."""
    monkeypatch.setattr(replica_client, "BRIEF_SECONDS", 0.2)
    os.kill(process.pid, signal.SIGSTOP)
    syncing = asyncio.create_task(process.sync())
    await asyncio.sleep(0)
    began = system.now()
    await looking(process, lambda: system.now() - began > 0.6)
    os.kill(process.pid, signal.SIGCONT)
    assert await syncing == Position()
    assert not exits


async def test_looks_do_not_keep_the_wal_from_its_file(process: ReplicaProcess, tmp_path: Path) -> None:
    """A process that is only looked at is at rest."""
    origin = Origin(tmp_path)
    await process.apply(1, 1, origin.round().data)
    await process.apply(2, 2, origin.round().data)
    assert process.path.read_bytes() != origin.images[2]
    await looking(process, lambda: process.path.read_bytes() == origin.images[2])
    origin.close()


async def test_node_in_a_hurry_does_not_wait_for_a_process_that_hangs(process: ReplicaProcess) -> None:
    """Not for the deadline of the call: another node may be better off."""
    os.kill(process.pid, signal.SIGSTOP)
    began = system.now()
    with pytest.raises(DatabaseError, match="no answer to state for 2 s"):
        await process.hurry(process.state())
    assert system.now() - began < replica_client.SECONDS / 2
    await process.start()
    assert await process.hurry(process.skip(1)) == Position(1, 0)


async def test_three_nodes_sigkill_of_the_active_one_and_the_preferred_one_s_replica_hangs(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """It steps back at once, the third one leads, and the audit log names the node whose commits may lack."""
    with database_stage(tmp_path, nats_server) as running:
        active = await running.settled()
        await running.wait_for("confirmed", 0.0)
        hung, healthy = sorted({"n1", "n2", "n3"} - {active})
        os.kill(process_of(running.nodes[hung]), signal.SIGSTOP)
        since = since_now()
        running.nodes[active].kill()
        event = await running.next_active(since, timeout=8)
        assert event.node == healthy
        promoted = []
        async with asyncio.timeout(20):
            while not promoted:
                entries = await audited(nats_server, "database-promoted")
                promoted = [e for e in entries if e.node == healthy]
        assert promoted[-1].details["missing"] == f"unknown until {active} returns"
        await running.nodes.wait_until(
            lambda: running.nodes[hung].is_standby(running.app), 20, "it is no standby again"
        )
        running.check()


async def test_two_nodes_replica_of_an_idle_app_hangs(tmp_path: Path, nats_server: NatsServer) -> None:
    """The node is no candidate until another process has taken its place."""
    with database_stage(tmp_path, nats_server, count=2, commit_seconds=1000.0, sync_every=0) as running:
        active = await running.settled()
        standby = running.nodes["n1" if active == "n2" else "n2"]
        pid = process_of(standby)
        os.kill(pid, signal.SIGSTOP)
        await running.nodes.wait_until(
            lambda: "its replica process does not answer" in str(standby.status()), 8, "it is not noticed"
        )
        assert not standby.is_standby(running.app)
        await running.nodes.wait_until(lambda: standby.is_standby(running.app), 30, "it is no standby again")
        assert process_of(standby) != pid
        entries = await audited(nats_server, "replica-process-exited")
        assert "the replica process gave no answer" in entries[-1].reason


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SealKind.OPEN, "unknown until n1 returns (or n2, n3, which has shipped nothing)"),
        (SealKind.CLOSE, "unknown until n3 returns (or n2, which has shipped nothing)"),
    ],
)
async def test_nodes_that_have_only_sealed_after_one_that_wrote(
    nats_server: NatsServer, tmp_path: Path, kind: SealKind, expected: str
) -> None:
    """Who wrote last is named first: it is likely to have what is missing, unless it closed the log."""
    closes = kind is SealKind.CLOSE
    async with connected(nats_server.url()) as bus:
        log = await make_log(bus)
        await log.seal(3, "n9", SealKind.OPEN)
        end = (await log.seal(5, "n1", SealKind.OPEN)).sequence
        file = tmp_path / "1.ltx"
        origin = Origin(tmp_path)
        file.write_bytes(origin.record().data)
        origin.close()
        await log.append(end, Draft(5, 1, file, file.stat().st_size))
        assert await what_is_missing(log, await log.last(), "n4") == "unknown until n1 returns"
        if closes:
            await log.seal(5, "n1", SealKind.CLOSE)
            assert await what_is_missing(log, await log.last(), "n4") == "nothing"
        await log.seal(7, "n2", SealKind.OPEN)
        await log.seal(8, "n3", SealKind.OPEN)
        assert await what_is_missing(log, await log.last(), "n4") == expected
        rest = await what_is_missing(log, await log.last(), "n3")
        assert (
            rest == "unknown until " + ("n1 returns (or n2, which has shipped nothing)", "n2 returns")[closes]
        )
        again = await what_is_missing(log, await log.last(), "n1")
        assert again.startswith("unknown until n2, n3 returns" if not closes else "unknown until n3 returns")


async def test_node_that_follows_on_itself_has_set_aside_what_is_missing(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """It does not wait for its own return."""
    async with connected(nats_server.url()) as bus:
        log = await make_log(bus)
        await log.seal(3, "n1", SealKind.OPEN)
        assert "itself has set aside" in await what_is_missing(log, await log.last(), "n1")
        assert await what_is_missing(log, await log.last(), "n2") == "unknown until n1 returns"

"""The replica process: asked by its node, killed at any moment, started again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.e2e.origin import LoopingReader, Origin, check_equal
from tests.waiting import until

from phalanx import system
from phalanx.data import replica_client as client_module
from phalanx.data.replica import Replica
from phalanx.data.replica_client import ReplicaProcess
from phalanx.errors import DatabaseError, LtxError
from phalanx.types import Position


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    """A database with pages of 4 KiB."""
    made = Origin(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[ReplicaProcess]:
    """A running one, with an empty folder; why it ended is in ``exits``."""
    made = ReplicaProcess(tmp_path / "folder", exits.append, checkpoint_pages=60)
    exits.clear()
    await made.start()
    yield made
    await made.close()


exits: list[str] = []


async def test_every_operation_is_answered(origin: Origin, process: ReplicaProcess, tmp_path: Path) -> None:
    """From an empty replica over records and a snapshot to a live database and back."""
    assert (await process.state()).state == "empty"
    await process.apply(1, 1, origin.record().data)
    entry = origin.round()
    file = tmp_path / "record.ltx"
    file.write_bytes(entry.data)
    assert await process.apply(2, 2, file) == Position(2, 2)
    assert await process.skip(3) == Position(3, 2)
    assert await process.sync() == process.position == Position(3, 2)
    assert await process.checkpoint()
    assert process.path.read_bytes() == origin.images[2]
    assert await process.fingerprint() == origin.fingerprint(2)
    assert await process.verify() == []
    assert await process.snapshot(tmp_path / "folder" / "image") == Position(3, 2)
    assert await process.install(tmp_path / "folder" / "image", 8, 2) == Position(8, 2)
    live = tmp_path / "live.db"
    promoted = await process.promote(live, 11, 9)
    assert (promoted.txid, promoted.exists) == (2, True)
    state = await process.state()
    assert (state.role, state.epoch, state.sealed) == ("live", 11, 9)
    await process.resume(12, 10)
    await process.vouch(is_whole=True)
    assert (await process.state()).same_boot
    assert (await process.live_wal_info(live, 0, 0, 0)).commits == 1
    assert await process.demote(live, 10, 2) == Position(10, 2)
    await process.release_old()
    assert await process.fingerprint() == origin.fingerprint(2)
    await process.promote(live, 13)
    aside = await process.set_aside(live, tmp_path / "aside")
    assert aside.size_bytes == len(origin.images[2])
    assert (await process.state()).state == "empty"
    await process.reset()
    assert process.position == Position(0, 0)
    assert not exits


async def test_errors_of_the_process_are_raised_as_they_were(
    origin: Origin, process: ReplicaProcess, tmp_path: Path
) -> None:
    """With their class and remedy; the process goes on."""
    with pytest.raises(LtxError, match=r"^LTX file: .*few"):
        await process.apply(1, 1, b"junk")
    with pytest.raises(DatabaseError, match="no live database"):
        await process.demote(tmp_path / "x", 1, 1)
    with pytest.raises(DatabaseError, match="No such file"):
        await process.install(tmp_path / "none", 1, 1)
    await process.apply(1, 1, origin.record().data)
    (tmp_path / "live.db").write_bytes(b"")
    with pytest.raises(DatabaseError, match="exists already; move it away"):
        await process.promote(tmp_path / "live.db", 2)
    other = ReplicaProcess(tmp_path / "folder", exits.append)
    with pytest.raises(DatabaseError, match="in use by another process"):
        await other.start()
    assert not other.is_running
    assert await process.skip(2) == Position(2, 1)
    assert not exits


async def test_integrity_check_finds_a_damaged_page(origin: Origin, process: ReplicaProcess) -> None:
    """Without disturbing the replica."""
    await process.apply(1, 1, origin.round(50_000).data)
    await process.checkpoint()
    with process.path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"x" * 4096)
    assert await process.verify()
    await process.apply(2, 2, origin.round().data)


async def test_kill_is_reported_and_a_new_process_goes_on(origin: Origin, process: ReplicaProcess) -> None:
    """What was asked meanwhile fails; nothing is asked of a process that is not there."""
    await process.apply(1, 1, origin.record().data)
    os.kill(process.pid, signal.SIGSTOP)
    asked = [asyncio.create_task(process.state()) for _ in range(3)]
    await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    for task in asked:
        with pytest.raises(DatabaseError, match="killed by SIGKILL"):
            await task
    await until(lambda: bool(exits))
    assert exits == ["the replica process killed by SIGKILL"] or "SIGKILL" in exits[0]
    with pytest.raises(DatabaseError, match="does not run"):
        await process.state()
    assert not process.is_running
    await process.start()
    assert process.position == Position(1, 1)
    await process.apply(2, 2, origin.round().data)


async def test_process_that_does_not_answer_is_killed_at_the_deadline(
    process: ReplicaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a new one can find out what was done."""
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DatabaseError, match="no answer to state"):
        await process._call("state", timeout=0.2)
    await until(lambda: bool(exits))
    assert "no answer to state" in exits[0]
    await process.start()
    await process.state()


async def test_brief_calls_behind_a_long_one_wait_for_it(
    origin: Origin, process: ReplicaProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their time begins when the process turns to them: it is not killed within a record that takes long."""
    monkeypatch.setattr(client_module, "SECONDS", 0.3)
    await process.apply(1, 1, origin.record().data)
    file = tmp_path / "record.ltx"
    file.write_bytes(origin.round().data)
    os.kill(process.pid, signal.SIGSTOP)  # it is busy with the record for longer than the others may take
    applying = asyncio.create_task(process.apply(2, 2, file))
    await asyncio.sleep(0)
    behind = [asyncio.create_task(ask) for ask in (process.state(), process.skip(3), process.release_old())]
    began = system.now()
    await until(lambda: system.now() - began > 1)
    assert process.known.position == Position(1, 1)  # for those who only want to know
    os.kill(process.pid, signal.SIGCONT)
    assert await applying == Position(2, 2)
    await asyncio.gather(*behind)
    assert process.position == Position(3, 2)
    assert not exits
    # But it is, when it does not turn to them at all.
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DatabaseError, match="no answer to state"):
        await process.state()


async def test_requests_are_answered_in_order_and_few_are_under_way(
    origin: Origin, process: ReplicaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, with cancelled ones between: the limits hold, and every one that stays is carried out."""
    monkeypatch.setattr(client_module, "MAX_REQUESTS", 5)
    monkeypatch.setattr(client_module, "MAX_BYTES", 20_000)
    entries = [origin.record()] + [origin.round(9000) for _ in range(40)]
    seen: list[int] = []

    async def apply(txid: int, data: bytes) -> None:
        position = await process.apply(txid, txid, data)
        seen.append(position.txid)

    tasks = [asyncio.create_task(apply(entry.txid, entry.data)) for entry in entries]
    bystanders = [asyncio.create_task(process.state()) for _ in range(20)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.001)
        assert len(process._requests) <= 5
        assert process._bytes <= 20_000
        if bystanders:
            bystanders.pop().cancel()
    await asyncio.gather(*tasks)
    assert seen == sorted(seen)
    assert process.position.txid == 41
    assert await process.fingerprint() == origin.fingerprint(41)
    assert process._bytes == 0


async def test_closing_ends_it_however_busy_it_is(process: ReplicaProcess) -> None:
    """Nothing is reported; twice is harmless."""
    os.kill(process.pid, signal.SIGSTOP)
    asked = asyncio.create_task(process.state())
    await asyncio.sleep(0)
    pid = process.pid
    await process.close()
    await process.close()
    with pytest.raises(DatabaseError):
        await asked
    assert not system.is_running(pid)
    assert not exits


async def test_idle_process_moves_the_wal_into_the_file(
    origin: Origin, process: ReplicaProcess, tmp_path: Path
) -> None:
    """A few seconds after the last record."""
    await process.apply(1, 1, origin.round().data)
    await process.apply(2, 2, origin.round().data)
    assert process.path.read_bytes() != origin.images[2]
    await until(lambda: process.path.read_bytes() == origin.images[2])


NODE = """
import asyncio, sys, time
from pathlib import Path
from phalanx.data.replica_client import ReplicaProcess
async def main():
    process = ReplicaProcess(Path(sys.argv[1]), print)
    await process.start()
    print(process.pid, flush=True)
    time.sleep(60)
asyncio.run(main())
"""


def test_process_dies_with_its_node(tmp_path: Path) -> None:
    """However that ends."""
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, str(tmp_path / "folder")], stdout=subprocess.PIPE, text=True
    )
    assert node.stdout is not None
    pid = int(node.stdout.readline())
    descriptor = system.open_pidfd(pid)
    node.kill()
    node.communicate()
    if descriptor is not None:
        import select

        assert select.select([descriptor], [], [], 5)[0]
        os.close(descriptor)
    assert not system.is_running(pid)


@pytest.mark.parametrize("seed", range(3))
async def test_g8_kill_at_a_random_moment_while_others_read(tmp_path: Path, seed: int) -> None:
    """SIGKILL while records are applied: the position is exact, the content is that of the origin, the reader
    never sees half of a record or an older state."""
    chance = random.Random(seed)
    origin = Origin(tmp_path)
    process = ReplicaProcess(tmp_path / "folder", exits.append, checkpoint_pages=60)
    await process.start()
    entries = [origin.record()]
    entries += [origin.round(chance.choice((500, 9000, 60_000))) for _ in range(60)]
    await process.apply(1, 1, entries[0].data)
    reader: LoopingReader | None = LoopingReader(process.path)
    kills = 0
    while kills < 15:
        if process.position.txid > len(entries) - 10:
            entries += [origin.round(chance.choice((500, 9000, 60_000))) for _ in range(30)]
        begun = process.position.txid
        work = asyncio.create_task(feed(process, entries[begun:]))
        await asyncio.sleep(chance.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = await work
        # The kernel closes its end of the channel before the file that locks the folder.
        await until(lambda: not system.is_running(process.pid))
        kills += 1
        if reader is not None and chance.random() < 0.3:
            # Sometimes nobody keeps the index alive: then SQLite's recovery decides how far it is.
            reader.end()
            reader = None
        replica = Replica.open(tmp_path / "folder")
        assert replica.position.txid in (acknowledged, acknowledged + 1)
        assert replica.position.sequence == replica.position.txid
        check_equal(replica, origin)
        replica.close()
        await process.start()
        if reader is None:
            reader = LoopingReader(process.path)
    if reader is not None:
        reader.end()
    await process.close()
    origin.close()


async def feed(process: ReplicaProcess, entries: list) -> int:
    """Apply until it fails; the last transaction that was acknowledged."""
    applied = process.position.txid
    try:
        for entry in entries:
            applied = (await process.apply(entry.txid, entry.txid, entry.data)).txid
    except DatabaseError:
        pass
    return applied

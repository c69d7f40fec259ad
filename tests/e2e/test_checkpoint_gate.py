"""The gate that keeps programs from checkpoints in vain while a live database is captured."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.e2e.test_capture import Bench

from phalanx.data import checkpoint_gate, checkpoints
from phalanx.data.checkpoint_gate import GATE_SECONDS
from phalanx.data.checkpoints import Checkpoints, checkpoint_pages
from phalanx.data.litestream import Paths
from phalanx.data.records import WalPlace
from phalanx.data.replica_client import ReplicaProcess
from phalanx.data.replica_process import Server
from phalanx.data.wal_tail import WalTail
from phalanx.errors import DatabaseError

BUSY = (1, -1, -1)
"""What ``PRAGMA wal_checkpoint`` says when somebody has its lock."""

# A program that is killed in the middle of a commit: the second copy of the index's header is another one.
TORN = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("INSERT INTO t VALUES (1)")
index = os.open(sys.argv[1] + "-shm", os.O_RDWR)
os.pwrite(index, b"torn", 60)
os._exit(9)
"""

# Holds the write lock until its input ends.
WRITES = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
db.execute("PRAGMA wal_autocheckpoint = 0")
sys.stdin.readline()
db.execute("BEGIN IMMEDIATE")
print("writes", flush=True)
sys.stdin.readline()
"""

# Commits as fast as it can until its input ends.
FLOODS = """
import os, select, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
db.execute("PRAGMA synchronous = NORMAL")
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(100):
        db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(300),))
os._exit(0)
"""


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where the database is."""
    return tmp_path / "live.db"


@pytest.fixture
def db(live: Path) -> Iterator[sqlite3.Connection]:
    """A program's connection, with something in the WAL."""
    made = sqlite3.connect(live, isolation_level=None, timeout=0)
    made.execute("PRAGMA journal_mode = WAL")
    made.execute("PRAGMA synchronous = OFF")
    made.execute("CREATE TABLE t (x)")
    yield made
    made.close()


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[ReplicaProcess]:
    """The process that has the gate."""
    made = ReplicaProcess(tmp_path / "folder", lambda _: None)
    await made.start()
    yield made
    await made.close()


def changed(path: Path) -> int:
    """When, in nanoseconds."""
    return path.stat().st_mtime_ns


def checkpoint(db: sqlite3.Connection, mode: str = "PASSIVE") -> tuple[int, int, int]:
    return tuple(db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone())


async def opens(db: sqlite3.Connection, seconds: float) -> None:
    """Wait until a checkpoint is possible."""
    async with asyncio.timeout(seconds):
        while checkpoint(db) == BUSY:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- the lock


@pytest.mark.parametrize("mode", ["PASSIVE", "FULL", "TRUNCATE"])
async def test_closed_gate_refuses_checkpoints_at_once(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess, mode: str
) -> None:
    """Whichever kind, and however long the program would wait; opened, it lets them through."""
    db.execute("PRAGMA busy_timeout = 20000")
    assert await replica.gate(live, closed=True)
    began = time.monotonic()
    assert checkpoint(db, mode) == BUSY
    assert time.monotonic() - began < 10
    assert not await replica.gate(live, closed=False)
    assert checkpoint(db, mode)[0] == 0


async def test_commits_beyond_the_automatic_checkpoint_succeed_behind_a_closed_gate(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """A program with automatic checkpoints from the first page on notices nothing, nor does VACUUM."""
    db.execute("PRAGMA wal_autocheckpoint = 1")
    assert await replica.gate(live, closed=True)
    before = changed(live)
    for number in range(100):
        db.execute("INSERT INTO t VALUES (?)", (number,))
    db.execute("VACUUM")
    assert changed(live) == before
    await replica.gate(live, closed=False)
    db.execute("INSERT INTO t VALUES (100)")
    assert changed(live) > before
    assert db.execute("SELECT count(*) FROM t").fetchone() == (101,)


async def test_gate_opens_by_itself_unless_it_is_asked_for_again(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """A node that hangs does not keep the database from checkpoints."""
    began = time.monotonic()
    while time.monotonic() - began < 1.5 * GATE_SECONDS:
        assert await replica.gate(live, closed=True)
        assert checkpoint(db) == BUSY
        await asyncio.sleep(GATE_SECONDS / 4)
    await opens(db, 2 * GATE_SECONDS)


async def test_signs_of_life_do_not_keep_the_gate_closed(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """Nor do they open it."""
    assert await replica.gate(live, closed=True)
    await replica.state()
    assert checkpoint(db) == BUSY
    async with asyncio.timeout(10 * GATE_SECONDS):
        while checkpoint(db) == BUSY:
            await replica.state()


def test_gate_opens_although_a_request_waits_at_every_moment(db: sqlite3.Connection, live: Path) -> None:
    """Time passes for the gate as well while the process always has something to do."""
    node, channel = socket.socketpair()
    with node, channel:
        server = Server(channel)
        assert server._gate.close(live)
        deadline = time.monotonic() + 20 * GATE_SECONDS
        while server._gate.look_seconds is not None:
            assert time.monotonic() < deadline
            node.send(b"x")
            assert server._next() == b"x"


async def test_killed_replica_process_leaves_the_gate_open(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """The kernel drops the lock."""
    assert await replica.gate(live, closed=True)
    os.kill(replica.pid, 9)
    await opens(db, 10 * GATE_SECONDS)
    with pytest.raises(DatabaseError):
        await replica.gate(live, closed=True)


async def test_any_other_operation_opens_the_gate(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """It may need the lock itself: setting the database aside checkpoints it."""
    await replica.promote(live, 1)
    assert await replica.gate(live, closed=True)
    db.execute("INSERT INTO t VALUES (1)")
    aside = await replica.set_aside(live, live.with_name("aside.db"))
    assert sqlite3.connect(aside.path).execute("SELECT count(*) FROM t").fetchone() == (1,)


async def test_gate_follows_an_index_that_was_made_anew(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """The last connection has removed it, and the next one made another: that one is locked."""
    assert await replica.gate(live, closed=True)
    db.close()  # empties the WAL: with the file to itself it needs no lock of the index
    assert not live.with_name("live.db-wal").exists()
    assert not await replica.gate(live, closed=True)
    again = sqlite3.connect(live, isolation_level=None, timeout=0)
    again.execute("INSERT INTO t VALUES (1)")
    assert await replica.gate(live, closed=True)
    assert checkpoint(again) == BUSY
    again.close()


async def test_index_that_a_killed_program_has_torn_is_recovered(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """Recovery needs the lock: the next one to read waits until the gate has opened, and then has all."""
    began = time.monotonic()
    assert await replica.gate(live, closed=True)
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", TORN, str(live))
    assert await killed.wait() == 9
    found = await asyncio.to_thread(
        lambda: sqlite3.connect(live, timeout=20).execute("SELECT count(*) FROM t").fetchone()
    )
    assert found == (1,)
    assert time.monotonic() - began > 0.9 * GATE_SECONDS, "it has read what the killed one had torn"


async def test_checkpoint_under_way_is_not_waited_for(
    db: sqlite3.Connection, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate stays open then; it does not hold the replica process up."""
    other, mine = checkpoint_gate.CheckpointGate(), checkpoint_gate.CheckpointGate()
    assert other.close(live)
    began = time.monotonic()
    assert not mine.close(live)
    assert time.monotonic() - began < 5
    other.open()
    assert mine.close(live)
    mine.open()


async def test_process_that_may_pass_opens_the_gate_once_it_writes(
    db: sqlite3.Connection, live: Path, replica: ReplicaProcess
) -> None:
    """Not before: no program comes between. Others who write do not open it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITES, str(live), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await replica.gate(live, closed=True, passing=process.pid)
        for number in range(50):
            db.execute("INSERT INTO t VALUES (?)", (number,))
            assert checkpoint(db) == BUSY
        assert await replica.gate(live, closed=True, passing=process.pid)  # from here on it is timed
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"writes\n"
        await opens(db, 0.8 * GATE_SECONDS)
    finally:
        process.kill()
        await process.wait()


# --- with Litestream


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A database with what captures it."""
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        await made.dispose()


async def test_litestream_checkpoints_through_the_gate_under_a_flood(
    bench: Bench, replica: ReplicaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The WAL begins anew, again and again, and what was captured is the database."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 6 << 20)
    asked: list[tuple[bool, int]] = []

    async def gate(closed: bool, passing: int) -> bool:
        asked.append((closed, passing))
        return await replica.gate(bench.live, closed, passing)

    bench.connect()
    one = bench.capture(gate=gate)
    await one.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FLOODS, str(bench.live), stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    wal, seen = bench.live.with_name("a.db-wal"), set[bytes]()
    try:
        async with asyncio.timeout(30):
            while len(seen) < 4:
                with wal.open("rb") as file:
                    seen.add(file.read(24)[16:])
                await asyncio.sleep(0.01)
    finally:
        process.stdin.close()
        await process.wait()
    assert (True, 0) in asked
    assert (True, one.pid) in asked
    await bench.stop(one)
    assert asked[-1] == (False, 0)
    assert "gap" not in bench.kinds()
    bench.assert_rebuilds(one.files(0))


# --- when it is closed


class Asked:
    """A gate that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, int]] = []

    async def __call__(self, closed: bool, passing: int) -> bool:
        self.asked.append((closed, passing))
        return closed


def place(frames: int, salt: int = 1) -> WalPlace:
    return WalPlace(salt, 0, 32 + frames * (4096 + 24), 4096)


@pytest.fixture
def asked() -> Asked:
    """What the gate is asked for."""
    return Asked()


@pytest.fixture
def control(live: Path, db: sqlite3.Connection, asked: Asked) -> Checkpoints:
    """What asks it."""
    paths = Paths(live, live.parent)
    return Checkpoints(paths, WalTail(paths.wal), asked)


async def test_short_wal_of_a_calm_program_asks_for_nothing(control: Checkpoints, asked: Asked) -> None:
    """Below SQLite's own 1000 frames nobody tries a checkpoint."""
    for frames in range(10, 800, 10):
        await control.before_sync(place(frames - 10), 7, hurried=False)
        await control.after_sync(place(frames - 10), place(frames))
    assert asked.asked == []


async def test_long_wal_closes_the_gate_and_keeps_it_closed(control: Checkpoints, asked: Asked) -> None:
    """Not with every sync: it lasts for a while."""
    for frames in range(1000, 1100, 10):
        await control.before_sync(place(frames - 10), 7, hurried=False)
        await control.after_sync(place(frames - 10), place(frames))
    assert asked.asked == [(True, 0)]
    await asyncio.sleep(GATE_SECONDS / 2)
    await control.after_sync(place(1090), place(1100))
    assert asked.asked == [(True, 0)] * 2


async def test_busy_program_lets_litestream_pass_in_every_sync(control: Checkpoints, asked: Asked) -> None:
    """Also in the one after the WAL has begun anew, and is short."""
    await control.after_sync(place(10), place(500))
    await control.before_sync(place(500), 7, hurried=False)
    await control.after_sync(place(500), place(1, salt=2))
    assert asked.asked == [(True, 0), (True, 7), (True, 0)]


async def test_wal_that_litestream_will_checkpoint_opens_the_gate(
    control: Checkpoints, asked: Asked, db: sqlite3.Connection, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up in the WAL itself: the program may have written on since the last sync."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 0)
    assert checkpoint_pages(4096) == checkpoints.LEAST_PAGES
    db.execute("PRAGMA wal_autocheckpoint = 0")
    header = live.with_name("live.db-wal").read_bytes()[16:24]
    salts = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
    end = WalPlace(*salts, place(910).offset, 4096)
    await control.after_sync(WalPlace(*salts, place(900).offset, 4096), end)
    await control.before_sync(end, 7, hurried=False)
    assert asked.asked == [(True, 0)]
    for number in range(1000):
        db.execute("INSERT INTO t VALUES (?)", (number,))
    await control.after_sync(end, end)  # all that may have taken longer than the gate stays closed
    await control.before_sync(end, 7, hurried=False)
    assert asked.asked[-1] == (False, 0)


async def test_file_that_was_long_not_checkpointed_opens_the_gate(
    control: Checkpoints, asked: Asked, live: Path
) -> None:
    """Litestream checkpoints such a one after a minute."""
    await control.after_sync(place(900), place(910))
    os.utime(live, (time.time() - 59, time.time() - 59))
    await control.before_sync(place(910), 7, hurried=False)
    assert asked.asked == [(True, 0), (False, 0)]


async def test_gate_that_fails_is_no_obstacle(live: Path, db: sqlite3.Connection) -> None:
    """Its process has ended, or does not answer: capture goes on, and does not wait with each sync."""
    asked = 0

    async def fails(closed: bool, passing: int) -> bool:
        nonlocal asked
        asked += 1
        raise DatabaseError("the replica process does not run")

    async def hangs(closed: bool, passing: int) -> bool:
        nonlocal asked
        asked += 1
        return await asyncio.get_running_loop().create_future()

    paths = Paths(live, live.parent)
    for gate in (fails, hangs):
        made = Checkpoints(paths, WalTail(paths.wal), gate)
        async with asyncio.timeout(5):
            for frames in range(2000, 3000, 100):
                await made.after_sync(place(frames - 100), place(frames))
                await made.before_sync(place(frames), 7, hurried=False)
            assert asked == 1
            await made.end()
            asked = 0

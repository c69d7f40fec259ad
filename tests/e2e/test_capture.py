"""Capture: every commit of a real program is in Litestream's files, whatever happens to whom."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.disks import small_disk_at
from tests.waiting import until

from phalanx import system
from phalanx.data import capture, checkpoints, ltx, wal_index
from phalanx.data.capture import Capture
from phalanx.errors import DatabaseError, SyncTimeout
from phalanx.ports import SectionContext
from phalanx.types import Resource

# A program that knows nothing of us: it commits until its input ends, some transactions a second.
WRITER = """
import os, random, select, sqlite3, sys, time
path, per_second, checkpoints = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "checkpoints"
db = sqlite3.connect(path, timeout=10, isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("PRAGMA synchronous = NORMAL")
db.execute("CREATE TABLE IF NOT EXISTS t (i INTEGER PRIMARY KEY, x BLOB)")
print("ready", flush=True)
n = 0
while not select.select([sys.stdin], [], [], 1 / per_second)[0]:
    db.execute("BEGIN IMMEDIATE")
    for _ in range(random.choice((1, 1, 1, 30))):
        db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(random.randrange(10, 3000)),))
    if random.random() < 0.1:
        db.execute("DELETE FROM t WHERE i % 7 = ?", (random.randrange(7),))
    db.execute("COMMIT")
    n += 1
    if checkpoints and random.random() < 0.05:
        db.execute("PRAGMA busy_timeout = 20")
        db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        db.execute("PRAGMA busy_timeout = 10000")
print(n, flush=True)
os._exit(0)
"""


class Writer:
    """The program, as a process."""

    def __init__(self, path: Path, per_second: float = 200, *, checkpoints: bool = False) -> None:
        how = "checkpoints" if checkpoints else "-"
        self.process = subprocess.Popen(
            (sys.executable, "-c", WRITER, str(path), str(per_second), how),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> int:
        """Let it finish; how many transactions it committed. It does not close its database."""
        out, _ = self.process.communicate("\n", timeout=30)
        return int(out)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Bench:
    """One database with what captures it."""

    def __init__(self, folder: Path) -> None:
        self.live = folder / "a.db"
        self.folder = folder / ".a.db-phalanx"
        self.folder.mkdir(mode=0o700)
        self.events: list[tuple[str, str]] = []
        self.announced: list[int] = []
        self.resources: dict[str, Resource] = {}
        self.captures: list[Capture] = []
        self.guards: list[sqlite3.Connection] = []
        self.writers: list[Writer] = []

    async def _register(self, resource: Resource) -> None:
        self.resources[resource.id] = resource

    def _unregister(self, resource_id: str) -> None:
        del self.resources[resource_id]

    def capture(self, **options: Any) -> Capture:
        section = SectionContext("p", "n1", "app", 7, self._register, self._unregister)
        made = Capture(
            self.live,
            self.folder,
            section,
            on_captured=self.announced.append,
            on_event=lambda kind, detail: self.events.append((kind, detail)),
            **options,
        )
        self.captures.append(made)
        return made

    def writer(self, per_second: float = 200, *, checkpoints: bool = False) -> Writer:
        made = Writer(self.live, per_second, checkpoints=checkpoints)
        self.writers.append(made)
        return made

    def connect(self, page_size: int = 4096) -> sqlite3.Connection:
        db = sqlite3.connect(self.live, isolation_level=None, timeout=5)
        db.execute(f"PRAGMA page_size = {page_size}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE IF NOT EXISTS t (i INTEGER PRIMARY KEY, x BLOB)")
        self.guards.append(db)
        return db

    async def stop(self, one: Capture, sync_seconds: float = 5.0) -> None:
        """Stop it, and keep its guard until the end of the test."""
        guard = await one.stop(sync_seconds)
        if guard is not None:
            self.guards.append(guard)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def level0(self) -> list[Path]:
        return sorted((self.folder / "capture" / "ltx" / "0").glob("*.ltx"))

    def close(self) -> None:
        """Everybody lets go, so that the WAL ends up in the file."""
        for writer in self.writers:
            writer.kill()
        for guard in self.guards:
            guard.close()
        self.guards.clear()
        wal_index.close_removed()

    async def dispose(self) -> None:
        for one in self.captures:
            await self.stop(one, 0)
        self.close()

    def assert_rebuilds(self, files: list[tuple[int, Path]]) -> None:
        """All files, applied in order to nothing, are the database byte for byte, once it is checkpointed."""
        txids = [txid for txid, _ in files]
        assert txids == list(range(1, len(txids) + 1))
        rebuilt = rebuild(files)
        self.close()
        assert not self.live.with_name("a.db-wal").exists(), "somebody still has the database open"
        assert rebuilt == self.live.read_bytes()


def rebuild(files: list[tuple[int, Path]]) -> bytes:
    """The database after all of *files*."""
    content = bytearray()
    for _, path in files:
        file = ltx.decode(path.read_bytes())
        size = file.header.page_size
        content = content[: file.header.commit * size].ljust(file.header.commit * size, b"\0")
        for page in file.pages:
            content[(page.number - 1) * size : page.number * size] = page.data
    return bytes(content)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        await made.dispose()


def kill(one: Capture, number: int = signal.SIGKILL) -> int:
    """Signal its Litestream. (Not os.kill(0): that is this test.)"""
    assert one.pid
    os.kill(one.pid, number)
    return one.pid


def written_bytes(pid: int | None) -> int:
    """What a process has given to write(2)."""
    return int(Path(f"/proc/{pid}/io").read_text().split("wchar: ")[1].split()[0])


def fill(path: Path, step: int) -> None:
    """Write to a file until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(step))


def is_full(path: Path) -> bool:
    return ltx.decode(path.read_bytes()).is_full


# --- what is captured


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
async def test_program_of_any_page_size_with_own_checkpoints_and_vacuum(bench: Bench, page_size: int) -> None:
    """Commits, the program's own checkpoints of every kind, a VACUUM: the files make the same database."""
    db = bench.connect(page_size)
    one = bench.capture()
    await one.start()
    for kind in ("PASSIVE", "FULL", "RESTART", "TRUNCATE"):
        for _ in range(20):
            db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(random.randrange(5000)),))
        db.execute("PRAGMA busy_timeout = 50")
        db.execute(f"PRAGMA wal_checkpoint({kind})").fetchall()
        await one.sync(5)
    db.execute("DELETE FROM t WHERE i % 2")
    db.execute("VACUUM")
    db.execute("INSERT INTO t (x) VALUES (1)")
    await bench.stop(one)
    assert bench.kinds() == ["started"]
    bench.assert_rebuilds(one.files(0))


async def test_sync_returns_a_transaction_that_holds_the_last_commit(bench: Bench) -> None:
    """A barrier that is asked for while commits and syncs go on covers the commit before it, every time."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    for i in range(50):
        db.execute("INSERT INTO t (x) VALUES (?)", (f"row {i:04}",))
        if i % 3:
            await asyncio.sleep(random.random() * 0.004)
        txid = await one.sync(5)
        content = rebuild([file for file in one.files(0) if file[0] <= txid])
        assert f"row {i:04}".encode() in content
    assert bench.announced == sorted(set(bench.announced))
    assert bench.announced[-1] == one.captured


@pytest.mark.parametrize("checkpoints", [False, True])
async def test_litestream_killed_at_random_moments_under_load(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    """Litestream is killed a dozen times while a program commits and checkpoints: nothing is missing."""
    monkeypatch.setattr(capture, "LONGEST_RESTART_SECONDS", 0.05)
    bench.connect()
    one = bench.capture()
    await one.start()
    writer = bench.writer(400, checkpoints=checkpoints)
    for _ in range(12):
        await asyncio.sleep(random.random() * 0.25)
        await until(lambda: one.pid is not None)
        before = one.restarts
        kill(one)
        await until(lambda: one.restarts > before)  # noqa: B023
    await until(lambda: one.is_running)
    commits = writer.end()
    await bench.stop(one, 10)
    assert bench.kinds().count("exited") == 12
    assert commits > 100
    bench.assert_rebuilds(one.files(0))


async def test_wal_begun_anew_behind_the_back_of_a_stopped_litestream(bench: Bench) -> None:
    """Commits that were checkpointed while nobody captured come as a full record, never as a silent gap."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    for _ in range(50):
        db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(1000),))
    await one.sync(5)
    before = one.captured
    guard = await one.stop()
    assert guard is not None
    guard.close()
    db.execute("UPDATE t SET x = 'changed' WHERE i = 3")
    db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    db.execute("INSERT INTO t (x) VALUES ('one frame only: the old ones are still behind it')")
    two = bench.capture()
    await two.start()
    await bench.stop(two)
    assert is_full(dict(two.files(0))[before + 1])
    bench.assert_rebuilds(two.files(0))


async def test_restart_of_capture_goes_on_without_a_full_record(bench: Bench) -> None:
    """A capture that follows another one on the same files goes on where that one ended; it writes little."""
    db = bench.connect()
    db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(20_000_000),))
    one = bench.capture()
    await one.start()
    await bench.stop(one)
    last, size = one.captured, dict(one.files(0))[1].stat().st_size
    assert size > 20_000_000
    two = bench.capture()
    await two.start()
    db.execute("INSERT INTO t (x) VALUES (1)")
    await two.sync(5)
    assert written_bytes(two.pid) < 1_000_000
    replica = bench.folder / "capture-replica"
    assert sum(path.stat().st_size for path in replica.rglob("*") if path.is_file()) == 0
    await bench.stop(two)
    assert two.captured > last
    bench.assert_rebuilds(two.files(0))


async def test_log_knows_more_than_the_local_files(bench: Bench) -> None:
    """Without local files up to the log's last transaction the first record is the next one, and full."""
    db = bench.connect(8192)
    db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(100_000),))
    one = bench.capture()
    assert await one.start(41) == 42
    files = one.files(0)
    assert [txid for txid, _ in files] == [42]
    assert is_full(files[0][1])
    assert bench.announced == [42]


async def test_forgotten_files_are_gone_but_the_newest(bench: Bench) -> None:
    """What was shipped is removed; the newest file stays, and Litestream goes on."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    for _ in range(5):
        db.execute("INSERT INTO t (x) VALUES (1)")
        await one.sync(5)
    last = one.captured
    one.forget(last)
    assert [txid for txid, _ in one.files(0)] == [last]
    assert len(bench.level0()) == 1
    kill(one)
    db.execute("INSERT INTO t (x) VALUES (1)")
    await one.sync(5)
    assert [txid for txid, _ in one.files(last)] == list(range(last + 1, one.captured + 1))
    assert not is_full(one.files(last)[0][1])


async def test_long_reader_beyond_the_checkpoint_size_makes_no_endless_loop(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a reader keeps the WAL from being begun anew, Litestream's own rows get no syncs for answer."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 0)
    db = bench.connect()
    one = bench.capture()
    await one.start()
    db.execute("INSERT INTO t (x) VALUES (1)")
    reader = bench.connect()
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM t").fetchall()
    db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(6_000_000),))
    await one.sync(5)
    before = one.captured
    await asyncio.sleep(1.0)
    assert one.captured - before <= 2
    db.execute("INSERT INTO t (x) VALUES ('still captured')")
    await until(lambda: b"still captured" in rebuild(one.files(0)[-2:]) or one.captured > before + 2)
    reader.execute("COMMIT")
    await bench.stop(one)
    bench.assert_rebuilds(one.files(0))


# --- files that come, go, and are none


async def test_database_that_the_program_creates_later(bench: Bench) -> None:
    """The start does not wait for a missing file; when a program makes it, with its own page size, all of it
    is captured."""
    one = bench.capture()
    assert await one.start() == 0
    assert await one.sync(1) == 0
    bench.live.touch()  # as sqlite3_open does; the page size is decided by the first write
    db = bench.connect(16384)
    db.execute("INSERT INTO t (x) VALUES ('first')")
    await until(lambda: one.captured > 0)
    await bench.stop(one)
    assert ltx.decode_header(one.files(0)[0][1].read_bytes()).page_size == 16384
    bench.assert_rebuilds(one.files(0))


@pytest.mark.parametrize("content", [os.urandom(8192), b"some text, no database\n"])
async def test_file_that_is_no_database(bench: Bench, content: bytes) -> None:
    """An encrypted or foreign file is refused at the start, and nothing runs."""
    bench.live.write_bytes(content)
    one = bench.capture()
    with pytest.raises(DatabaseError, match=r"no SQLite database, or an encrypted one"):
        await one.start()
    assert not bench.resources
    assert one.pid is None
    assert bench.live.read_bytes() == content


@pytest.mark.parametrize("name", ["what?.db", "100%.db", "#1.db"])
async def test_path_that_litestream_would_misread(bench: Bench, name: str) -> None:
    """A path that Litestream takes for another one is refused."""
    bench.live = bench.live.with_name(name)
    with pytest.raises(DatabaseError, match="rename"):
        await bench.capture().start()


async def test_journal_mode_cannot_be_changed(bench: Bench) -> None:
    """A program's PRAGMA journal_mode = DELETE fails while the database is captured."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    db.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        db.execute("PRAGMA journal_mode = DELETE")
    db.execute("INSERT INTO t (x) VALUES (1)")
    await bench.stop(one)
    bench.assert_rebuilds(one.files(0))


async def test_program_without_wal_is_brought_to_it(bench: Bench) -> None:
    """A database with a rollback journal is captured too: Litestream sets WAL mode."""
    db = sqlite3.connect(bench.live, isolation_level=None, timeout=5)
    bench.guards.append(db)
    db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY, x BLOB)")
    one = bench.capture()
    await one.start()
    db.execute("INSERT INTO t (x) VALUES (1)")
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await bench.stop(one)
    bench.assert_rebuilds(one.files(0))


async def test_database_that_is_replaced_with_care(bench: Bench) -> None:
    """A program that removes the WAL and renames another database over its own is captured anew, in full."""
    db = bench.connect()
    db.execute("INSERT INTO t (x) VALUES ('old')")
    one = bench.capture()
    await one.start()
    before = await one.sync(5)
    db.close()
    bench.guards.clear()
    other = bench.live.with_name("new.db")
    with contextlib.closing(sqlite3.connect(other)) as made:
        made.execute("PRAGMA page_size = 1024")
        made.execute("CREATE TABLE other (x)")
        made.execute("INSERT INTO other VALUES ('new')")
        made.commit()
    for suffix in ("-wal", "-shm"):
        os.unlink(f"{bench.live}{suffix}")
    other.rename(bench.live)
    db = sqlite3.connect(bench.live, isolation_level=None)
    db.execute("INSERT INTO other VALUES ('newer')")
    bench.guards.append(db)
    await until(lambda: one.is_running and one.captured > before)
    db.execute("INSERT INTO other VALUES ('newest')")
    await bench.stop(one)
    assert "database-replaced" in bench.kinds()
    files = dict(one.files(0))
    assert is_full(files[before + 1])
    rebuilt = rebuild([(txid, path) for txid, path in one.files(0) if txid > before])
    bench.close()
    assert rebuilt == bench.live.read_bytes()


async def test_database_that_is_deleted_and_made_again(bench: Bench) -> None:
    """A deleted database is reported; when the program makes it again the next record is a full one."""
    db = bench.connect()
    db.execute("INSERT INTO t (x) VALUES ('old')")
    one = bench.capture()
    await one.start()
    before = await one.sync(5)
    db.close()
    bench.guards.clear()
    for suffix in ("", "-wal", "-shm"):
        os.unlink(f"{bench.live}{suffix}")
    await until(lambda: "database-deleted" in bench.kinds())
    assert await one.sync(5) == before
    db = bench.connect(2048)
    db.execute("INSERT INTO t (x) VALUES ('new')")
    await until(lambda: one.is_running and one.captured > before)
    await bench.stop(one)
    assert is_full(dict(one.files(0))[before + 1])
    rebuilt = rebuild([(txid, path) for txid, path in one.files(0) if txid > before])
    bench.close()
    assert rebuilt == bench.live.read_bytes()


async def test_wal_that_is_deleted_in_use(bench: Bench) -> None:
    """A deleted WAL is a failure that is said, not a silent one; once the program runs anew it goes on."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    db.execute("INSERT INTO t (x) VALUES ('old')")
    before = await one.sync(5)
    os.unlink(f"{bench.live}-wal")
    error = await asyncio.wait_for(asyncio.shield(one.failed), 5)
    assert "removed" in str(error)
    assert "broken" in bench.kinds()
    with pytest.raises(DatabaseError, match="removed"):
        await one.sync(1)
    assert not one.is_running
    assert await one.stop() is None
    db.close()  # the program is stopped
    db = bench.connect()
    db.execute("INSERT INTO t (x) VALUES ('new')")
    two = bench.capture()
    await two.start()
    await bench.stop(two)
    assert is_full(dict(two.files(0))[before + 1])
    bench.assert_rebuilds(two.files(0))


# --- Litestream in trouble


async def test_litestream_that_hangs(bench: Bench) -> None:
    """A Litestream that is stopped is killed and replaced; who waits for a barrier gets it."""
    db = bench.connect()
    one = bench.capture(stall_seconds=0.5)
    await one.start()
    hung = kill(one, signal.SIGSTOP)
    db.execute("INSERT INTO t (x) VALUES ('while it hangs')")
    with pytest.raises(SyncTimeout):
        await one.sync(0.05)
    await one.sync(10)
    assert one.pid != hung
    assert not system.is_running(hung)
    assert "stalled" in bench.kinds()
    await bench.stop(one)
    bench.assert_rebuilds(one.files(0))


async def test_litestream_that_ends_while_nothing_happens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of an idle Litestream is noticed at once, not only with the next commit."""
    monkeypatch.setattr(capture, "LOOK_SECONDS", 60.0)
    bench.connect()
    one = bench.capture()
    await one.start()
    await one.sync(5)
    await asyncio.sleep(0.1)
    kill(one)
    await until(lambda: bench.kinds() == ["started", "exited", "started"], 20)
    assert one.restarts == 1


async def test_newest_file_that_is_removed(bench: Bench) -> None:
    """If somebody removes the newest file, which may not be in the log, that is a failure; the next capture
    goes on from the log with a full record."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    db.execute("INSERT INTO t (x) VALUES (1)")
    before = await one.sync(5)
    bench.level0()[-1].unlink()
    kill(one)
    error = await asyncio.wait_for(asyncio.shield(one.failed), 5)
    assert "was removed" in str(error)
    await bench.stop(one, 0)
    db.execute("INSERT INTO t (x) VALUES (2)")
    two = bench.capture()
    await two.start(before)
    files = two.files(before)
    assert [txid for txid, _ in files] == [before + 1]
    assert is_full(files[0][1])


async def test_full_record_leaves_the_one_before_as_it_was(bench: Bench) -> None:
    """A file that is not in the log yet keeps its pages when a full one has to follow."""
    db = bench.connect()
    one = bench.capture()
    await one.start()
    db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(200_000),))
    before = await one.sync(5)
    pages = ltx.decode(one.files(before - 1)[0][1].read_bytes()).pages
    guard = await one.stop()
    assert guard is not None
    guard.close()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.execute("INSERT INTO t (x) VALUES (2)")
    two = bench.capture()
    await two.start()
    assert two.captured > before
    files = two.files(before - 1)
    assert ltx.decode(files[0][1].read_bytes()).pages == pages
    assert is_full(files[1][1])
    await bench.stop(two)
    bench.assert_rebuilds(two.files(0))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "small") as folder:
        yield folder


async def test_disk_that_is_full(small_disk: Path) -> None:
    """A full disk is reported, and its end; nothing that was committed meanwhile is missing."""
    bench = Bench(small_disk)
    try:
        db = bench.connect()
        one = bench.capture()
        await one.start()
        db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(2_000_000),))
        filler = small_disk / "filler"
        fill(filler, 4096)
        db.execute("PRAGMA synchronous = OFF")
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("INSERT INTO t (x) VALUES (1)")
        os.truncate(filler, filler.stat().st_size - 12288)
        db.execute("INSERT INTO t (x) VALUES (2)")
        fill(small_disk / "rest", 512)
        await until(lambda: "disk-full" in bench.kinds())
        await until(lambda: "Litestream cannot sync" in one.trouble)
        assert one.uncaptured_bytes > 4096
        filler.unlink()
        await until(lambda: "disk-recovered" in bench.kinds())
        await bench.stop(one)
        bench.assert_rebuilds(one.files(0))
    finally:
        await bench.dispose()


# --- processes


NODE = """
import asyncio, sys
from pathlib import Path
from phalanx.data.capture import Capture
from phalanx.ports import SectionContext
async def main():
    async def register(resource):
        pass
    section = SectionContext("p", "n1", "app", 7, register, lambda resource_id: None)
    one = Capture(Path(sys.argv[1]), Path(sys.argv[2]), section,
                  on_captured=lambda txid: None, on_event=lambda kind, detail: None)
    await one.start()
    print(one.pid, one._resource.id, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def start_node(code: str, bench: Bench) -> tuple[str, str, subprocess.Popen[str]]:
    node = subprocess.Popen(
        (sys.executable, "-c", code, str(bench.live), str(bench.folder)),
        env={**os.environ, "TMPDIR": str(bench.folder.parent)},  # a killed node leaves its socket's folder
        stdout=subprocess.PIPE,
        text=True,
    )
    assert node.stdout is not None
    pid, marker = node.stdout.readline().split()
    return pid, marker, node


@pytest.mark.parametrize("mortal", [True, False])
async def test_node_that_is_killed(bench: Bench, mortal: bool) -> None:
    """Litestream dies with its node; if not, it is found by its mark, and ended by the next start."""
    db = bench.connect()
    code = NODE if mortal else "from phalanx import child\nchild.dies_with_node = lambda: ()\n" + NODE
    pid, marker, node = start_node(code, bench)
    assert system.find_marked(marker) == [int(pid)]
    node.kill()
    node.communicate()
    if mortal:
        await until(lambda: not system.is_running(int(pid)))
    db.execute("INSERT INTO t (x) VALUES (1)")
    one = bench.capture()
    await one.start()
    assert not system.is_running(int(pid))
    await bench.stop(one)
    bench.assert_rebuilds(one.files(0))


async def test_start_and_stop_leave_nothing(bench: Bench) -> None:
    """Everything is registered before it runs, and gone, with its socket's folder, after the stop."""
    bench.connect()
    one = bench.capture()
    await one.start()
    (resource,) = bench.resources.values()
    assert resource.pgid == one.pid
    assert resource.start_time == system.process_start_time(one.pid)
    assert system.find_marked(resource.id) == [one.pid]
    pid = resource.pgid
    command = system.command_line(pid)
    assert str(bench.folder / "litestream.yml") in command
    text = (bench.folder / "litestream.yml").read_text()
    socket = Path(text.split('"path": "')[1].split('"')[0])
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    await bench.stop(one)
    assert not bench.resources
    assert not system.is_running(pid)
    assert not socket.parent.exists()
    assert await one.stop() is None
    with pytest.raises(DatabaseError):
        await one.sync(1)


async def test_stop_keeps_the_wal(bench: Bench) -> None:
    """After the stop the WAL stays, though the program is gone, until the returned connection is closed."""
    one = bench.capture()
    db = bench.connect()
    await one.start()
    db.execute("INSERT INTO t (x) VALUES (1)")
    guard = await one.stop(5)
    assert guard is not None
    db.close()
    bench.guards.clear()
    wal = bench.live.with_name("a.db-wal")
    assert wal.stat().st_size > 0
    guard.close()
    assert not wal.exists()


async def test_litestream_that_does_not_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Litestream that ends at once fails the start, with its last words, and nothing is left."""
    bench.connect()
    program = bench.folder / "litestream"
    program.write_text("#!/bin/sh\necho this machine is too old\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("phalanx.data.litestream.litestream_binary", lambda: str(program))
    with pytest.raises(DatabaseError, match=r"exited with code 3: this machine is too old"):
        await bench.capture().start()
    assert not bench.resources


async def test_pace_of_syncs_under_load(bench: Bench) -> None:
    """Commits that come faster than the pace share files, so that syncs leave room for the program."""
    bench.connect()
    one = bench.capture()
    await one.start()
    writer = bench.writer(1000)
    began, before = time.monotonic(), one.captured
    await asyncio.sleep(1.0)
    rate = (one.captured - before) / (time.monotonic() - began)
    writer.end()
    assert rate < 1.2 / capture.PACE_SECONDS
    await bench.stop(one)
    bench.assert_rebuilds(one.files(0))

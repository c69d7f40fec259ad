"""A replica becomes the live database and back; Litestream goes on from it without writing everything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.origin import Entry, Killed, Origin, Reader, Steps, apply, reopened

from phalanx.data import handover, ltx, replica_store
from phalanx.data.replica import Replica
from phalanx.data.wal_files import scan_wal
from phalanx.errors import DatabaseError
from phalanx.types import Position

LITESTREAM = str(Path(sys.executable).parent / "litestream")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests have no loss of power, and many steps that wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    """A database with pages of 4 KiB."""
    made = Origin(tmp_path)
    yield made
    made.close()


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    """An empty replica."""
    made = Replica.open(tmp_path / "folder", 100)
    yield made
    made.close()


class Litestream:
    """A real one for a live database, with the folders that a promotion prepares."""

    def __init__(self, live: Path, folder: Path) -> None:
        self.live, self.folder = live, folder
        # As ``data.litestream`` prepares it: a snapshot is there, and a newer one than any.
        snapshots = folder / "capture-replica" / "ltx" / "9"
        snapshots.mkdir(parents=True, exist_ok=True)
        (snapshots / ltx.file_name(1, (1 << 63) - 1)).touch()
        # Sockets have short paths only.
        self.home = Path(tempfile.mkdtemp(prefix="ls"))
        config = {
            "socket": {"enabled": True, "path": str(self.home / "s")},
            "snapshot": {"interval": "87600h", "retention": "87600h"},
            "levels": [],
            "l0-retention": "0s",
            "retention": {"enabled": False},
            "dbs": [
                {
                    "path": str(live),
                    "meta-path": str(folder / "capture"),
                    "monitor-interval": "1h",
                    "checkpoint-interval": "1h",
                    "replica": {
                        "type": "file",
                        "path": str(folder / "capture-replica"),
                        "sync-interval": "24h",
                    },
                }
            ],
        }
        (self.home / "c.yml").write_text(json.dumps(config))
        self.process = subprocess.Popen(
            [LITESTREAM, "replicate", "-config", str(self.home / "c.yml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def sync(self) -> int:
        """Capture all that is committed; the last transaction."""
        deadline = time.monotonic() + 10
        body = json.dumps({"path": str(self.live)}).encode()
        while time.monotonic() < deadline:
            with closing(socket.socket(socket.AF_UNIX)) as channel:
                try:
                    channel.connect(str(self.home / "s"))
                    channel.sendall(
                        b"POST /sync HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                    )
                    answer = b"".join(iter(lambda: channel.recv(65536), b"")).partition(b"\r\n\r\n")[2]
                except OSError:
                    continue
            if b'"txid"' in answer:
                return int(json.loads(answer)["txid"])
            time.sleep(0.005)
        raise AssertionError("Litestream does not answer")

    def records(self, after: int) -> list[Entry]:
        """What it has captured since."""
        names = sorted((self.folder / "capture" / "ltx" / "0").glob("*.ltx"))
        entries = [Entry(int(path.stem[-16:], 16), path.read_bytes()) for path in names]
        return [entry for entry in entries if entry.txid > after]

    def snapshots(self) -> list[int]:
        """Sizes of all files of its snapshot level."""
        return [path.stat().st_size for path in (self.folder / "capture-replica" / "ltx" / "9").iterdir()]

    def close(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.home)


def merged(path: Path, to: Path) -> bytes:
    """A copy of a database with what is in its WAL."""
    shutil.copy(path, to)
    shutil.copy(path.with_name(path.name + "-wal"), to.with_name(to.name + "-wal"))
    with closing(sqlite3.connect(to)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(truncate)").fetchone()[0] == 0
    return to.read_bytes()


@pytest.mark.parametrize("case", ["small", "first transaction", "pinned", "512", "65536"])
def test_g8_litestream_goes_on_after_a_promotion_without_a_snapshot(tmp_path: Path, case: str) -> None:
    """Its next file is the next transaction, with the changed pages alone; who follows it gets just what is
    live. Also for the very first transaction, other page sizes, and while a reader pins the WAL."""
    origin = Origin(tmp_path, int(case) if case.isdigit() else 4096)
    replica, other = Replica.open(tmp_path / "folder", 100), Replica.open(tmp_path / "other", 100)
    entries = [origin.round(20_000)]
    if case != "first transaction":
        entries += [origin.round(20_000) for _ in range(10)]
    reader: Reader | None = None
    for entry in entries:
        apply(replica, entry)
        apply(other, entry)
        if case == "pinned" and reader is None:
            assert replica.path is not None
            reader = Reader(replica.path)
            reader.execute("BEGIN")
            reader.check()
    txid, live = entries[-1].txid, tmp_path / "live.db"
    promoted = replica.promote(live, 7, 20)
    assert (promoted.txid, promoted.page_size) == (txid, origin.page_size)
    litestream = Litestream(live, tmp_path / "folder")
    try:
        program = Reader(live, mode="rw")
        program.execute("PRAGMA wal_autocheckpoint = 0")
        assert litestream.sync() >= txid
        for _ in range(3):
            program.execute("UPDATE pair SET round = round + 1")
            assert litestream.sync() > txid
        records = litestream.records(txid)
        assert [entry.txid for entry in records] == list(range(txid + 1, txid + 1 + len(records)))
        pages = [len(ltx.decode(entry.data).pages) for entry in records]
        # At first Litestream makes two tables; then a page for each row of "pair", and the table's root.
        assert max(pages) <= 8 < other.commit
        assert litestream.snapshots() == [0]
        for entry in records:
            apply(other, entry)
        assert other.snapshot(tmp_path / "followed") is not None
        assert (tmp_path / "followed").read_bytes() == merged(live, tmp_path / "merged")
        program.close()
    finally:
        litestream.close()
    if reader is not None:
        reader.execute("COMMIT")
        assert reader.check() == len(entries) + 3
        reader.close()
    replica.close()
    other.close()
    origin.close()


def test_g8_replica_of_what_litestream_wrote_is_what_litestream_restores(tmp_path: Path) -> None:
    """Byte by byte, at every transaction; the first file holds all pages."""
    live, folder = tmp_path / "live.db", tmp_path / "capture-folder"
    folder.mkdir()
    program = sqlite3.connect(live, isolation_level=None)
    program.execute("PRAGMA journal_mode = wal")
    program.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
    litestream = Litestream(live, folder)
    try:
        for number in range(12):
            program.execute("INSERT INTO t (x) VALUES (randomblob(?))", (number * 3000,))
            if number == 8:
                program.execute("DELETE FROM t WHERE id < 8")
                program.execute("VACUUM")
            litestream.sync()
        records = litestream.records(0)
    finally:
        litestream.close()
        program.close()
    replica = Replica.open(tmp_path / "folder", 20)
    assert len(records) >= 12
    for entry in records:
        apply(replica, entry)
        to = tmp_path / f"restored-{entry.txid}"
        subprocess.run(
            [LITESTREAM, "restore", "-txid", f"{entry.txid:016x}", "-o", str(to), f"file://{folder}/capture"],
            check=True,
            capture_output=True,
            timeout=30,
        )
        replica.checkpoint()
        assert replica.path is not None
        assert replica.path.read_bytes() == to.read_bytes()
    replica.close()


# --- promotion


@pytest.mark.parametrize("exists", [False, True])
def test_empty_replica_takes_over_what_is_there_or_nothing(
    replica: Replica, tmp_path: Path, exists: bool
) -> None:
    """An existing file stays as it is, and Litestream begins with it."""
    live = tmp_path / "live.db"
    if exists:
        with closing(sqlite3.connect(live)) as connection:
            connection.execute("CREATE TABLE t (x)")
    before = live.read_bytes() if exists else None
    replica.skip(4)
    promoted = replica.promote(live, 3, 5)
    assert (promoted.txid, promoted.exists) == (0, exists)
    assert (live.read_bytes() if live.exists() else None) == before
    replica = reopened(replica)
    assert replica.state == "live"
    with pytest.raises(DatabaseError, match="is live"):
        replica.skip(6)
    with pytest.raises(DatabaseError, match="is live"):
        replica.promote(live, 4, 7)
    replica.close()


def test_database_in_the_way_is_never_replaced(origin: Origin, replica: Replica, tmp_path: Path) -> None:
    """A file at the live path is refused; a log or journal without a database is moved away."""
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    live.write_bytes(b"somebody's")
    with pytest.raises(DatabaseError, match="exists already"):
        replica.promote(live, 3)
    assert live.read_bytes() == b"somebody's"
    apply(replica, origin.round())
    live.unlink()
    for suffix in ("-wal", "-journal"):
        (tmp_path / f"live.db{suffix}").write_bytes(b"orphan")
    replica.promote(live, 3)
    assert (tmp_path / "live.db-wal.orphan-3").read_bytes() == b"orphan"
    assert (tmp_path / "live.db-journal.orphan-3").read_bytes() == b"orphan"
    assert merged(live, tmp_path / "merged") == origin.images[2]


def test_readers_of_the_replica_see_what_the_program_writes_after_the_promotion(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """They keep one database with it: their files were moved, not copied."""
    apply(replica, origin.record())
    apply(replica, origin.round())
    assert replica.path is not None
    with Reader(replica.path) as reader:
        assert reader.check() == 1
        replica.promote(tmp_path / "live.db", 3)
        with Reader(tmp_path / "live.db", mode="rw") as program:
            program.execute("UPDATE pair SET round = round + 1")
            assert reader.check() == 2
        assert reader.check() == 2


@pytest.mark.parametrize("step", ["promote: move-shm", "promote: move", "state: sync what it is about"])
def test_live_database_is_complete_from_the_moment_it_is_there(
    origin: Origin, replica: Replica, tmp_path: Path, step: str
) -> None:
    """Its log comes first: whoever opens it while it is being promoted sees the last transaction."""
    apply(replica, origin.record())
    apply(replica, origin.round())
    assert replica.path is not None
    with Reader(replica.path) as reader:
        reader.execute("BEGIN")
        reader.check()  # so that what follows stays in the WAL
        apply(replica, origin.round())
        live = tmp_path / "live.db"
        with Steps(die_on=step), contextlib.suppress(Killed):
            replica.promote(live, 3)
            replica.rest()
            pytest.fail("it was to be killed")
        assert live.exists() == step.startswith("state")
        if live.exists():
            assert merged(live, tmp_path / "merged") == origin.images[3]
        replica = reopened(replica)
        assert merged(live, tmp_path / "merged") == origin.images[3]
    assert replica.role == "live"
    replica.close()


def test_whether_the_host_has_started_again_since_the_promotion_is_known(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """By its boot id, which an older version's state lacks; who vouches for the database renews it."""
    apply(replica, origin.record())
    assert not replica.describe().same_boot
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    assert replica.describe().same_boot
    replica.close()
    path = tmp_path / "folder" / "state.json"
    state = json.loads(path.read_bytes())
    state["role"] = "live"
    for older in ({**state, "boot": "another"}, {k: v for k, v in state.items() if k != "boot"}):
        path.write_text(json.dumps(older))
        with closing(Replica.open(tmp_path / "folder", 100)) as again:
            again.vouch()
            assert not again.describe().same_boot
            again.vouch(is_whole=True)
            assert again.describe().same_boot
    path.write_text(json.dumps({**state, "boot": "another"}))
    with closing(Replica.open(tmp_path / "folder", 100)) as again:
        again.resume(4, 9)
        assert again.describe().same_boot


def test_database_that_was_closed_is_whole_after_any_start_of_the_host(
    origin: Origin, replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes it last puts all of the WAL into the file, and removes it."""
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    replica.vouch()
    with monkeypatch.context() as started:
        started.setattr(replica_store, "boot_id", lambda: "another")
        assert not replica.describe().same_boot
    with closing(sqlite3.connect(live)) as program:
        program.execute("UPDATE pair SET round = round + 1")
        program.commit()
    assert not handover.has_wal(live)
    replica.vouch()
    monkeypatch.setattr(replica_store, "boot_id", lambda: "another")
    assert replica.describe().same_boot
    monkeypatch.undo()
    monkeypatch.setattr(replica_store, "_BOOT_ID", tmp_path / "none")
    replica.resume(4, 9)
    assert replica.describe().state == "live"
    replica.vouch()
    assert replica.describe().same_boot, "closed in the life of the process that went on with it"


def test_resume_is_for_a_live_database_only(origin: Origin, replica: Replica, tmp_path: Path) -> None:
    """It changes the epoch, and nothing else."""
    apply(replica, origin.record())
    with pytest.raises(DatabaseError, match="no live database"):
        replica.resume(4, 9)
    replica.promote(tmp_path / "live.db", 3, 5)
    replica.resume(4, 9)
    replica = reopened(replica)
    state = replica.describe()
    assert (state.role, state.epoch, state.sealed, state.position.txid) == ("live", 4, 9, 1)
    replica.close()


# --- demotion


def test_late_writer_of_a_demoted_database_is_refused_until_it_is_released(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """Its file is no longer there, and it could only lose what it writes."""
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    with Reader(live, mode="rw") as program:
        program.execute("UPDATE pair SET round = round + 1")
        replica.demote(live, 20, 5)
        assert replica.position == Position(20, 5)
        assert not list(tmp_path.glob("live.db*"))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            program.execute("UPDATE pair SET round = round + 1")
        assert program.check() == 1
        replica.release_old()
        program.execute("UPDATE pair SET round = round + 1")
    assert replica.path is not None
    with Reader(replica.path) as reader:
        assert reader.check() == 1
    replica = reopened(replica)
    assert replica.position == Position(20, 5)
    replica.close()


def test_writer_keeps_a_database_from_being_demoted(
    origin: Origin, replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its transaction would be lost: it stays live."""
    monkeypatch.setattr("phalanx.data.wal_files.LOCK_SECONDS", 0.1)
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    with Reader(live, mode="rw") as program:
        program.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked by another process"):
            replica.demote(live, 20, 5)
        program.execute("UPDATE pair SET round = round + 1")
        program.execute("COMMIT")
        replica.demote(live, 20, 5)
    assert replica.path is not None
    with Reader(replica.path) as reader:
        assert reader.check() == 1


def test_file_that_came_after_a_demotion_is_not_removed(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """The process was killed before it removed the old one, and somebody has put another one there."""
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    with Steps(die_on="demote: remove database"), pytest.raises(Killed):
        replica.demote(live, 20, 5)
    replica.close()
    live.unlink()
    live.write_bytes(b"somebody's")
    replica = Replica.open(tmp_path / "folder")
    assert replica.position == Position(20, 5)
    assert live.read_bytes() == b"somebody's"
    assert replica.fingerprint() == origin.fingerprint(1)
    replica.close()


def test_mode_and_owner_of_the_database_stay_over_promotions(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """The program may run as somebody else."""
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    live.chmod(0o660)
    if os.geteuid() == 0:
        os.chown(live, 12345, 23456)
    replica.demote(live, 20, 1)
    apply(replica, origin.round())
    replica.promote(live, 4)
    for suffix in ("", "-wal", "-shm"):
        status = (tmp_path / f"live.db{suffix}").stat()
        assert status.st_mode & 0o777 == 0o660
        if os.geteuid() == 0:
            assert (status.st_uid, status.st_gid) == (12345, 23456)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    ("owner", "folder_mode", "file_owner", "file_mode"),
    [
        ((12345, 23456), 0o755, (12345, 23456), 0o644),
        ((12345, 23456), 0o700, (12345, 23456), 0o600),
        ((0, 23456), 0o2770, (0, 23456), 0o660),
        ((0, 0), 0o755, (0, 0), 0o640),
    ],
)
def test_replica_of_a_node_that_is_root_is_promoted_into_a_folder_of_another_user(
    origin: Origin,
    replica: Replica,
    tmp_path: Path,
    owner: tuple[int, int],
    folder_mode: int,
    file_owner: tuple[int, int],
    file_mode: int,
) -> None:
    """They are that user's, or group's, and nobody's who may not enter the folder; root keeps its own."""
    apply(replica, origin.record())
    assert replica.path is not None
    replica.path.chmod(0o640)
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, *owner)
    folder.chmod(folder_mode)
    replica.promote(folder / "live.db", 3)
    for suffix in ("", "-wal", "-shm"):
        status = (folder / f"live.db{suffix}").stat()
        assert (status.st_uid, status.st_gid) == file_owner
        assert status.st_mode & 0o777 == file_mode


# --- setting aside


def test_database_set_aside_has_all_that_was_committed(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """In one file, under a name that was free."""
    apply(replica, origin.record())
    live, target = tmp_path / "live.db", tmp_path / "live.db.diverged-3"
    replica.promote(live, 3)
    program = Reader(live, mode="rw")
    program.execute("UPDATE pair SET round = round + 1")
    program.kill()
    target.write_text("an older one")
    aside = replica.set_aside(live, target)
    assert aside.path == f"{target}-2"
    assert aside.size_bytes == Path(aside.path).stat().st_size
    assert target.read_text() == "an older one"
    assert not list(tmp_path.glob("live.db-*"))
    with Reader(Path(aside.path)) as reader:
        assert reader.check() == 1
    assert replica.describe().state == "empty"
    replica = reopened(replica)
    assert replica.describe().state == "empty"
    replica.close()


@pytest.mark.parametrize("late", [False, True])
def test_database_set_aside_says_whether_it_is_as_it_was_seen(
    origin: Origin, replica: Replica, tmp_path: Path, late: bool
) -> None:
    """Somebody who commits after its transactions were counted is noticed."""
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    program = Reader(live, mode="rw")
    program.execute("UPDATE pair SET round = round + 1")
    seen = handover.wal_info(live, 0, 0, 0)
    if late:
        program.execute("UPDATE pair SET round = round + 1")
    program.kill()
    assert replica.set_aside(live, tmp_path / "aside", seen).as_seen is not late


def test_database_without_wal_is_set_aside_with_its_journal_rolled_back(
    replica: Replica, tmp_path: Path
) -> None:
    """What a killed program left of an unfinished transaction is undone first."""
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    with closing(sqlite3.connect(live, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    program = Reader(live, mode="rw")
    program.execute("PRAGMA cache_size = 1")
    program.execute("BEGIN")
    program.execute("UPDATE t SET x = randomblob(100000)")
    assert (tmp_path / "live.db-journal").stat().st_size > 0
    program.kill()
    aside = replica.set_aside(live, tmp_path / "aside")
    with closing(sqlite3.connect(aside.path)) as connection:
        assert connection.execute("SELECT count(*) FROM t WHERE x = zeroblob(100000)").fetchone() == (1,)
    assert not (tmp_path / "live.db-journal").exists()


def test_database_whose_log_is_being_read_is_not_set_aside(
    origin: Origin, replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader pins what would be missing in the file."""
    monkeypatch.setattr(handover, "CHECKPOINT_SECONDS", 0.1)
    apply(replica, origin.record())
    live = tmp_path / "live.db"
    replica.promote(live, 3)
    with Reader(live, mode="rw") as program, Reader(live) as reader:
        program.execute("UPDATE pair SET round = round + 1")
        reader.execute("BEGIN")
        reader.check()
        program.execute("UPDATE pair SET round = round + 1")
        with pytest.raises(DatabaseError, match="is being read"):
            replica.set_aside(live, tmp_path / "aside")
        assert replica.role == "live"
        reader.execute("COMMIT")
        assert program.check() == 2


# --- what a WAL lacks


def test_commits_after_a_place_in_the_wal_are_counted(origin: Origin, tmp_path: Path) -> None:
    """Of that very log; of another one it is not known. What was not committed does not count."""
    origin.connection.execute("PRAGMA wal_checkpoint(truncate)")
    offsets = []
    log = origin.path.with_name("origin.db-wal")
    for _ in range(4):
        origin.write(3000)
        offsets.append(log.stat().st_size)
    header, _ = scan_wal(log)
    assert header is not None
    salts = int.from_bytes(header.salts[:4], "big"), int.from_bytes(header.salts[4:], "big")
    for number, offset in enumerate(offsets, 1):
        found = handover.wal_info(origin.path, *salts, offset)
        assert (found.commits, found.later_commits, found.end) == (4, 4 - number, offsets[-1])
    assert handover.wal_info(origin.path, 1, 2, 32).later_commits is None
    copy = tmp_path / "crashed" / "origin.db"
    copy.parent.mkdir()
    shutil.copy(origin.path, copy)
    data = bytearray(log.read_bytes())
    data[offsets[2] + 100] ^= 1
    copy.with_name("origin.db-wal").write_bytes(data)
    assert handover.wal_info(copy, *salts, offsets[0]).later_commits == 2
    assert handover.wal_info(tmp_path / "none", 1, 2, 32).commits == 0

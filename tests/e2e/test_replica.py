"""A replica applies the log; ordinary readers of other processes see each record entirely or not at all."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.origin import LoopingReader, Origin, Reader, apply, check_equal, reopened

from phalanx.data import disk, ltx
from phalanx.data import replica as replica_module
from phalanx.data.replica import Replica
from phalanx.data.sqlite_wal import WAL_HEADER_BYTES, frame_offset
from phalanx.errors import DatabaseError, LtxError
from phalanx.types import Position


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
    """An empty replica that checkpoints after 100 frames."""
    made = Replica.open(tmp_path / "folder", 100)
    yield made
    made.close()


@pytest.mark.parametrize("page_size", [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536])
def test_g8_pages_of_any_size_grow_shrink_and_are_equal_byte_by_byte(tmp_path: Path, page_size: int) -> None:
    """Growth, a VACUUM that makes the file small, growth again; equal after each step."""
    origin, replica = Origin(tmp_path, page_size), Replica.open(tmp_path / "folder", 50)
    for _ in range(10):
        apply(replica, origin.round(3 * page_size, rows=2))
    check_equal(replica, origin)
    origin.vacuum()
    apply(replica, origin.record())
    check_equal(replica, origin)
    assert replica.checkpoint()
    assert replica.path is not None
    assert replica.path.read_bytes() == origin.images[replica.position.txid]
    for _ in range(10):
        apply(replica, origin.round(3 * page_size))
    check_equal(replica, origin)
    assert replica.checkpoint()
    assert replica.path.read_bytes() == origin.images[replica.position.txid]
    replica.close()
    origin.close()


def test_position_is_that_of_the_last_record_or_seal_after_reopening(
    origin: Origin, replica: Replica
) -> None:
    """Seals move it as well, before the first record and after."""
    replica.skip(1)
    replica = reopened(replica)
    assert replica.position == Position(1, 0)
    assert replica.state == "empty"
    apply(replica, origin.record())
    apply(replica, origin.round())
    assert replica.position == Position(3, 2)
    replica.skip(7)
    replica = reopened(replica)
    assert replica.position == Position(7, 2)
    check_equal(replica, origin)
    replica.close()


def test_reader_keeps_its_snapshot_while_the_wal_grows_over_many_pieces(
    origin: Origin, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 10,000 frames while a reader pins the WAL: it sees the old state, a new one the new state.
    When it is gone, all is checkpointed and the WAL begun anew."""
    apply(replica, origin.record())
    apply(replica, origin.round())
    assert replica.path is not None
    old = Reader(replica.path)
    old.execute("BEGIN")
    seen = old.execute("SELECT round FROM pair")
    frames = 0
    while frames < 10_500:
        apply(replica, origin.round(2_000_000))
        frames = replica.describe().wal_frames
    assert old.execute("SELECT round FROM pair") == seen
    new = Reader(replica.path)
    new.check()
    check_equal(replica, origin)
    assert not replica.checkpoint()
    replica = reopened(replica)
    check_equal(replica, origin)
    old.execute("COMMIT")
    old.check()
    assert replica.checkpoint()
    assert replica.path is not None
    assert replica.path.read_bytes() == origin.images[replica.position.txid]
    apply(replica, origin.round())
    assert replica.describe().wal_frames < 1000
    old.check()
    new.check()
    check_equal(replica, origin)
    old.close()
    new.close()
    replica.close()


def test_wal_is_begun_anew_only_when_nobody_reads_from_it(origin: Origin, replica: Replica) -> None:
    """A reader that is in the WAL keeps it; one that reads the file alone does not."""
    apply(replica, origin.record())
    assert replica.path is not None
    with Reader(replica.path) as reader:
        reader.execute("BEGIN")
        reader.check()
        while replica.describe().wal_frames < 200:
            apply(replica, origin.round(20_000))
        assert not replica.checkpoint()
        reader.execute("COMMIT")
        reader.execute("BEGIN")
        reader.check()
        assert replica.checkpoint()  # it sees the last state, in the WAL
        apply(replica, origin.round())
        assert replica.describe().wal_frames > 200
        reader.execute("COMMIT")
        assert replica.checkpoint()
        reader.execute("BEGIN")
        round_ = reader.check()  # all is in the file
        apply(replica, origin.round())
        assert replica.describe().wal_frames < 50
        assert reader.check() == round_
        reader.execute("COMMIT")
        assert reader.check() == round_ + 1
    check_equal(replica, origin)
    replica = reopened(replica)
    check_equal(replica, origin)
    replica.close()


def test_g8_reader_of_another_process_never_sees_half_a_record(origin: Origin, replica: Replica) -> None:
    """It reads everything in a loop while records, checkpoints and new WALs come."""
    apply(replica, origin.record())
    assert replica.path is not None
    looping = LoopingReader(replica.path)
    restarts, before = 0, 0
    for number in range(400):
        apply(replica, origin.round(3000))
        frames = replica.describe().wal_frames
        restarts += frames < before
        before = frames
        if number % 10 == 0:
            replica.checkpoint()
    count, last = looping.end()
    assert count > 20
    assert restarts > 2
    check_equal(replica, origin)
    with Reader(replica.path) as reader:
        assert reader.check() >= last


# --- what is refused


def test_gap_or_repetition_is_refused_and_changes_nothing(origin: Origin, replica: Replica) -> None:
    """A record that does not follow, one that was applied, one without a database before it."""
    first, second, third = origin.record(), origin.round(), origin.round()
    with pytest.raises(DatabaseError, match="needs a database"):
        replica.apply(1, second.txid, second.data)
    apply(replica, first)
    with pytest.raises(DatabaseError, match="does not follow"):
        replica.apply(2, third.txid, third.data)
    with pytest.raises(DatabaseError, match="is not after"):
        replica.apply(1, second.txid, second.data)
    with pytest.raises(LtxError, match="ends with transaction"):
        replica.apply(2, 7, second.data)
    assert replica.position == Position(1, 1)
    apply(replica, second)
    apply(replica, third)
    check_equal(replica, origin)


def test_damaged_record_is_refused_and_changes_nothing(origin: Origin, replica: Replica) -> None:
    """Whatever byte is wrong; then the right one is applied."""
    apply(replica, origin.record())
    entry = origin.round()
    for at in range(0, len(entry.data), 97):
        damaged = bytearray(entry.data)
        damaged[at] ^= 0xFF
        with pytest.raises((LtxError, DatabaseError)):
            replica.apply(2, entry.txid, bytes(damaged))
    with pytest.raises(LtxError):
        replica.apply(2, entry.txid, entry.data[:-1])
    assert replica.position == Position(1, 1)
    assert replica.fingerprint() == origin.fingerprint(1)
    apply(replica, entry)
    check_equal(replica, origin)


def test_database_that_leaves_wal_mode_is_refused(origin: Origin, replica: Replica) -> None:
    """A reader would take the file for one without a WAL."""
    apply(replica, origin.record())
    origin.connection.execute("PRAGMA journal_mode = delete")
    with pytest.raises(LtxError, match="WAL mode"):
        apply(replica, origin.record())
    assert replica.position == Position(1, 1)


def test_others_cannot_write_to_a_replica(origin: Origin, replica: Replica) -> None:
    """They get SQLITE_BUSY; their checkpoints do no harm."""
    for _ in range(3):
        apply(replica, origin.round())
    assert replica.path is not None
    connection = Reader(replica.path, mode="rw")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        connection.execute("DELETE FROM t")
    connection.execute("PRAGMA wal_checkpoint(truncate)")
    apply(replica, origin.round())
    connection.execute("PRAGMA wal_checkpoint(passive)")
    apply(replica, origin.round())
    connection.close()
    check_equal(replica, origin)
    replica = reopened(replica)
    check_equal(replica, origin)
    replica.close()


def test_folder_in_use_is_refused(replica: Replica) -> None:
    """By whoever comes second."""
    with pytest.raises(DatabaseError, match="in use"):
        Replica.open(replica._folder.path)


# --- what was not written by us


def closed(replica: Replica) -> tuple[Path, Path]:
    """Closes it; the folder and the database file."""
    path, folder = replica.path, replica._folder.path
    replica.close()
    assert path is not None
    return folder, path


def test_replica_that_others_wrote_to_is_broken(origin: Origin, replica: Replica) -> None:
    """While nobody held its lock: its position is not known any more, so it has to be made anew."""
    apply(replica, origin.record())
    folder, path = closed(replica)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("DELETE FROM t")
    connection.close()
    replica = Replica.open(folder)
    assert replica.state == "broken"
    with pytest.raises(DatabaseError, match="broken"):
        apply(replica, origin.round())
    replica.reset()
    assert replica.state == "empty"
    apply(replica, origin.record(full=True))
    check_equal(replica, origin)
    replica.close()


@pytest.mark.parametrize("name", ["replica.db", "replica.db-wal", "journal"])
def test_replica_without_one_of_its_files_is_broken(origin: Origin, replica: Replica, name: str) -> None:
    """It is not taken for an older one."""
    apply(replica, origin.record())
    apply(replica, origin.round())
    folder, path = closed(replica)
    path.with_name(name).unlink()
    replica = Replica.open(folder)
    assert replica.state == "broken"
    assert replica.reason
    replica.close()


def test_unreadable_state_is_an_error_that_says_what_to_do(origin: Origin, replica: Replica) -> None:
    """Who has the database is not known then: nothing may be thrown away."""
    apply(replica, origin.record())
    folder, path = closed(replica)
    (folder / "state.json").write_bytes(b"{")
    with pytest.raises(DatabaseError, match=r"state\.json is damaged.*move"):
        Replica.open(folder)
    assert path.exists()


def test_g8_wal_that_was_cut_anywhere_is_an_earlier_position_with_its_content(
    origin: Origin, tmp_path: Path
) -> None:
    """As after a loss of power: what is left of the WAL decides, and the journal knows the position."""
    replica = Replica.open(tmp_path / "folder", 10_000)
    for _ in range(12):
        apply(replica, origin.round(5000))
    folder, path = closed(replica)
    log, index = path.with_name("replica.db-wal"), path.with_name("replica.db-shm")
    whole, seen = log.read_bytes(), set[int]()
    for end in sorted({*range(WAL_HEADER_BYTES, len(whole), 5003), frame_offset(2, 4096), len(whole)}):
        log.write_bytes(whole[:end])
        if end % 2:  # the other half: an index that nobody has in use says nothing
            index.unlink(missing_ok=True)
        replica = Replica.open(folder, 10_000)
        check_equal(replica, origin)
        seen.add(replica.position.txid)
        replica.close()
    assert seen >= set(range(2, 13))


def test_journal_that_lacks_its_last_entries_makes_the_replica_broken(
    origin: Origin, replica: Replica
) -> None:
    """After a loss of power that kept the WAL but not the journal: an older position would be wrong."""
    for _ in range(3):
        apply(replica, origin.round())
    folder, path = closed(replica)
    journal = path.with_name("journal")
    journal.write_bytes(journal.read_bytes()[:-20])
    replica = Replica.open(folder)
    assert replica.state == "broken"
    replica.close()


# --- new generations


def test_full_record_of_another_page_size_makes_a_new_file(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """As when the live database was replaced; a reader of the old file keeps what it has."""
    apply(replica, origin.record())
    assert replica.path is not None
    old, old_path = Reader(replica.path), replica.path
    old.check()
    (tmp_path / "other").mkdir()
    other = Origin(tmp_path / "other", 1024)
    other.txid = 40
    other.write()
    apply(replica, other.record(full=True))
    assert replica.position == Position(2, 41)
    assert replica.path != old_path
    check_equal(replica, other)
    old.check()
    replica.rest()
    assert not old_path.exists()
    old.check()
    old.close()
    apply(replica, other.round())
    replica = reopened(replica)
    check_equal(replica, other)
    replica.close()
    other.close()


@pytest.mark.parametrize("as_file", [False, True])
def test_big_record_makes_a_new_generation_also_while_a_reader_pins_the_wal(
    origin: Origin, replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_file: bool
) -> None:
    """What is in the WAL still comes along; the path changes, the content is right."""
    monkeypatch.setattr(replica_module, "BIG_RECORD_PAGES", 100)
    apply(replica, origin.record())
    assert replica.path is not None
    old, old_path = Reader(replica.path), replica.path
    old.execute("BEGIN")
    round_ = old.execute("SELECT round FROM pair")
    for _ in range(5):
        apply(replica, origin.round(30_000))
    entry = origin.round(2_000_000)
    if as_file:
        file = tmp_path / "record.ltx"
        file.write_bytes(entry.data)
        replica.apply(10, entry.txid, file)
    else:
        replica.apply(10, entry.txid, entry.data)
    assert replica.path != old_path
    check_equal(replica, origin)
    assert old.execute("SELECT round FROM pair") == round_
    old.close()
    apply(replica, origin.round())
    replica = reopened(replica)
    assert replica.position.sequence == 11
    check_equal(replica, origin)
    replica.close()


def test_big_record_that_is_damaged_at_its_end_leaves_the_old_generation(
    origin: Origin, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are written before its checksum is known: into a file that is thrown away."""
    monkeypatch.setattr(replica_module, "BIG_RECORD_PAGES", 100)
    apply(replica, origin.record())
    path, entry = replica.path, origin.round(2_000_000)
    damaged = bytearray(entry.data)
    damaged[-3] ^= 1
    with pytest.raises(LtxError):
        replica.apply(2, entry.txid, bytes(damaged))
    assert replica.path == path
    assert [each.name for each in replica._folder.path.glob("gen-*")] == ["gen-1"]
    assert replica.fingerprint() == origin.fingerprint(1)
    apply(replica, entry)
    check_equal(replica, origin)


def test_installed_image_is_the_replica_at_its_position(
    origin: Origin, replica: Replica, tmp_path: Path
) -> None:
    """Over an older one; records go on from there."""
    apply(replica, origin.record())
    for _ in range(5):
        origin.round()
    (replica._folder.path / "image").write_bytes(origin.images[6])
    replica.install(replica._folder.path / "image", 50, 6)
    check_equal(replica, origin)
    assert replica.position == Position(50, 6)
    apply(replica, origin.round())
    replica = reopened(replica)
    assert replica.position == Position(51, 7)
    check_equal(replica, origin)
    (tmp_path / "junk").write_bytes(b"SQLite format 3\0" + bytes(4080))
    with pytest.raises(DatabaseError, match="no database"):
        replica.install(tmp_path / "junk", 60, 9)
    assert replica.position == Position(51, 7)
    replica.close()


def test_snapshot_is_the_database_at_its_position(origin: Origin, replica: Replica, tmp_path: Path) -> None:
    """Also of what is only in the WAL."""
    apply(replica, origin.record())
    for _ in range(5):
        apply(replica, origin.round(20_000))
    assert replica.snapshot(tmp_path / "snapshot") == replica.position
    assert (tmp_path / "snapshot").read_bytes() == origin.images[6]
    with pytest.raises(FileExistsError):
        replica.snapshot(tmp_path / "snapshot")


# --- a disk that fails


def test_failing_step_leaves_the_position_and_the_next_attempt_succeeds(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, at each step of applying, checkpointing and rebuilding."""
    monkeypatch.setattr(replica_module, "BIG_RECORD_PAGES", 100)
    replica = Replica.open(tmp_path / "folder", 40)
    seen: set[str] = set()
    failing = ""

    def step(label: str) -> None:
        nonlocal failing
        # Memory cannot fail: only a kill comes between the two copies of the header.
        if failing == "" and label not in seen and not label.endswith(("header", "backfilled")):
            seen.add(label)
            failing = label
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "on_step", step)
    for number in range(60):
        entry = origin.round(2_000_000 if number % 20 == 10 else 4000)
        while replica.position.txid < entry.txid:
            before, failing = replica.position, ""
            try:
                apply(replica, entry)
            except OSError:
                assert failing
                assert replica.position == before
    monkeypatch.setattr(disk, "on_step", lambda label: None)
    assert {
        "journal: append",
        "wal: frames",
        "wal: sync",
        "db: page",
        "rebuild: pages",
        "state: rename",
    } <= seen
    check_equal(replica, origin)
    replica = reopened(replica)
    check_equal(replica, origin)
    replica.close()


def test_record_without_pages_moves_the_position_alone(origin: Origin, replica: Replica) -> None:
    """Nothing of the kind is known of Litestream, but the format has it. One that only shrinks is damaged."""
    apply(replica, origin.record())
    commit = replica.commit
    with pytest.raises(LtxError, match="no page"):
        replica.apply(
            2, 2, ltx.encode(ltx.Header(page_size=4096, commit=commit - 1, min_txid=2, max_txid=2), [])
        )
    replica.apply(2, 2, ltx.encode(ltx.Header(page_size=4096, commit=commit, min_txid=2, max_txid=2), []))
    assert replica.fingerprint() == origin.fingerprint(1)
    replica = reopened(replica)
    assert replica.position == Position(2, 2)
    replica.close()

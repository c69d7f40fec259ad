"""A replica that is killed before any step on the disk comes back at a position, with the content of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.origin import Entry, Killed, Origin, Reader, Steps, check_equal

from phalanx.data import ltx
from phalanx.data import replica as replica_module
from phalanx.data.replica import Replica
from phalanx.data.wal_files import scan_wal, wal_path
from phalanx.types import Position

PAGES = 20
"""Frames after which these replicas checkpoint."""


class Case:
    """A prepared replica, what is done to it, and what may be found when that is interrupted."""

    def __init__(self, folder: Path, origin: Origin, entries: list[Entry]) -> None:
        self.folder, self.origin, self.entries = folder, origin, entries
        self.live = folder.parent / "live.db"

    def open(self) -> Replica:
        """As after a start."""
        return Replica.open(self.folder, PAGES)

    def follow(self, replica: Replica) -> None:
        """Apply all entries that are not yet, and a seal after them."""
        for entry in self.entries:
            if entry.txid > replica.position.txid:
                replica.apply(entry.txid, entry.txid, entry.data)
        if replica.position.sequence < len(self.entries) + 1:
            replica.skip(len(self.entries) + 1)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests have no loss of power, and many steps that wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are big from 30 pages on, journals from 4 entries on."""
    monkeypatch.setattr(replica_module, "BIG_RECORD_PAGES", 30)
    monkeypatch.setattr(replica_module, "COMPACT_BYTES", 200)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, list[Entry]]]:
    """A database and its records: small ones, enough for new WALs, one big one, one that shrinks."""
    origin = Origin(tmp_path_factory.mktemp("origin"), 1024)
    entries = [origin.record()]
    entries += [origin.round(3000) for _ in range(3)]
    entries.append(origin.round(60_000))
    entries += [origin.round(3000) for _ in range(3)]
    origin.vacuum()
    entries.append(origin.record())
    entries += [origin.round(1000) for _ in range(3)]
    yield origin, entries
    origin.close()


@pytest.fixture
def reader(request: pytest.FixtureRequest, story: tuple[Origin, list[Entry]]) -> Iterator[Reader | None]:
    """A process that can read, if it is asked for."""
    if not request.param:
        yield None
        return
    with Reader(story[0].path) as made:
        yield made


def kill_at_every_step(
    tmp_path: Path,
    story: tuple[Origin, list[Entry]],
    act: Callable[[Case], None],
    prepare: Callable[[Case], None],
    check: Callable[[Case, bool], None],
    reader: Reader | None = None,
) -> list[str]:
    """Do *act* once for each of its steps, on the same prepared files, and end it there; all labels."""
    number, place, prepared = 0, tmp_path / "place", tmp_path / "prepared"
    case = Case(place / "folder", *story)
    place.mkdir()
    prepare(case)
    place.rename(prepared)
    while True:
        number += 1
        shutil.copytree(prepared, place)
        if reader is not None:
            replica = case.open()
            reader.connect(replica.path or case.live)
            reader.check()
            replica.close()
        with Steps(number) as steps:
            try:
                act(case)
            except Killed:
                ended = False
            else:
                ended = True
        check(case, ended)
        if reader is not None:
            reader.check()
        shutil.rmtree(place)
        if ended:
            assert number > 1
            return steps.labels


def follow(case: Case) -> None:
    """The whole story."""
    replica = case.open()
    try:
        case.follow(replica)
    finally:
        replica.close()


def check_following(case: Case, ended: bool) -> None:
    """It is at a position with its content, and goes on to the end."""
    replica = case.open()
    if replica.position.txid:
        check_equal(replica, case.origin)
    assert not ended or replica.position == Position(len(case.entries) + 1, len(case.entries))
    case.follow(replica)
    check_equal(replica, case.origin)
    assert replica.position == Position(len(case.entries) + 1, len(case.entries))
    replica.close()
    replica = case.open()
    check_equal(replica, case.origin)
    replica.close()


def begin(case: Case) -> None:
    """The first record is applied."""
    replica = case.open()
    replica.apply(1, 1, case.entries[0].data)
    replica.close()


@pytest.mark.parametrize("reader", [False, True], indirect=True)
def test_g8_kill_at_any_step_of_following(
    tmp_path: Path, story: tuple[Origin, list[Entry]], reader: Reader | None
) -> None:
    """Records, big ones, checkpoints, new WALs and seals; also while a reader keeps the index alive."""
    prepare = begin if reader else lambda case: None
    labels = kill_at_every_step(tmp_path, story, follow, prepare, check_following, reader)
    assert {
        "journal: append",
        "wal: frames",
        "wal: header",
        "index: tables",
        "index: second header",
        "index: first header",
        "index: backfilled",
        "db: page",
        "rebuild: copy",
        "state: rename",
    } <= set(labels)
    assert len(labels) > 100


@pytest.mark.parametrize("reader", [True], indirect=True)
def test_g8_two_kills_in_a_row(tmp_path: Path, story: tuple[Origin, list[Entry]], reader: Reader) -> None:
    """The second one as soon as the replica goes on: what the first one left is overwritten right."""
    for first in range(40, 110, 7):
        for second in range(1, 25, 4):
            case = Case(tmp_path / f"{first}-{second}" / "folder", *story)
            case.folder.parent.mkdir()
            begin(case)
            reader.connect(case.folder / "gen-1" / "replica.db")
            reader.check()
            for die_at in (first, second):
                with Steps(die_at), pytest.raises(Killed):
                    follow(case)
            reader.check()
            check_following(case, False)


def test_kill_at_any_step_of_installing(tmp_path: Path, story: tuple[Origin, list[Entry]]) -> None:
    """It is the old replica or the new one."""

    def prepare(case: Case) -> None:
        begin(case)
        (case.folder / "image").write_bytes(case.origin.images[5])

    def act(case: Case) -> None:
        replica = case.open()
        try:
            replica.install(case.folder / "image", 5, 5)
        finally:
            replica.close()

    def check(case: Case, ended: bool) -> None:
        replica = case.open()
        assert replica.position in ([Position(5, 5)] if ended else [Position(1, 1), Position(5, 5)])
        check_equal(replica, case.origin)
        assert len(list(case.folder.glob("gen-*"))) == 1
        replica.close()
        check_following(case, False)

    assert len(kill_at_every_step(tmp_path, story, act, prepare, check)) > 10


def test_kill_at_any_step_of_a_reset(tmp_path: Path, story: tuple[Origin, list[Entry]]) -> None:
    """It is the old replica or empty."""

    def act(case: Case) -> None:
        replica = case.open()
        try:
            replica.reset()
        finally:
            replica.close()

    def check(case: Case, ended: bool) -> None:
        replica = case.open()
        assert replica.state == "empty" or not ended
        replica.close()
        check_following(case, False)

    kill_at_every_step(tmp_path, story, act, begin, check)


# --- handing over


def end_story(case: Case) -> None:
    """All is applied."""
    follow(case)


def promote(case: Case) -> None:
    """To the live database."""
    replica = case.open()
    try:
        if replica.role == "replica":
            replica.promote(case.live, 9, 100)
    finally:
        replica.close()


def merge(path: Path) -> None:
    """Put the WAL into the file."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(truncate)").fetchone()[0] == 0
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def content(case: Case, replica: Replica) -> str:
    """SHA-256 of what the replica or the live database holds."""
    if replica.role == "replica":
        return replica.fingerprint()
    merge(case.live)
    return hashlib.sha256(case.live.read_bytes()).hexdigest()


def check_primed(case: Case) -> None:
    """Litestream's newest file is the last frame of the log, as it would have captured it."""
    txid = len(case.entries)
    primed = ltx.decode((case.folder / "capture" / "ltx" / "0" / ltx.file_name(txid, txid)).read_bytes())
    wal_header, frames = scan_wal(wal_path(case.live))
    assert wal_header is not None
    frame = list(frames)[-1]
    header, frame_bytes = primed.header, 24 + wal_header.page_size
    assert header.wal_offset == 32 + (frame.frame - 1) * frame_bytes
    assert header.wal_size == frame_bytes
    with wal_path(case.live).open("rb") as log:
        log.seek(header.wal_offset)
        data = log.read(frame_bytes)
    assert [page.number for page in primed.pages] == [int.from_bytes(data[:4], "big")]
    assert primed.pages[0].data == data[24:]
    assert int.from_bytes(data[4:8], "big") == header.commit
    assert data[8:16] == header.wal_salt1.to_bytes(4, "big") + header.wal_salt2.to_bytes(4, "big")


@pytest.mark.parametrize("reader", [False, True], indirect=True)
@pytest.mark.parametrize("is_long", [False, True])
def test_kill_at_any_step_of_a_promotion(
    tmp_path: Path,
    story: tuple[Origin, list[Entry]],
    reader: Reader | None,
    is_long: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is a replica still, or the live database with all of its files; never both, never neither.

    Its log goes along as it is, or is begun anew if it is long.
    """
    pages = [20]

    def open_replica(case: Case) -> Replica:
        return Replica.open(case.folder, pages[-1])

    def prepare(case: Case) -> None:
        end_story(case)
        pages.append(2 if is_long else 100)

    monkeypatch.setattr(Case, "open", open_replica)

    def check(case: Case, ended: bool) -> None:
        replica = case.open()
        txid = len(case.entries)
        assert replica.role in ("replica", "live")
        if replica.role == "replica":
            assert not ended
            assert not case.live.exists()
            assert replica.position == Position(txid + 1, txid)
            check_equal(replica, case.origin)
            replica.promote(case.live, 9, 100)
        assert replica.describe().epoch == 9
        assert replica.describe().sealed == 100
        assert replica.position.txid == txid
        assert not list(case.folder.glob("gen-*/replica.db*"))
        check_primed(case)
        assert content(case, replica) == case.origin.fingerprint(txid)
        replica.close()

    labels = kill_at_every_step(tmp_path, story, promote, prepare, check, reader)
    assert {"promote: move", "promote: move-wal", "promote: move-shm", "capture: write"} <= set(labels)
    assert ("wal: header" in labels) == is_long


def go_live(case: Case) -> None:
    """All is applied and promoted, and the program has written a little."""
    end_story(case)
    promote(case)
    program = Reader(case.live, mode="rw")
    program.execute("UPDATE pair SET round = round + 1")
    program.kill()  # so that its WAL stays


def live_content(case: Case) -> str:
    """SHA-256 of a copy of what is live, with its WAL."""
    copies = case.folder.parent / "copy"
    for suffix in ("", "-wal"):
        part = case.live.with_name(case.live.name + suffix)
        copies.with_name(copies.name + suffix).write_bytes(part.read_bytes())
    merge(copies)
    return hashlib.sha256(copies.read_bytes()).hexdigest()


@pytest.mark.parametrize("reader", [False, True], indirect=True)
def test_kill_at_any_step_of_a_demotion(
    tmp_path: Path, story: tuple[Origin, list[Entry]], reader: Reader | None
) -> None:
    """It is live still, or a replica with the same content, and then nothing is left of the live files."""
    wanted = ""

    def prepare(case: Case) -> None:
        nonlocal wanted
        go_live(case)
        wanted = live_content(case)

    def act(case: Case) -> None:
        replica = case.open()
        try:
            replica.demote(case.live, 101, 17)
        finally:
            replica.close()

    def check(case: Case, ended: bool) -> None:
        replica = case.open()
        if replica.role == "live":
            assert not ended
            assert live_content(case) == wanted
            replica.demote(case.live, 101, 17)
        assert replica.state == "ready"
        assert replica.position == Position(101, 17)
        assert replica.fingerprint() == wanted
        assert not list(case.live.parent.glob("live.db*"))
        replica.close()

    labels = kill_at_every_step(tmp_path, story, act, prepare, check, reader)
    assert {"demote: copy", "demote: remove database", "demote: remove log"} <= set(labels)


def test_kill_at_any_step_of_setting_aside(tmp_path: Path, story: tuple[Origin, list[Entry]]) -> None:
    """It is live still with all that was committed, or one file with that at its new place."""
    wanted = ""

    def prepare(case: Case) -> None:
        nonlocal wanted
        go_live(case)
        wanted = live_content(case)
        (case.folder.parent / "aside").write_text("of an earlier time")

    def act(case: Case) -> None:
        replica = case.open()
        try:
            replica.set_aside(case.live, case.folder.parent / "aside")
        finally:
            replica.close()

    def check(case: Case, ended: bool) -> None:
        replica = case.open()
        target = case.folder.parent / "aside-2"
        if replica.role == "live":
            assert not ended
            assert not target.exists()
            replica.set_aside(case.live, case.folder.parent / "aside")
        assert replica.state == "empty"
        assert hashlib.sha256(target.read_bytes()).hexdigest() == wanted
        assert (case.folder.parent / "aside").read_text() == "of an earlier time"
        assert not list(case.live.parent.glob("live.db*"))
        replica.close()

    kill_at_every_step(tmp_path, story, act, prepare, check)


# --- losses of power


def state_on_disk(case: Case) -> str:
    """The role that a next opening finds."""
    return json.loads((case.folder / "state.json").read_bytes())["role"]


def test_promotion_waits_for_the_disk_four_times(tmp_path: Path, story: tuple[Origin, list[Entry]]) -> None:
    """For what Litestream goes on from, and for the state that decides; an unsynced log costs two more."""
    case = Case(tmp_path / "folder", *story)
    end_story(case)
    replica = Replica.open(case.folder, 100)
    replica.sync()
    replica.skip(replica.position.sequence + 1)
    with Steps() as steps:
        replica.promote(case.live, 9, 100)
    decided = ["capture: sync", "capture: sync folder", "state: sync", "state: sync folder"]
    assert [label for label in steps.labels if "sync" in label] == decided
    assert steps.labels.index("state: sync folder") < steps.labels.index("promote: move-wal")
    replica.close()


def test_state_of_a_promotion_is_saved_after_the_names_that_it_is_about(
    tmp_path: Path, story: tuple[Origin, list[Entry]]
) -> None:
    """Once nothing else is to be done, or with the next state: what is said to be live must be there."""
    case = Case(tmp_path / "folder", *story)
    end_story(case)
    promote(case)
    for act in (Replica.rest, lambda replica: replica.resume(10, 200)):
        replica = case.open()
        assert (state_on_disk(case), replica.role) == ("promoting", "live")
        with Steps() as steps:
            act(replica)
        assert steps.labels[0] == "state: sync what it is about"
        assert steps.labels[-1] == "state: sync folder"
        assert state_on_disk(case) == "live"
        with Steps() as steps:
            replica.rest()
        assert not any(label.startswith("state") for label in steps.labels)
        replica.close()
        state = json.loads((case.folder / "state.json").read_bytes())
        (case.folder / "state.json").write_text(json.dumps(state | {"role": "promoting"}))


@pytest.mark.parametrize("undone", [0, 1, 2, 3])
def test_loss_of_power_after_a_promotion_takes_nothing_that_was_committed(
    tmp_path: Path, story: tuple[Origin, list[Entry]], undone: int
) -> None:
    """Names that were not on the disk yet are the old ones again; the program's commits are in the files."""
    case = Case(tmp_path / "folder", *story)
    go_live(case)
    wanted = live_content(case)
    assert state_on_disk(case) == "promoting"
    generation = next(case.folder.glob("gen-*"))
    for suffix in ("", "-shm", "-wal")[:undone]:
        case.live.with_name(case.live.name + suffix).rename(generation / f"replica.db{suffix}")
    replica = case.open()
    assert replica.role == "live"
    assert live_content(case) == wanted
    assert not list(case.folder.glob("gen-*/replica.db*"))
    replica.close()


def test_database_that_is_gone_before_the_state_was_saved_is_one_that_has_vanished(
    tmp_path: Path, story: tuple[Origin, list[Entry]]
) -> None:
    """Its node goes on: what it does with a database that is not there, it does here too."""
    case = Case(tmp_path / "folder", *story)
    go_live(case)
    case.live.unlink()
    replica = case.open()
    assert replica.role == "live"
    replica.reset()
    assert replica.state == "empty"
    replica.close()

"""How a replica becomes the live database and a live one becomes a replica or is set aside, step by step.

Each is decided by one replacement of ``state.json``; what has to follow can be done any number of times, so
the next opening finishes what a kill has interrupted (:func:`finish`).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from phalanx.data import disk, ltx
from phalanx.data.replica_state import Aside, WalInfo
from phalanx.data.replica_store import Folder, State
from phalanx.data.sqlite_wal import (
    FRAME_HEADER_BYTES,
    WAL_HEADER_BYTES,
    WalHeader,
    decode_wal_header,
    frame_offset,
)
from phalanx.data.wal_files import WalFiles, index_path, is_wal_database, wal_path
from phalanx.errors import DatabaseError
from phalanx.types import Position

log = logging.getLogger("phalanx.data")

CAPTURE, CAPTURE_REPLICA = "capture", "capture-replica"
LEVEL0 = Path(CAPTURE, "ltx", "0")
"""Where Litestream puts its files."""

SUFFIXES = ("-wal", "-shm", "")
"""The order in which files move: the database comes last, when its log is there."""

CHECKPOINT_SECONDS = 5.0
_POLL_SECONDS = 0.01


def wal_info(live: Path, salt1: int, salt2: int, offset: int) -> WalInfo:
    """What the log of the database at *live* holds, and how much of it after byte *offset* of a log with
    these salts. Raises DatabaseError, OSError.

    As whoever opens the database sees it: by the index where that is in use, since a program killed within
    its commit has left frames that the next writer overwrites; else all that SQLite recovers from the log.
    """
    if not live.exists() or not is_wal_database(live):
        return WalInfo(0, 0, 0, 0, None)
    files = WalFiles.open(live)
    try:
        state = files.log_state
        with wal_path(live).open("rb") as log_file:
            header = decode_wal_header(log_file.read(WAL_HEADER_BYTES))
        if state is None or header is None or header.salts != state.salts:
            return WalInfo(0, 0, 0, 0, None)
        ends = _commits(wal_path(live), header, state.frames)
    finally:
        files.close()
    salts = int.from_bytes(header.salts[:4], "big"), int.from_bytes(header.salts[4:], "big")
    later = sum(end > offset for end in ends) if salts == (salt1, salt2) else None
    return WalInfo(*salts, state.frames, len(ends), later, frame_offset(state.frames + 1, header.page_size))


def _commits(log: Path, header: WalHeader, limit: int) -> list[int]:
    """Where each transaction in the first *limit* frames ends, in bytes."""
    ends: list[int] = []
    with log.open("rb", buffering=0) as file:
        for frame in range(1, limit + 1):
            head = os.pread(file.fileno(), FRAME_HEADER_BYTES, frame_offset(frame, header.page_size))
            if len(head) < FRAME_HEADER_BYTES or head[8:16] != header.salts:
                break
            if head[4:8] != bytes(4):
                ends.append(frame_offset(frame + 1, header.page_size))
    return ends


def has_wal(live: Path) -> bool:
    """Whether the database at *live* has a log at all."""
    try:
        return wal_path(live).stat().st_size > 0
    except FileNotFoundError:
        return False


# --- Litestream's folders


def clear_capture(folder: Path) -> None:
    """Nothing of an earlier reign is left for Litestream, whose own folder is there, on the disk.

    It takes its time: done long before a promotion, it does not have to be done then.
    """
    level0 = folder / LEVEL0
    if not _is_clear(folder):
        for name in (CAPTURE, CAPTURE_REPLICA):
            if (folder / name).exists():
                disk.on_step("capture: clear")
                shutil.rmtree(folder / name)
        disk.on_step("capture: make")
        level0.mkdir(mode=0o700, parents=True)
    for path in (level0.parent, level0.parent.parent, folder):
        disk.sync_folder(path, "capture: sync folders")


def ensure_clear(folder: Path) -> None:
    """The same, if it was not done before."""
    if not _is_clear(folder):
        clear_capture(folder)


def _is_clear(folder: Path) -> bool:
    try:
        found = [os.listdir(path) for path in (folder / CAPTURE, (folder / LEVEL0).parent, folder / LEVEL0)]
    except FileNotFoundError:
        return False
    return found == [[LEVEL0.parts[1]], [LEVEL0.parts[2]], []]


def prime_capture(folder: Path, files: WalFiles, txid: int, now: float) -> None:
    """Make Litestream believe that it has captured *txid* itself, as the last frame of the log.

    It compares salts, place and page of its newest file with the log and goes on from there (db.go, verify).
    """
    ensure_clear(folder)
    state = files.log_state
    assert state is not None
    frame_bytes = files.page_size + 24
    header = ltx.Header(
        page_size=files.page_size,
        commit=files.commit,
        min_txid=txid,
        max_txid=txid,
        time_ms=int(now * 1000),
        wal_offset=files.log_end - frame_bytes,
        wal_size=frame_bytes,
        wal_salt1=int.from_bytes(state.salts[:4], "big"),
        wal_salt2=int.from_bytes(state.salts[4:], "big"),
    )
    # A file of the first transaction has every page.
    pages = _all_pages(files) if txid == 1 else _last_page(files)
    _write_new(folder / LEVEL0 / ltx.file_name(txid, txid), ltx.encoded(header, pages))


def _last_page(files: WalFiles) -> list[ltx.Page]:
    last = files.newer_pages(files.frames - 1)
    return [ltx.Page(number, files.read_frame(frame)) for number, frame in last.items()]


def _all_pages(files: WalFiles) -> Iterator[ltx.Page]:
    number, size, unused = 0, files.page_size, ltx.lock_page(files.page_size)
    for chunk in files.chunks():
        for at in range(0, len(chunk), size):
            number += 1
            if number != unused:
                yield ltx.Page(number, chunk[at : at + size])


def _write_new(path: Path, pieces: Iterable[bytes]) -> None:
    descriptor, at = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), 0
    try:
        for piece in pieces:
            disk.write_at(descriptor, piece, at, "capture: write")
            at += len(piece)
        disk.sync(descriptor, "capture: sync")
    finally:
        os.close(descriptor)
    disk.sync_folder(path.parent, "capture: sync folder")


# --- moving files


def finish(folder: Folder) -> None:
    """Do the rest of what the state says, and make room for the next promotion."""
    state = folder.state
    if state.role == "promoting":
        _finish_promotion(folder, state)
    elif state.role == "setting-aside":
        _finish_setting_aside(folder, state)
    elif state.role == "replica" and state.live:
        _remove_live(Path(state.live), state.leftover)
        folder.save(msgspec.structs.replace(state, live="", leftover=""))
    if folder.state.role in ("empty", "replica"):
        clear_capture(folder.path)


def _finish_promotion(folder: Folder, state: State) -> None:
    live, source = Path(state.live), folder.database_path(state.generation)
    if source.exists():
        _clear_way(live, state.epoch, ("", "-journal"))
    for suffix in SUFFIXES:
        part = source.with_name(source.name + suffix)
        if part.exists():
            disk.rename(part, live.with_name(live.name + suffix), f"promote: move{suffix}")
    # A loss of power may undo some of that, but not what the state says: it would just be done once more.
    folder.assume(msgspec.structs.replace(state, role="live"), (live.parent, source.parent))


def _clear_way(live: Path, epoch: int, suffixes: Sequence[str]) -> None:
    """Move away what is at the names of the live database.

    A journal or a log of another database would be applied to this one.
    """
    for suffix in suffixes:
        part = live.with_name(live.name + suffix)
        if part.exists():
            aside = free_name(part.with_name(f"{part.name}.orphan-{epoch}"))
            log.warning("%s is in the way of the promoted database: moved to %s", part, aside)
            disk.rename(part, aside, "promote: clear way")


def prepare_files(source: Path, live: Path, epoch: int) -> None:
    """Before a promotion is decided: nothing lies in its way, and the files have the owner that the program
    will expect."""
    _clear_way(live, epoch, ("-wal", "-shm", "-journal"))
    user, group, mode = _rights(source.stat(), live.parent.stat())
    for suffix in SUFFIXES:
        part = source.with_name(source.name + suffix)
        os.chmod(part, mode)
        status = part.stat()
        if os.geteuid() == 0 and (status.st_uid, status.st_gid) != (user, group):
            os.chown(part, user, group)


def _rights(file: os.stat_result, folder: os.stat_result) -> tuple[int, int, int]:
    """User, group and mode that a database should have in *folder*.

    One that was live there before has them already. One that root has made is given to the folder's owner,
    and nobody else may do more with it than with the folder.
    """
    if os.geteuid() or file.st_uid or not (folder.st_uid or folder.st_gid):
        return file.st_uid, file.st_gid, file.st_mode & 0o777
    mode = 0o664 if folder.st_mode & 0o020 else 0o644
    return folder.st_uid, folder.st_gid, mode & (folder.st_mode | 0o600)


def identity(path: Path) -> str:
    """Tells a file from another one that may later have its name."""
    status = path.stat()
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _remove_live(live: Path, leftover: str) -> None:
    if live.exists():
        if identity(live) != leftover:
            log.warning("%s is not the database that became a replica: it stays", live)
            return
        disk.unlink(live, "demote: remove database")
    for path in (wal_path(live), index_path(live)):
        disk.unlink(path, "demote: remove log")
    disk.sync_folder(live.parent, "demote: sync folder")


def copy_generation(
    folder: Folder, generation: int, source: WalFiles, like: os.stat_result, position: Position
) -> None:
    """A new generation with what *source* holds now."""
    try:
        path = folder.begin_generation(generation)
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            source.copy_to(target, "demote: copy")
            os.fchmod(target, like.st_mode & 0o777)
            if os.geteuid() == 0:
                os.fchown(target, like.st_uid, like.st_gid)
            disk.sync(target, "demote: sync database")
        finally:
            os.close(target)
        folder.finish_generation(generation, source.page_size, position)
    except BaseException:
        disk.remove_tree(folder.generation_path(generation), "generation: give up")
        raise


# --- setting aside


def free_name(path: Path) -> Path:
    """*path*, or with a number after it if that exists."""
    return next(name for name in _names(path) if not name.exists())


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in range(2, 1_000_000):
        yield path.with_name(f"{path.name}-{number}")


def place_of(files: WalFiles) -> tuple[int, int, int]:
    """Salts and frames of its log, as a WalInfo has them."""
    state = files.log_state
    if state is None:
        return 0, 0, 0
    return int.from_bytes(state.salts[:4], "big"), int.from_bytes(state.salts[4:], "big"), state.frames


def set_aside(folder: Folder, live: Path, target: Path, seen: WalInfo | None = None) -> Aside:
    """See ``Replica.set_aside``. Raises DatabaseError if somebody reads from the log for too long."""
    if not live.exists():
        raise DatabaseError(f"{live} does not exist")
    files, as_seen = _merge_log(live, seen)
    try:
        target = free_name(target)
        state = folder.state
        folder.save(msgspec.structs.replace(state, role="setting-aside", live=str(live), target=str(target)))
        disk.rename(live, target, "set aside: move")
        disk.sync_folder(target.parent, "set aside: sync target")
        finish(folder)
    finally:
        if files is not None:
            files.close()
    return Aside(str(target), target.stat().st_size, as_seen)


def _finish_setting_aside(folder: Folder, state: State) -> None:
    live = Path(state.live)
    if live.exists():
        # It was not moved, and may have been written to since: as if nothing had happened.
        folder.save(msgspec.structs.replace(state, role="live", target=""))
        return
    for path in (wal_path(live), index_path(live)):
        disk.unlink(path, "set aside: remove log")
    disk.sync_folder(live.parent, "set aside: sync folder")
    folder.save(State(generation=state.generation))


def _merge_log(live: Path, seen: WalInfo | None) -> tuple[WalFiles | None, bool]:
    """Put all that was committed into the one file; whether its log was as *seen*.

    It stays locked while what is returned is open.
    """
    if live.stat().st_size == 0:
        return None, True
    if not is_wal_database(live):
        _roll_back(live)
        return None, True
    files = WalFiles.open(live)
    try:
        as_seen = seen is None or place_of(files) == (seen.salt1, seen.salt2, seen.frames)
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        while not files.checkpoint():
            if time.monotonic() >= deadline:
                raise DatabaseError(f"{live} is being read: its log cannot be merged", "end its readers")
            time.sleep(_POLL_SECONDS)
    except BaseException:
        files.close()
        raise
    return files, as_seen


def _roll_back(live: Path) -> None:
    """What a killed program has left in a rollback journal belongs to the file."""
    import sqlite3

    try:
        connection = sqlite3.connect(live, timeout=CHECKPOINT_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        log.warning("%s is set aside as it is: %s", live, error)

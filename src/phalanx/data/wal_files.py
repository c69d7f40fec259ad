"""A database in WAL mode that this process alone writes: its three files, their locks, and their index.

It is written the way SQLite's own writer does it (wal.c), so that ordinary connections of other processes
read on meanwhile and see each transaction entirely or not at all. The write lock is held for as long as the
files are open: whoever else tries to write gets SQLITE_BUSY.

The locks (``data.file_locks``) exclude SQLite's own.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote

from phalanx.data import disk
from phalanx.data.file_locks import EXCLUSIVE, NONE, SHARED, set_lock
from phalanx.data.sqlite_wal import (
    ALIVE_LOCK,
    CHECKPOINT_LOCK,
    INDEX_HEADER_BYTES,
    INDEX_PIECE_BYTES,
    READ_LOCK,
    READERS,
    WAL_HEADER_BYTES,
    WRITE_LOCK,
    Frame,
    IndexHeader,
    Marks,
    Table,
    WalHeader,
    decode_index_header,
    decode_wal_header,
    encode_frame,
    encode_wal_header,
    frame_offset,
    piece_of,
    valid_frames,
)
from phalanx.errors import DatabaseError

LOCK_SECONDS = 5.0
"""How long a lock is waited for that others hold for moments only."""

LARGE_WAL_BYTES = 64 << 20
"""A log that was longer is cut off when it is begun anew."""

_POLL_SECONDS = 0.001
_WRITE_BYTES = 1 << 20
# os_unix.c: the bytes of the database file that SQLite locks.
_SHARED_FIRST, _SHARED_BYTES = 0x40000002, 510
_NO_SALTS = bytes(8)


class LogState(NamedTuple):
    """The state of a log: its salts, how many frames count, and the checksum over all of them.

    No two different contents have the same. Without frames the checksum is 0, 0.
    """

    salts: bytes
    frames: int
    checksum: tuple[int, int]


class Transaction(NamedTuple):
    """Encoded frames, the page of each, and the state of the log once they are there."""

    data: bytearray
    pages: list[int]
    commit: int
    after: LogState
    big_endian: bool


class NumberedPage(Protocol):
    """A page of a database; numbers count from 1."""

    @property
    def number(self) -> int: ...
    @property
    def data(self) -> bytes: ...


def is_wal_database(path: Path) -> bool:
    """Whether the file says of itself that it is a database in WAL mode. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(100)
    return len(head) == 100 and head.startswith(b"SQLite format 3\0") and head[18:20] == b"\2\2"


def page_size_of(head: bytes) -> int:
    """What the first bytes of a database say about the size of its pages."""
    size = int.from_bytes(head[16:18], "big")
    return 65536 if size == 1 else size


def wal_path(path: Path) -> Path:
    """Where the log of the database at *path* is."""
    return path.with_name(f"{path.name}-wal")


def index_path(path: Path) -> Path:
    """Where the index of that log is."""
    return path.with_name(f"{path.name}-shm")


def new_salts(old: bytes | None = None) -> bytes:
    """For a new log: the first one counts on, the second one is random."""
    first = secrets.randbits(32) if old is None else int.from_bytes(old[:4], "big") + 1 & 0xFFFFFFFF
    return first.to_bytes(4, "big") + secrets.token_bytes(4)


def scan_wal(path: Path) -> tuple[WalHeader | None, Iterator[Frame]]:
    """The header of the log at *path* and its valid frames, as SQLite would recover them."""
    try:
        with path.open("rb") as file:
            header = decode_wal_header(file.read(WAL_HEADER_BYTES))
    except FileNotFoundError:
        header = None
    return header, valid_frames(header, _frames(path, header.page_size)) if header else iter(())


def _frames(path: Path, page_size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(WAL_HEADER_BYTES)
        while frame := file.read(page_size + 24):
            yield frame


class WalFiles:
    """The files of one database; see the module. Not for several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._shown = self._state = IndexHeader(0, False, 0, 0, 0, (0, 0), _NO_SALTS)
        self._log_header: WalHeader | None = None
        self.is_synced = False
        """Whether the disk has all frames that count."""

    @classmethod
    def open(cls, path: Path) -> WalFiles:
        """Open it, recover its log, take the write lock.

        Raises DatabaseError: it is no database, or others write to it all the time; OSError.
        """
        files = cls(path)
        try:
            files._attach(time.monotonic() + LOCK_SECONDS)
        except BaseException:
            files.close()
            raise
        return files

    def close(self) -> None:
        """Let go of the files and all locks. Twice is harmless."""
        self._maps.clear()
        while self._descriptors:
            os.close(self._descriptors.pop())

    # --- opening

    def _open_file(self, path: Path, like: os.stat_result | None = None) -> int:
        """Open it; made with the owner and mode of *like* if it does not exist, as SQLite does."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if like is None:
                raise
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, like.st_mode & 0o777)
            if os.geteuid() == 0:
                os.fchown(descriptor, like.st_uid, like.st_gid)
        self._descriptors.append(descriptor)
        return descriptor

    def _attach(self, deadline: float) -> None:
        self._db = self._open_file(self.path)
        # As every connection in WAL mode has it: nobody else removes the log as "the last one" then.
        self._wait_for(self._db, _SHARED_FIRST, _SHARED_BYTES, SHARED, deadline)
        status = os.fstat(self._db)
        self._log = self._open_file(wal_path(self.path), status)
        self._index = self._open_file(index_path(self.path), status)
        if set_lock(self._index, ALIVE_LOCK, 1, EXCLUSIVE):
            # Nobody is alive who has it in use: what it says may be of another boot.
            disk.truncate(self._index, 0, "index: cut off")
        self._wait_for(self._index, ALIVE_LOCK, 1, SHARED, deadline)
        while True:
            header = self._read_header()
            if header is None:
                self._recover(deadline)
            self._wait_for(self._index, WRITE_LOCK, 1, EXCLUSIVE, deadline)
            header = self._read_header()
            if header is not None:
                break
            set_lock(self._index, WRITE_LOCK, 1, NONE)
            if time.monotonic() >= deadline:
                raise DatabaseError(f"{index_path(self.path)} cannot be recovered")
        self._log_header = decode_wal_header(os.pread(self._log, WAL_HEADER_BYTES, 0))
        self._use(header)

    def _use(self, header: IndexHeader) -> None:
        """Take over what the index says. An empty log may leave it to the files."""
        self._shown = header
        if header.frames == 0:
            page_size = page_size_of(os.pread(self._db, 100, 0))
            salts = header.salts
            if salts == _NO_SALTS and self._log_header is not None:
                salts = self._log_header.salts
            commit = os.fstat(self._db).st_size // page_size if page_size else 0
            header = header._replace(page_size=page_size, commit=commit, salts=salts)
        self._state = header

    def _recover(self, deadline: float) -> None:
        """Have SQLite read the log: it does so a hundred times as fast as this module could."""
        import sqlite3

        address = f"file:{quote(str(self.path))}?mode=ro"
        timeout = max(0.1, deadline - time.monotonic())
        try:
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=timeout)) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error as error:
            raise DatabaseError(f"{self.path} cannot be read: {error}") from error

    def _wait_for(self, descriptor: int, start: int, count: int, kind: int, deadline: float) -> None:
        while not set_lock(descriptor, start, count, kind):
            if time.monotonic() >= deadline:
                raise DatabaseError(f"{self.path} is locked by another process", "end what writes to it")
            time.sleep(_POLL_SECONDS)

    # --- what it is

    @property
    def page_size(self) -> int:
        """In bytes."""
        return self._state.page_size

    @property
    def commit(self) -> int:
        """The size of the database, in pages."""
        return self._state.commit

    @property
    def frames(self) -> int:
        """How many frames of the log count."""
        return self._state.frames

    @property
    def log_state(self) -> LogState | None:
        """What the log is; None if there is none."""
        state = self._state
        if state.salts == _NO_SALTS:
            return None
        return LogState(state.salts, state.frames, state.checksum if state.frames else (0, 0))

    @property
    def backfilled(self) -> int:
        """How many frames are in the database file already."""
        return self._marks.backfilled

    @property
    def log_end(self) -> int:
        """Where the last frame that counts ends in the log, in bytes."""
        return frame_offset(self.frames + 1, self.page_size)

    # --- the index

    def _memory(self, pieces: int) -> memoryview:
        """The index, at least *pieces* long."""
        size = pieces * INDEX_PIECE_BYTES
        if not self._maps or len(self._maps[-1]) < size:
            if os.fstat(self._index).st_size < size:
                disk.extend(self._index, size, "index: grow")
            # The older maps stay: views of them may be in use, and they are the same memory.
            self._maps.append(mmap.mmap(self._index, size))
        return memoryview(self._maps[-1])

    @property
    def _marks(self) -> Marks:
        return Marks(self._memory(1))

    def _read_header(self) -> IndexHeader | None:
        memory = self._memory(1)
        first = bytes(memory[:INDEX_HEADER_BYTES])
        self._barrier()
        second = bytes(memory[INDEX_HEADER_BYTES : 2 * INDEX_HEADER_BYTES])
        return decode_index_header(first) if first == second else None

    def _publish(self, header: IndexHeader) -> None:
        """Show the new state to readers: the second copy, then the first, which they read first."""
        memory, data = self._memory(1), header.encode()
        disk.on_step("index: second header")
        memory[INDEX_HEADER_BYTES : 2 * INDEX_HEADER_BYTES] = data
        self._barrier()
        disk.on_step("index: first header")
        memory[:INDEX_HEADER_BYTES] = data
        self._shown = self._state = header

    def _barrier(self) -> None:
        # A system call for which Python lets go of its global lock: two full barriers.
        os.lseek(self._log, 0, os.SEEK_CUR)

    def _check_undisturbed(self) -> None:
        """Raises DatabaseError if somebody else wrote, in spite of the lock."""
        if self._read_header() != self._shown:
            raise DatabaseError(f"{self.path} was written to by another process")

    # --- writing

    def try_restart(self, note: Callable[[LogState], None]) -> bool:
        """Begin the log anew, if all of it is in the database file and nobody reads from it.

        *note* is called with its new state before anything changes, and must put that on the disk.
        """
        state = self._state
        if not state.frames or self._marks.backfilled != state.frames:
            return False
        self._check_undisturbed()
        if not set_lock(self._index, READ_LOCK + 1, READERS - 1, EXCLUSIVE):
            return False
        try:
            salts = new_salts(state.salts)
            note(LogState(salts, 0, (0, 0)))
            self._publish(state._replace(frames=0, salts=salts))
            self._marks.restart()
            self._write_log_header()
            if os.fstat(self._log).st_size > LARGE_WAL_BYTES:
                disk.truncate(self._log, WAL_HEADER_BYTES, "wal: cut off")
        finally:
            set_lock(self._index, READ_LOCK + 1, READERS - 1, NONE)
        return True

    def _write_log_header(self) -> WalHeader:
        number = self._log_header.number + 1 if self._log_header else 0
        data = encode_wal_header(self.page_size, number, self._state.salts)
        disk.write_at(self._log, data, 0, "wal: header")
        # Frames that reach the disk before it would leave the old log with a part of the new one.
        disk.sync(self._log, "wal: sync header")
        header = decode_wal_header(data)
        assert header is not None
        self._log_header = header
        return header

    def prepare(self, pages: Iterable[NumberedPage], commit: int) -> Transaction:
        """A transaction: *pages* are as given, at least one, and the database has *commit* pages then.

        Raises DatabaseError if others have written; what *pages* raises.
        """
        self._check_undisturbed()
        state, data, numbers = self._state, bytearray(), list[int]()
        big_endian, (s0, s1) = self._begin_frames()
        previous: NumberedPage | None = None
        for page in pages:
            if previous is not None:
                s0, s1 = _add_frame(data, previous, 0, state.salts, s0, s1, big_endian)
            numbers.append(page.number)
            previous = page
        if previous is None:
            raise ValueError("a transaction without a page")
        s0, s1 = _add_frame(data, previous, commit, state.salts, s0, s1, big_endian)
        after = LogState(state.salts, state.frames + len(numbers), (s0, s1))
        return Transaction(data, numbers, commit, after, big_endian)

    def _begin_frames(self) -> tuple[bool, tuple[int, int]]:
        """Byte order of the checksums, and the one that the next frame goes on from."""
        state, header = self._state, self._log_header
        if state.frames:
            return state.big_endian, state.checksum
        if header is None or header.salts != state.salts:
            header = self._write_log_header()
        return header.big_endian, header.checksum

    def append(self, transaction: Transaction) -> None:
        """Write what was prepared, and show it to readers. Raises OSError: nothing of it counts then."""
        state, after = self._state, transaction.after
        self.is_synced = False
        view, offset = memoryview(transaction.data), frame_offset(state.frames + 1, state.page_size)
        for at in range(0, len(view), _WRITE_BYTES):
            disk.write_at(self._log, view[at : at + _WRITE_BYTES], offset + at, "wal: frames")
        self._index_frames(transaction.pages, state.frames)
        self._publish(
            state._replace(
                change=state.change + 1,
                big_endian=transaction.big_endian,
                frames=after.frames,
                commit=transaction.commit,
                checksum=after.checksum,
            )
        )

    def _index_frames(self, pages: Sequence[int], before: int) -> None:
        disk.on_step("index: tables")
        memory = self._memory(piece_of(before + len(pages)) + 1)
        table: Table | None = None
        for frame, page in enumerate(pages, before + 1):
            if table is None or frame > table.before + table.count:
                table = Table(memory, piece_of(frame))
                table.prepare(before)
            table.add(frame, page)

    def sync(self) -> None:
        """Have the disk hold the log."""
        if not self.is_synced:
            disk.sync(self._log, "wal: sync")
            self.is_synced = True

    # --- reading

    def _latest(self, first: int, last: int) -> dict[int, int]:
        """The last of the frames *first* to *last* that each page has."""
        latest: dict[int, int] = {}
        if first > last:
            return latest
        memory = self._memory(piece_of(last) + 1)
        for piece in range(piece_of(first), piece_of(last) + 1):
            table = Table(memory, piece)
            begin = max(first, table.before + 1)
            end = min(last, table.before + table.count)
            numbers = table.numbers[begin - table.before - 1 : end - table.before]
            latest.update(zip(numbers.tolist(), range(begin, end + 1), strict=True))
        return latest

    def newer_pages(self, after: int | None = None) -> dict[int, int]:
        """The frame of each page that the log has newer than the database file (or after frame *after*)."""
        return self._latest((self.backfilled if after is None else after) + 1, self.frames)

    def read_frame(self, frame: int) -> bytes:
        """The page of *frame*."""
        return os.pread(self._log, self.page_size, frame_offset(frame, self.page_size) + 24)

    def read_page(self, number: int) -> bytes:
        """A page as it is now."""
        frame = self.newer_pages().get(number)
        if frame is not None:
            return self.read_frame(frame)
        return os.pread(self._db, self.page_size, (number - 1) * self.page_size)

    def chunks(self) -> Iterator[bytes]:
        """The database as it is now, from beginning to end."""
        newer, size = self.newer_pages(), self.page_size
        step = max(1, _WRITE_BYTES // size)
        for first in range(1, self.commit + 1, step):
            count = min(step, self.commit + 1 - first)
            chunk = bytearray(os.pread(self._db, count * size, (first - 1) * size))
            chunk += bytes(count * size - len(chunk))
            for number in range(first, first + count):
                if (frame := newer.get(number)) is not None:
                    begin = (number - first) * size
                    chunk[begin : begin + size] = self.read_frame(frame)
            yield bytes(chunk)

    def copy_to(self, target: int, label: str) -> None:
        """Write the database as it is now into the empty file *target*."""
        # What others move from the log into the file meanwhile is written from the log here as well.
        newer, size = self.newer_pages(), self.page_size
        disk.copy(self._db, target, min(os.fstat(self._db).st_size, self.commit * size), label)
        for number, frame in sorted(newer.items()):
            if number <= self.commit:
                disk.write_at(target, self.read_frame(frame), (number - 1) * size, label)
        disk.truncate(target, self.commit * size, label)

    # --- into the database file

    def checkpoint(self, before: Callable[[], None] = lambda: None) -> bool:
        """Move what no reader needs from the log into the database file; whether that is all of it.

        *before* is called before the log is synced: what explains it must be on the disk first.
        """
        marks = self._marks
        if marks.backfilled >= self.frames:
            return True
        if not set_lock(self._index, CHECKPOINT_LOCK, 1, EXCLUSIVE):
            return False
        try:
            safe = self._safe_frames(marks)
            if safe <= marks.backfilled or not set_lock(self._index, READ_LOCK, 1, EXCLUSIVE):
                return False
            try:
                before()
                self._backfill(marks, safe)
            finally:
                set_lock(self._index, READ_LOCK, 1, NONE)
        finally:
            set_lock(self._index, CHECKPOINT_LOCK, 1, NONE)
        return safe == self.frames

    def _safe_frames(self, marks: Marks) -> int:
        """How many frames no reader misses in the log. Marks that nobody uses are moved away."""
        safe = self.frames
        for slot in range(1, READERS):
            mark = marks.reader(slot)
            if safe <= mark:
                continue
            if set_lock(self._index, READ_LOCK + slot, 1, EXCLUSIVE):
                marks.set_reader(slot, safe if slot == 1 else None)
                set_lock(self._index, READ_LOCK + slot, 1, NONE)
            else:
                safe = mark
        return safe

    def _backfill(self, marks: Marks, safe: int) -> None:
        done, size = marks.backfilled, self.page_size
        marks.attempted = safe
        self.sync()
        for number, frame in sorted(self._latest(done + 1, safe).items()):
            if number <= self.commit:
                disk.write_at(self._db, self.read_frame(frame), (number - 1) * size, "db: page")
        if safe == self.frames:
            disk.truncate(self._db, self.commit * size, "db: size")
            disk.sync(self._db, "db: sync")
        disk.on_step("index: backfilled")
        marks.backfilled = safe


def _add_frame(
    data: bytearray, page: NumberedPage, commit: int, salts: bytes, s0: int, s1: int, big_endian: bool
) -> tuple[int, int]:
    head, s0, s1 = encode_frame(page.number, page.data, commit, salts, s0, s1, big_endian)
    data += head
    data += page.data
    return s0, s1

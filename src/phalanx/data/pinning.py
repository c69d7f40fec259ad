"""A SQLite database in WAL mode as it was at one moment, read while others go on writing it.

A read transaction of an ordinary connection holds the moment: no checkpoint may overwrite what it needs
(sqlite.org/walformat.html, "WAL locks"). The pages are then read by hand, from the main file and over it the
frames of the WAL up to that moment.

For short-lived processes only: descriptors of database files are opened beside SQLite's own. POSIX locks
belong to the process and end when it closes *any* descriptor of the file, so nothing is closed before the
connection is.
"""

from __future__ import annotations

import os
import sqlite3
import struct
import sys
import time
from array import array
from pathlib import Path
from types import TracebackType

from phalanx.data import ltx
from phalanx.data.sqlite_wal import (
    FRAME_HEADER_BYTES,
    INDEX_HEADER_BYTES,
    WAL_HEADER_BYTES,
    IndexHeader,
    decode_index_header,
    decode_wal_header,
    frame_offset,
)
from phalanx.errors import DatabaseError

_NO_SALTS = bytes(8)
_BACKFILLED_AT = 2 * INDEX_HEADER_BYTES
_FRAME_BEGIN = struct.Struct(">II8s")
"""Of a frame's header: page number, size of the database, salts."""

_ATTEMPTS = 500
_PAUSE_SECONDS = 0.002
"""The index is being written for microseconds, a loaded machine may make that longer."""


class PinnedDatabase:
    """A consistent view of the database *path*, from the constructor to :meth:`close`.

    ``state``: what the index said at that moment; its salts and number of frames name the moment.

    Raises DatabaseError when it is no database in WAL mode, sqlite3.Error and OSError.
    """

    def __init__(self, path: Path) -> None:
        self._fds: list[int] = []
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None
        )
        try:
            self.state, self._backfilled = self._pin(path)
            self._frame_of = self._index_frames()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PinnedDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the read transaction. Twice is harmless."""
        self._connection.close()
        while self._fds:
            os.close(self._fds.pop())

    def _pin(self, path: Path) -> tuple[IndexHeader, int]:
        execute = self._connection.execute
        (mode,) = execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            raise DatabaseError(f"{path} is in journal mode {mode}, not in WAL mode")
        self._main = self._open(path)
        self._wal = self._open(Path(f"{path}-wal"))
        shm = self._open(Path(f"{path}-shm"))
        if not os.path.samestat(os.stat(path), os.fstat(self._main)):
            raise DatabaseError(f"{path} was replaced meanwhile")
        execute("BEGIN")
        execute("SELECT count(*) FROM sqlite_schema").fetchone()
        # What the index says now holds for as long as the transaction does, also if others have committed
        # since it began. Either it has a mark in the WAL: then no frame after the mark is moved into the main
        # file, and the WAL is not begun anew. Or all of the WAL was in the main file: then nothing at all is
        # moved there, and so the WAL, even if it is begun anew, is so only once.
        for _ in range(_ATTEMPTS):
            if (found := _read_index(shm)) is not None:
                header, backfilled = found
                return self._completed(header), backfilled
            time.sleep(_PAUSE_SECONDS)
        raise DatabaseError(f"the index of the WAL of {path} is not valid")

    def _completed(self, header: IndexHeader) -> IndexHeader:
        """The index of a WAL that has never had a frame says nothing of it: the files themselves do."""
        if header.frames:
            return header
        salts = header.salts
        if salts == _NO_SALTS and (log := decode_wal_header(os.pread(self._wal, WAL_HEADER_BYTES, 0))):
            salts = log.salts
        page_size, commit = header.page_size, header.commit
        if not commit:
            size = int.from_bytes(os.pread(self._main, 2, 16), "big")
            page_size = 65536 if size == 1 else size
            if not ltx.is_page_size(page_size):
                raise DatabaseError(f"a database with pages of {page_size} bytes")
            commit = os.fstat(self._main).st_size // page_size
        return header._replace(page_size=page_size, commit=commit, salts=salts)

    def _open(self, path: Path) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def _index_frames(self) -> array[int] | None:
        """For each page the last frame that has it (counted from 1), 0 where the main file has it.

        None: the main file has everything. It takes 4 bytes a page, whatever the size of the WAL.
        """
        state = self.state
        if self._backfilled >= state.frames:
            return None
        frame_of = array("I", bytes(4 * (state.commit + 1)))
        for frame in range(1, state.frames + 1):
            head = os.pread(self._wal, _FRAME_BEGIN.size, frame_offset(frame, state.page_size))
            if len(head) < _FRAME_BEGIN.size:
                raise DatabaseError(f"the WAL ends before frame {frame} of {state.frames}")
            number, _, salts = _FRAME_BEGIN.unpack(head)
            if salts != state.salts:
                raise DatabaseError(f"frame {frame} of the WAL is of another time")
            if number <= state.commit:
                frame_of[number] = frame
        return frame_of

    @property
    def size_bytes(self) -> int:
        """Of the database."""
        return self.state.commit * self.state.page_size

    def read(self, first: int, count: int) -> bytes:
        """*count* pages from page *first* on (from 1), as of the moment. Raises DatabaseError, OSError."""
        size = self.state.page_size
        data = os.pread(self._main, count * size, (first - 1) * size)
        missing = count * size - len(data)
        frames = self._frame_of[first : first + count] if self._frame_of is not None else ()
        if not missing and not any(frames):
            return data
        pages = bytearray(data)
        pages += bytes(missing)
        for place, frame in enumerate(frames):
            if frame:
                at = frame_offset(frame, size) + FRAME_HEADER_BYTES
                pages[place * size : (place + 1) * size] = self._read_exactly(at)
        for number in range(first + len(data) // size, first + count):
            if number != ltx.lock_page(size) and not (frames and frames[number - first]):
                raise DatabaseError(f"page {number} of {self.state.commit} is missing")
        return bytes(pages)

    def _read_exactly(self, at: int) -> bytes:
        page = os.pread(self._wal, self.state.page_size, at)
        if len(page) < self.state.page_size:
            raise DatabaseError(f"the WAL ends at byte {at + len(page)}")
        return page


def _read_index(shm: int) -> tuple[IndexHeader, int] | None:
    """The state, and how many frames are in the main file; None while it is being written."""
    data = os.pread(shm, _BACKFILLED_AT + 4, 0)
    copy = data[:INDEX_HEADER_BYTES]
    if len(data) < _BACKFILLED_AT + 4 or data[INDEX_HEADER_BYTES:_BACKFILLED_AT] != copy:
        return None
    header = decode_index_header(copy)
    return (header, int.from_bytes(data[_BACKFILLED_AT:], sys.byteorder)) if header is not None else None

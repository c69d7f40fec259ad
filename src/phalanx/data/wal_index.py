"""The index of a database's WAL, read from outside: how far it is committed, and who uses it.

SQLite's connections go by the index, not by what the ``-wal`` file holds (https://sqlite.org/walformat.html,
section 2). It is only read here, and no lock is taken.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from phalanx.data.file_locks import is_locked
from phalanx.data.sqlite_wal import ALIVE_LOCK, INDEX_HEADER_BYTES, WRITE_LOCK, decode_index_header

_ATTEMPTS = 100

_descriptors: dict[tuple[int, int], int] = {}
"""Of each index and database that was ever looked at, by device and inode. They are not closed while the file
is there: this would drop the locks of all of this process's connections to that database."""


class Mark(NamedTuple):
    """How far a WAL is committed: its salts as in its header, and the number of frames."""

    salt1: int
    salt2: int
    frames: int


class WalIndex:
    """The index of one database. It is only read."""

    def __init__(self, live: Path) -> None:
        self._path = live.with_name(f"{live.name}-shm")

    def look(self) -> Mark | None:
        """What is committed now; None where there is no index, or none that is in use yet."""
        descriptor = self._descriptor()
        if descriptor is None:
            return None
        for _ in range(_ATTEMPTS):
            # A writer sets the second copy first: both are equal but for some nanoseconds.
            data = os.pread(descriptor, 2 * INDEX_HEADER_BYTES, 0)
            if len(data) < 2 * INDEX_HEADER_BYTES:
                return None
            if data[:INDEX_HEADER_BYTES] == data[INDEX_HEADER_BYTES:]:
                header = decode_index_header(data[:INDEX_HEADER_BYTES])
                if header is None:
                    return None
                salts = header.salts
                return Mark(int.from_bytes(salts[:4], "big"), int.from_bytes(salts[4:], "big"), header.frames)
        return None

    def is_being_written(self) -> bool:
        """Whether some connection, in whatever process, is in a write transaction. (Where the system cannot
        tell of this process's own connections, those are overlooked.)"""
        descriptor = self._descriptor()
        if descriptor is None:
            return False
        return is_locked(descriptor, WRITE_LOCK)

    def is_in_use(self) -> bool:
        """Whether some connection is there: nobody makes the index anew from the WAL then. (Again without
        those of this process, where the system cannot tell.)"""
        descriptor = self._descriptor()
        return descriptor is not None and is_locked(descriptor, ALIVE_LOCK)

    def _descriptor(self) -> int | None:
        try:
            return open_for_good(self._path)
        except OSError:
            return None


def open_for_good(path: Path) -> int:
    """A descriptor to read the file at *path* by, which nobody may close. Raises OSError."""
    status = os.stat(path)
    if (known := _descriptors.get((status.st_dev, status.st_ino))) is not None:
        return known
    close_removed()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    # Should it be known after all, this one stays open, too: closing it would drop locks.
    return _descriptors.setdefault((status.st_dev, status.st_ino), descriptor)


def close_removed() -> None:
    """Let go of the files that are no longer in any folder. For when a database has been closed."""
    for key, descriptor in list(_descriptors.items()):
        if os.fstat(descriptor).st_nlink == 0:
            del _descriptors[key]
            os.close(descriptor)

"""What a database's programs have committed, by its wal-index; and whether captured files hold just that.

Litestream reads the ``-wal`` file: every frame with a good checksum, up to the last one that ends a
transaction. SQLite's connections go by the wal-index instead, which a program sets only after its frames are
written (wal.c, sqlite3WalFrames, walIndexWriteHdr). A program that is killed between the two leaves a
*phantom*: frames of a transaction that was never committed, and that the next writer overwrites. As long as
somebody has the database open, and we have, nobody recovers the index from them. Litestream, however, has
captured them; it stands at a place behind the end of what is committed, and says of each commit up to there
that it has it.

So nothing captured is accepted before the index has it, and a barrier is answered only once the captured
place has reached what the index said when it was asked for.

Frames up to the index's last one are never overwritten in the same WAL. What was beyond it when Litestream
may have read needs a second look, since a phantom can be overwritten meanwhile: then the pages in the WAL are
others than those in the file.
"""

from __future__ import annotations

import fcntl
import os
import struct
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from phalanx.data import ltx
from phalanx.data.records import WalPlace
from phalanx.data.sqlite_wal import (
    FRAME_HEADER_BYTES,
    INDEX_HEADER_BYTES,
    WAL_HEADER_BYTES,
    WRITE_LOCK,
    decode_index_header,
    frame_offset,
)

COMPARED_FRAMES = 64
"""So many frames at the end of a file are compared. Who overwrites a phantom has written all frames up to
there, so that one would do but for transactions that end in just the same pages."""

_ATTEMPTS = 100
_FRAME_BEGIN = struct.Struct(">II8s")
_FLOCK = struct.Struct("@hhqqi4x")
_GET_LOCK = getattr(fcntl, "F_OFD_GETLK", fcntl.F_GETLK)

_descriptors: dict[tuple[int, int], int] = {}
"""Of each wal-index that was ever looked at, by device and inode. They are not closed while the file is
there: this would drop the locks of all of this process's connections to that database."""


class Mark(NamedTuple):
    """How far a WAL is committed: its salts as in its header, and the number of frames."""

    salt1: int
    salt2: int
    frames: int

    def is_of(self, place: WalPlace) -> bool:
        """Whether both are of the same WAL."""
        return (self.salt1, self.salt2) == (place.salt1, place.salt2)


class Verdict(Enum):
    """What a captured file is."""

    COMMITTED = "committed"
    IN_DOUBT = "in doubt"
    """A program is in the middle of its commit."""
    PHANTOM = "phantom"
    """Its last transaction was never committed."""


class WalIndex:
    """The index of one database. It is only read."""

    def __init__(self, live: Path) -> None:
        self._path = live.with_name(f"{live.name}-shm")
        self._wal = live.with_name(f"{live.name}-wal")

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
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, WRITE_LOCK, 1, 0)
        return _FLOCK.unpack(fcntl.fcntl(descriptor, _GET_LOCK, question))[0] != fcntl.F_UNLCK

    def _descriptor(self) -> int | None:
        try:
            status = os.stat(self._path)
            if (known := _descriptors.get((status.st_dev, status.st_ino))) is not None:
                return known
            close_removed()
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(descriptor)
        except OSError:
            return None
        # Should it be known after all, this one stays open, too: closing it would drop locks.
        return _descriptors.setdefault((status.st_dev, status.st_ino), descriptor)

    # --- what was captured

    def judge(self, file: Path, before: Mark | None) -> Verdict:
        """What the captured *file* is. *before*: what was committed when Litestream had not read it yet.

        COMMITTED also where it cannot be told any more: the WAL has been begun anew, which happens only when
        all that is committed in it is in the database. Blocks for some ms at most. Raises OSError, LtxError.
        """
        with file.open("rb") as source:
            header = ltx.decode_header(source.read(ltx.HEADER_BYTES))
        place = WalPlace(
            header.wal_salt1, header.wal_salt2, header.wal_offset + header.wal_size, header.page_size
        )
        now = self.look()
        if now is None or not now.is_of(place):
            return Verdict.COMMITTED
        last = frames_at(place)
        if last > now.frames:
            if self.is_being_written():
                return Verdict.IN_DOUBT
            # Whoever has written it set the index before it let go of the lock, unless it was killed.
            now = self.look()
            if now is not None and now.is_of(place) and last > now.frames:
                return Verdict.PHANTOM
        certain = before.frames if before is not None and before.is_of(place) else 0
        begin = (header.wal_offset - WAL_HEADER_BYTES) // (FRAME_HEADER_BYTES + header.page_size)
        first = max(certain, begin, last - COMPARED_FRAMES) + 1
        if first <= last and not self._is_as_captured(file, header, first, last):
            return Verdict.PHANTOM
        return Verdict.COMMITTED

    def _is_as_captured(self, file: Path, header: ltx.Header, first: int, last: int) -> bool:
        """Whether the frames from *first* to *last*, the last one of the file, are still those in *file*."""
        size = header.page_size
        with self._wal.open("rb", buffering=0) as wal:  # no lock of SQLite is on that one
            frames = os.pread(
                wal.fileno(), (last - first + 1) * (FRAME_HEADER_BYTES + size), frame_offset(first, size)
            )
        salts = header.wal_salt1.to_bytes(4, "big") + header.wal_salt2.to_bytes(4, "big")
        pages: dict[int, bytes] = {}
        for at in range(0, len(frames), FRAME_HEADER_BYTES + size):
            number, commit, found = _FRAME_BEGIN.unpack_from(frames, at)
            if found != salts:
                return True  # begun anew just now; see above
            data = frames[at + FRAME_HEADER_BYTES : at + FRAME_HEADER_BYTES + size]
            pages[number] = data
        if not commit:  # pyright: ignore[reportPossiblyUnboundVariable]
            return False
        # Pages behind the end of the database are not in the file (a VACUUM wrote them before it cut it off).
        wanted = {number for number in pages if number <= header.commit}
        captured = ltx.read_pages(file, wanted)
        return all(captured.get(number) == pages[number] for number in wanted)

    def covers(self, end: WalPlace | None, mark: Mark | None) -> bool:
        """Whether what is captured, up to *end*, has all that was committed at *mark*."""
        if end is None or mark is None or mark.frames == 0:
            return True
        if mark.is_of(end):
            return frames_at(end) >= mark.frames
        # SQLite counts the first salt up with each new beginning (wal.c, walRestartHdr).
        return 0 < (end.salt1 - mark.salt1) & 0xFFFFFFFF < 1 << 31


def frames_at(place: WalPlace) -> int:
    """How many frames there are up to *place*."""
    return (place.offset - WAL_HEADER_BYTES) // (FRAME_HEADER_BYTES + place.page_size)


def close_removed() -> None:
    """Let go of the indexes that are no longer in any folder. For when a database has been closed."""
    for key, descriptor in list(_descriptors.items()):
        if os.fstat(descriptor).st_nlink == 0:
            del _descriptors[key]
            os.close(descriptor)

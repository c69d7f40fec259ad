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
others than those in the file. And where the WAL has been begun anew since, by a checkpoint of Litestream's
own, it is the database that has other pages.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from phalanx.data import ltx
from phalanx.data.records import WalPlace
from phalanx.data.sqlite_wal import FRAME_HEADER_BYTES, WAL_HEADER_BYTES, frame_offset
from phalanx.data.wal_index import Mark, WalIndex, open_for_good

COMPARED_FRAMES = 64
"""So many frames at the end of a file are compared. Who overwrites a phantom has written all frames up to
there, so that one would do but for transactions that end in just the same pages."""

_FRAME_BEGIN = struct.Struct(">II8s")


class Verdict(Enum):
    """What a captured file is."""

    COMMITTED = "committed"
    IN_DOUBT = "in doubt"
    """A program is in the middle of its commit."""
    TO_COMPARE = "to compare"
    """It reaches beyond what was known to be committed, and its WAL has been begun anew: is_in_database."""
    PHANTOM = "phantom"
    """Its last transaction was never committed."""


class Committed:
    """Looks at what was captured of one live database."""

    def __init__(self, live: Path) -> None:
        self._live, self._wal, self._index = live, live.with_name(f"{live.name}-wal"), WalIndex(live)

    def mark(self) -> Mark | None:
        """What is committed now; None where there is no index yet."""
        return self._index.look()

    def judge(self, file: Path, before: Mark | None) -> Verdict:
        """What the captured *file* is. *before*: what was committed when Litestream had not read it yet.

        Blocks for some ms at most. Raises OSError, LtxError.
        """
        with file.open("rb") as source:
            header = ltx.decode_header(source.read(ltx.HEADER_BYTES))
        place = WalPlace(
            header.wal_salt1, header.wal_salt2, header.wal_offset + header.wal_size, header.page_size
        )
        now, last = self._index.look(), frames_at(place)
        certain = before.frames if before is not None and is_of(before, place) else 0
        if now is None or last <= certain:
            return Verdict.COMMITTED
        if not is_of(now, place):
            return Verdict.TO_COMPARE
        if last > now.frames:
            if self._index.is_being_written():
                return Verdict.IN_DOUBT
            # Whoever has written it set the index before it let go of the lock, unless it was killed.
            now = self._index.look()
            if now is not None and is_of(now, place) and last > now.frames:
                return Verdict.PHANTOM
        begin = (header.wal_offset - WAL_HEADER_BYTES) // (FRAME_HEADER_BYTES + header.page_size)
        first = max(certain, begin, last - COMPARED_FRAMES) + 1
        return self._compare(file, header, first, last) if first <= last else Verdict.COMMITTED

    def _compare(self, file: Path, header: ltx.Header, first: int, last: int) -> Verdict:
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
                return Verdict.TO_COMPARE  # begun anew just now
            data = frames[at + FRAME_HEADER_BYTES : at + FRAME_HEADER_BYTES + size]
            pages[number] = data
        if not commit:  # pyright: ignore[reportPossiblyUnboundVariable]
            return Verdict.PHANTOM
        # Pages behind the end of the database are not in the file (a VACUUM wrote them before it cut it off).
        wanted = {number for number in pages if number <= header.commit}
        captured = ltx.read_pages(file, wanted)
        is_same = all(captured.get(number) == pages[number] for number in wanted)
        return Verdict.COMMITTED if is_same else Verdict.PHANTOM

    def is_in_database(self, file: Path, later: Sequence[Path]) -> bool:
        """Whether all pages of *file* are what the database has, but for those that are newer: in the *later*
        captured files, or in the WAL that was begun since. That one is begun only when the database has all
        that was committed in the one before. Blocks as long as it takes to read *file*.

        Raises OSError, LtxError.
        """
        newer = {number for each in later for number in ltx.page_numbers(each)}
        with file.open("rb") as source:
            header, pages = ltx.open_pages(source)
            size = header.page_size
            newer |= self._pages_in_wal(size)
            database = open_for_good(self._live)
            return all(
                page.number in newer or os.pread(database, size, (page.number - 1) * size) == page.data
                for page in pages
            )

    def _pages_in_wal(self, page_size: int) -> set[int]:
        mark, found = self._index.look(), set[int]()
        with self._wal.open("rb", buffering=0) as wal:
            for frame in range(1, (mark.frames if mark is not None else 0) + 1):
                head = os.pread(wal.fileno(), 4, frame_offset(frame, page_size))
                found.add(int.from_bytes(head, "big"))
        return found

    def covers(self, end: WalPlace | None, mark: Mark | None) -> bool:
        """Whether what is captured, up to *end*, has all that was committed at *mark*."""
        if end is None or mark is None or mark.frames == 0:
            return True
        if is_of(mark, end):
            return frames_at(end) >= mark.frames
        # SQLite counts the first salt up with each new beginning (wal.c, walRestartHdr).
        return 0 < (end.salt1 - mark.salt1) & 0xFFFFFFFF < 1 << 31


def frames_at(place: WalPlace) -> int:
    """How many frames there are up to *place*."""
    return (place.offset - WAL_HEADER_BYTES) // (FRAME_HEADER_BYTES + place.page_size)


def is_of(mark: Mark, place: WalPlace) -> bool:
    """Whether both are of the same WAL."""
    return (mark.salt1, mark.salt2) == (place.salt1, place.salt2)

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

import asyncio
import math
import os
import struct
from enum import Enum
from functools import partial
from pathlib import Path

from phalanx import system
from phalanx.data import ltx
from phalanx.data.records import WalPlace, end_of
from phalanx.data.sqlite_wal import FRAME_HEADER_BYTES, WAL_HEADER_BYTES, frame_offset
from phalanx.data.wal_index import Mark, WalIndex, open_for_good

COMPARED_FRAMES = 64
"""So many frames at the end of a file are compared. Who overwrites a phantom has written all frames up to
there, so that one would do but for transactions that end in just the same pages."""

QUICK_BYTES = 1 << 20
"""A file up to that size is judged at once, a larger one in a thread: its index may be long."""

_FRAME_BEGIN = struct.Struct(">II8s")


class Verdict(Enum):
    """What a captured file is."""

    COMMITTED = "committed"
    IN_DOUBT = "in doubt"
    """A program is in the middle of its commit."""
    TO_COMPARE = "to compare"
    """It reaches beyond what was known to be committed, and its WAL has been begun anew."""
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
        place, certain = end_of(header), _certain(header, before)
        now, last = self._index.look(), frames_at(place)
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
        first = max(certain, last - COMPARED_FRAMES) + 1
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
        commit = 0
        if len(frames) < (last - first + 1) * (FRAME_HEADER_BYTES + size):
            return Verdict.TO_COMPARE  # cut off just now
        for at in range(0, len(frames), FRAME_HEADER_BYTES + size):
            number, commit, found = _FRAME_BEGIN.unpack_from(frames, at)
            if found != salts:
                return Verdict.TO_COMPARE  # begun anew just now
            data = frames[at + FRAME_HEADER_BYTES : at + FRAME_HEADER_BYTES + size]
            pages[number] = data
        if not commit:
            return Verdict.PHANTOM
        # Pages behind the end of the database are not in the file (a VACUUM wrote them before it cut it off).
        wanted = {number for number in pages if number <= header.commit}
        captured = {page.number: page.data for page in ltx.read_pages(file, wanted)}
        is_same = all(captured.get(number) == pages[number] for number in wanted)
        return Verdict.COMMITTED if is_same else Verdict.PHANTOM

    async def verdict(self, file: Path, before: Mark | None, *, timeout: float = math.inf) -> Verdict:
        """The same, and where it has to be compared with the database, what comes out. COMMITTED, IN_DOUBT or
        PHANTOM; TO_COMPARE where that takes longer than *timeout* seconds. Raises OSError, LtxError.
        """
        judge = partial(self.judge, file, before)
        is_quick = os.stat(file).st_size <= QUICK_BYTES
        found = judge() if is_quick else await asyncio.to_thread(judge)
        if found is not Verdict.TO_COMPARE:
            return found
        compare = partial(self._is_in_database, file, before, system.now() + timeout)
        try:
            return Verdict.COMMITTED if await asyncio.to_thread(compare) else Verdict.PHANTOM
        except TimeoutError:
            return Verdict.TO_COMPARE

    def _is_in_database(self, file: Path, before: Mark | None, deadline: float) -> bool:
        """Whether the pages of *file* that were in doubt are what the database has, or have newer ones: in
        files captured later, or in the WAL that was begun since. It is begun only when the database has all
        that was committed in the one before. Raises OSError, LtxError, TimeoutError.
        """
        with file.open("rb") as source:
            header = ltx.decode_header(source.read(ltx.HEADER_BYTES))
        database = open_for_good(self._live)
        numbers = self._doubtful_pages(file, header, before)
        differing = _differing(file, numbers, database, deadline)
        # Looked at afterwards: Litestream may go on by itself, and move pages on into the database.
        return not differing or differing <= self._newer(file, header.page_size, deadline)

    def _doubtful_pages(self, file: Path, header: ltx.Header, before: Mark | None) -> set[int]:
        """Those in the frames that *before* does not have, as far as the WAL still has these frames behind
        the new ones; else all of the file's."""
        salts = header.wal_salt1.to_bytes(4, "big") + header.wal_salt2.to_bytes(4, "big")
        numbers: set[int] = set()
        with self._wal.open("rb", buffering=0) as wal:
            for frame in range(_certain(header, before) + 1, frames_at(end_of(header)) + 1):
                head = os.pread(wal.fileno(), _FRAME_BEGIN.size, frame_offset(frame, header.page_size))
                if head[8:] != salts:
                    return set(ltx.page_numbers(file))
                numbers.add(int.from_bytes(head[:4], "big"))
        return {number for number in numbers if number <= header.commit}

    def _newer(self, file: Path, page_size: int, deadline: float) -> set[int]:
        """The pages that were written after *file*. First the WAL, then the files: what leaves the WAL is in
        a file before."""
        newer: set[int] = set()
        mark = self._index.look()
        with self._wal.open("rb", buffering=0) as wal:
            for frame in range(1, (mark.frames if mark is not None else 0) + 1):
                head = os.pread(wal.fileno(), 4, frame_offset(frame, page_size))
                newer.add(int.from_bytes(head, "big"))
        txids = ltx.parse_file_name(file.name)
        assert txids is not None
        txid = txids[1] + 1
        while (later := file.with_name(ltx.file_name(txid, txid))).exists():
            newer.update(ltx.page_numbers(later))
            _check(deadline)
            txid += 1
        return newer

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


def _certain(header: ltx.Header, before: Mark | None) -> int:
    """Up to which frame nothing is in doubt: what *before* has, and what is before the file's own part."""
    begin = (header.wal_offset - WAL_HEADER_BYTES) // (FRAME_HEADER_BYTES + header.page_size)
    known = before is not None and is_of(before, end_of(header))
    return max(before.frames, begin) if before is not None and known else begin


def is_of(mark: Mark, place: WalPlace) -> bool:
    """Whether both are of the same WAL."""
    return (mark.salt1, mark.salt2) == (place.salt1, place.salt2)


def _differing(file: Path, numbers: set[int], database: int, deadline: float) -> set[int]:
    """Which of the pages *numbers* in *file* are others than those in the file *database* by itself."""
    found: set[int] = set()
    for page in ltx.read_pages(file, numbers) if numbers else ():
        _check(deadline)
        size = len(page.data)
        if os.pread(database, size, (page.number - 1) * size) != page.data:
            found.add(page.number)
    return found


def _check(deadline: float) -> None:
    if system.now() > deadline:
        raise TimeoutError

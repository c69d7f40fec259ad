"""The LTX files that Litestream has written, and whether one follows from the other.

Litestream takes for granted that the WAL was not begun anew while it was down. Not so after a crash: until
our guard has its read transaction, a program's checkpoint may have emptied the WAL, with commits in between
that Litestream never saw; and it would go on as if nothing was missing. So the first file after each start
must either go on in the very WAL, at the very place where the one before ended, or hold every page. Anything
else is a gap: the file is thrown away, and Litestream is made to write a full one.

How it is made to: it looks only into its newest file, for the place in the WAL. So that one is written anew,
with the same pages, but saying that it ended where no WAL ever ends (db.go, verifyWithExecutor: "wal
truncated by another process"). It may be shipped then as well as before.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from pathlib import Path

import msgspec

from phalanx.data import disk, ltx
from phalanx.data.litestream import Paths
from phalanx.errors import DatabaseError, LtxError

log = logging.getLogger("phalanx.capture")

CHECKED_BYTES = 4 << 20
"""Of a larger file it is not looked whether each page is sound."""

_FAR_FRAMES = 1 << 40
_WAL_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_LEAST_BYTES = ltx.HEADER_BYTES + ltx.TRAILER_BYTES


class Backlog(msgspec.Struct, frozen=True):
    """What is captured and not in the log yet."""

    files: int = 0
    bytes: int = 0


class FilesLost(DatabaseError):
    """Files that nobody else has are gone: only a new reign, with a full record, helps."""


class Records:
    """The files of one database. Not thread-safe; what blocks says so."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._unverified = paths.capture / "unverified"
        self._oldest = 1
        self._sizes: deque[int] = deque()
        """In bytes, from the oldest one to the newest. There may be very many: so their sum is kept."""
        self._bytes = 0
        self.newest = 0
        """The last transaction that may be shipped."""
        self._base = 0
        """The last one before this start of Litestream; the next one is verified against it."""
        self._verified = True
        self._end: WalPlace | None = None
        self._logged = 0
        """The log's last transaction as we began: no file of ours is needed up to it."""

    # --- before Litestream starts

    def open(self, last_txid: int) -> None:
        """Look at what is there from an earlier time. Blocks; raises OSError, DatabaseError.

        *last_txid*: the log's. If there are no files up to it, the next one will be a full one.
        """
        self._paths.level0.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_damaged(last_txid)
        found = self._list()
        self._logged = last_txid
        self.newest = max([last_txid, *found])
        base = self._read_unverified()
        if base is not None and base < self.newest:
            # The last start of Litestream was never verified.
            self.newest = max(base, last_txid)
            self._base, self._verified = base, False
            if base + 1 in found and not self._follows(base + 1):
                self._discard_after(base)
            else:
                self.newest = max([last_txid, *found])
        found = self._list()
        self._oldest = self.newest + 1
        while self._oldest - 1 in found:
            self._oldest -= 1
        for txid in found:
            if txid < self._oldest:
                self._path(txid).unlink()
        self._sizes = deque(self._size(txid) for txid in range(self._oldest, self.newest + 1))
        self._bytes = sum(self._sizes)
        self.forget(last_txid - 1)

    def prepare(self, page_size: int, *, full: bool) -> None:
        """Before every start of Litestream; *full*: it has to write all pages first. Blocks; OSError.

        *page_size*: of the database as it is now. Raises FilesLost, LtxError.
        """
        self._discard_after(self.newest)
        if self.newest:
            exists = self._path(self.newest).exists()
            if not exists and self.newest != self._logged:
                raise FilesLost(f"{self._path(self.newest)} was removed by somebody else than this node")
            if full or not exists:
                self._force_full(page_size, exists=exists)
        self._base, self._verified = self.newest, False
        disk.replace_file(self._unverified, str(self._base).encode(), "unverified")

    def _remove_damaged(self, logged_txid: int) -> None:
        """Remove what a loss of power has left of a file. One up to *logged_txid* is in the log; another one
        goes with all that follow it, and what they held is captured again: from the WAL, or with every page.
        """
        with os.scandir(self._paths.level0) as entries:
            sizes = {txids[1]: entry.stat().st_size for entry in entries if (txids := _txids(entry))}
        left = sorted(sizes)
        # Those before the newest are as Litestream wrote them, on the disk: of these the size is enough.
        for txid in [txid for txid in left if sizes[txid] < _LEAST_BYTES]:
            self._remove(txid, logged_txid, f"{sizes[txid]} bytes are too few")
            left.remove(txid)
            if txid > logged_txid:
                self._discard_after(txid)
                left = [each for each in left if each < txid]
                break
        while left:
            try:
                _check(self._path(left[-1]), left[-1])
                return
            except (LtxError, OSError) as error:
                self._remove(left.pop(), logged_txid, str(error))

    def _remove(self, txid: int, logged_txid: int, problem: str) -> None:
        fate = "the log has it" if txid <= logged_txid else "what it held is captured again"
        log.error("captured file %s is damaged, and removed; %s: %s", self._path(txid), fate, problem)
        self._path(txid).unlink()

    def _read_unverified(self) -> int | None:
        try:
            return int(self._unverified.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _list(self) -> set[int]:
        found: set[int] = set()
        for name in os.listdir(self._paths.level0):
            txids = ltx.parse_file_name(name)
            if txids is not None:
                found.add(txids[1])
        return found

    def _discard_after(self, txid: int) -> None:
        for later in self._list():
            if later > txid:
                self._path(later).unlink(missing_ok=True)

    def _force_full(self, page_size: int, *, exists: bool) -> None:
        path = self._path(self.newest)
        # A multiple of the size of the frames that are there now, or Litestream refuses it.
        far = {
            "wal_offset": _WAL_HEADER_BYTES,
            "wal_size": _FAR_FRAMES * (page_size + _FRAME_HEADER_BYTES),
            "wal_salt1": 0,
            "wal_salt2": 0,
        }
        fresh = path.with_suffix(".tmp")  # Litestream removes it if it is left over
        if exists:
            with open(path, "rb") as old, open(fresh, "wb") as new:
                header, pages = ltx.open_pages(old)
                new.writelines(ltx.encoded(msgspec.structs.replace(header, **far), pages))
                new.flush()
                os.fsync(new.fileno())
            fresh.replace(path)
            disk.sync_folder(path.parent, "captured file: sync folder")
        else:
            # In the log already, so nobody but Litestream reads this. Two pages: a first one must be whole.
            header = ltx.Header(
                page_size=page_size, commit=2, min_txid=self.newest, max_txid=self.newest, **far
            )
            content = ltx.encode(header, [ltx.Page(number, bytes(page_size)) for number in (1, 2)])
            disk.replace_file(path, content, "captured file")
        self._end = None

    # --- while it runs

    def accept(self, txid: int) -> bool:
        """Litestream has written up to *txid*. False: the first file does not follow; see the module.

        Blocks as long as it takes to read a header; for a full one, its index too. Raises DatabaseError.
        """
        if txid <= self.newest:
            return True
        if not self._verified:
            if not self._follows(self._base + 1):
                return False
            self._verified = True
            self._unverified.unlink(missing_ok=True)
        for accepted in range(self.newest + 1, txid + 1):
            size = self._size(accepted)
            self._sizes.append(size)
            self._bytes += size
        self.newest = txid
        self._end = None
        return True

    def unaccepted(self, up_to_txid: int | None = None) -> list[Path]:
        """What Litestream has written beyond that, in order; None: whatever is there. Raises OSError."""
        last = self._last() if up_to_txid is None else up_to_txid
        return [self._path(txid) for txid in range(self.newest + 1, last + 1)]

    def _last(self) -> int:
        """The newest one that Litestream has written. Does not list the folder: it may hold very many."""
        txid = self.newest
        while self._path(txid + 1).exists():
            txid += 1
        return txid

    def withdraw(self) -> None:
        """Remove what was not accepted: it will be captured again. Raises OSError."""
        for path in self.unaccepted():
            path.unlink(missing_ok=True)

    def _follows(self, txid: int) -> bool:
        path = self._path(txid)
        header = _read_header(path)
        before = self._path(txid - 1)
        if before.exists():
            last = _read_header(before)
            same_wal = (header.wal_salt1, header.wal_salt2) == (last.wal_salt1, last.wal_salt2)
            if same_wal and header.wal_offset == last.wal_offset + last.wal_size:
                return True
        return _is_full(path, header)

    @property
    def progress(self) -> object:
        """Something that changes while Litestream writes: its newest file, and how much of the next one."""
        last = self._last()
        try:
            return last, self._path(last + 1).with_suffix(".ltx.tmp").stat().st_size
        except OSError:
            return last, 0

    @property
    def end(self) -> WalPlace | None:
        """Where in the WAL the newest file ends; None if there is none."""
        if self._end is None and self.newest:
            try:
                header = _read_header(self._path(self.newest))
            except DatabaseError:
                return None
            self._end = end_of(header)
        return self._end

    # --- for the shipper

    def files(self, after_txid: int, limit: int | None = None) -> list[tuple[int, Path]]:
        """The files after *after_txid*, in order; at most *limit* of them."""
        first = max(after_txid + 1, self._oldest)
        last = self.newest if limit is None else min(self.newest, first + limit - 1)
        return [(txid, self._path(txid)) for txid in range(first, last + 1)]

    def backlog(self, after_txid: int) -> Backlog:
        """The same, counted. As quick as there are few files up to *after_txid*."""
        before = min(max(0, after_txid + 1 - self._oldest), len(self._sizes))
        bytes_before = sum(itertools.islice(self._sizes, before))
        return Backlog(len(self._sizes) - before, self._bytes - bytes_before)

    def forget(self, up_to_txid: int) -> None:
        """Remove the files up to *up_to_txid*, but not the newest, in which Litestream looks."""
        last = min(up_to_txid, self.newest - 1)
        while self._oldest <= last:
            self._path(self._oldest).unlink(missing_ok=True)
            self._oldest += 1
            self._bytes -= self._sizes.popleft()

    def _size(self, txid: int) -> int:
        try:
            return self._path(txid).stat().st_size
        except FileNotFoundError:
            return 0  # whoever reads it will say so

    def _path(self, txid: int) -> Path:
        return self._paths.level0 / ltx.file_name(txid, txid)


class WalPlace(msgspec.Struct, frozen=True):
    """A place in one WAL, in bytes."""

    salt1: int
    salt2: int
    offset: int
    page_size: int


def end_of(header: ltx.Header) -> WalPlace:
    """Where in the WAL a file ends."""
    return WalPlace(header.wal_salt1, header.wal_salt2, header.wal_offset + header.wal_size, header.page_size)


def frames_between(before: WalPlace | None, after: WalPlace | None) -> int:
    """How many frames lie between two places; as far as they can be told, where the WAL began anew."""
    if after is None:
        return 0
    same_wal = before is not None and (before.salt1, before.salt2) == (after.salt1, after.salt2)
    begin = before.offset if before is not None and same_wal else _WAL_HEADER_BYTES
    return (after.offset - begin) // (after.page_size + _FRAME_HEADER_BYTES)


def _read_header(path: Path) -> ltx.Header:
    try:
        with open(path, "rb") as file:
            return ltx.decode_header(file.read(ltx.HEADER_BYTES))
    except OSError as error:
        raise DatabaseError(f"{path} cannot be read: {error.strerror}") from None
    except LtxError as error:
        raise DatabaseError(f"{path} is damaged: {error}") from None


def _txids(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    return ltx.parse_file_name(entry.name)


def _check(path: Path, txid: int) -> None:
    """Whether the file at *path* is a whole one with that transaction. Raises LtxError, OSError."""
    with open(path, "rb") as file:
        header = ltx.decode_header(file.read(ltx.HEADER_BYTES))
        if header.max_txid != txid:
            raise LtxError(f"it holds transaction {header.max_txid}")
        if os.fstat(file.fileno()).st_size <= CHECKED_BYTES:
            file.seek(0)
            for _ in ltx.open_pages(file)[1]:
                pass
    _is_full(path, header)


def _is_full(path: Path, header: ltx.Header) -> bool:
    """Whether it holds every page: as many as its index has entries, three numbers each, and a zero."""
    with open(path, "rb") as file:
        end = file.seek(-ltx.TRAILER_BYTES - 8, os.SEEK_END)
        size = int.from_bytes(file.read(8), "big")
        if not 0 < size <= end:
            raise LtxError(f"{path.name}: an index of {size} bytes")
        file.seek(end - size)
        index = file.read(size)
    # The last byte of a varint is the one without the top bit.
    numbers = len(index.translate(None, bytes(range(0x80, 0x100))))
    return (numbers - 1) // 3 == ltx.page_count(header.commit, header.page_size)

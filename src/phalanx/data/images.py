"""The process that reads and writes whole databases: it packs a consistent view, unpacks it, applies records.

A process of its own, since descriptors of database files must not be opened beside SQLite's (see
``data.pinning``), and since it keeps a core busy::

    python -m phalanx.data.images pack DATABASE {--journal FILE | --capture FOLDER}  > image
    python -m phalanx.data.images unpack FILE                                        < image
    python -m phalanx.data.images apply FILE TXID                                    < records
    python -m phalanx.data.images to-ltx                                 < image     > LTX file
    python -m phalanx.data.images check FILE
    python -m phalanx.data.images check-in-use FILE

Images are described in ``data.image_format``. Records come as 8 bytes of size, 8 bytes of transaction number
(big-endian) and an LTX file. All commands that write no stream answer with one line of JSON. On standard
error ``@`` and a number say how many bytes of the database are done (``apply``: of one more record); any
other line says what went wrong, with exit code 1: what was written is then of no use.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from phalanx.data import ltx
from phalanx.data.image_format import BLOCK_BYTES, ImageHead, Unpacker, packed
from phalanx.data.pinning import PinnedDatabase
from phalanx.data.replica_store import Journal
from phalanx.data.sqlite_wal import IndexHeader, frame_offset
from phalanx.data.wal_files import LogState
from phalanx.errors import DatabaseError, LtxError
from phalanx.types import Position

RECORD = struct.Struct(">QQ")
"""Before each record: size of the LTX file, its transaction."""

_LOOK_SECONDS = 0.002
_RECENT_FILES = 100


class PositionFinder(Protocol):
    """Where it is noted which position a moment of a WAL has.

    ``wait_seconds``: how long after a commit its position may be noted; ``seconds``: after how long there is
    no hope.
    """

    seconds: float
    wait_seconds: float

    def find(self, state: IndexHeader) -> Position | None:
        """The position of that moment, None if it is not noted (yet). Raises OSError."""
        ...


class JournalPositions:
    """The positions of a replica, from the journal of its generation: noted before each commit."""

    seconds = 5.0
    wait_seconds = 0.0

    def __init__(self, journal: Path) -> None:
        self._path = journal

    def find(self, state: IndexHeader) -> Position | None:
        """See PositionFinder."""
        wanted = LogState(state.salts, state.frames, state.checksum if state.frames else (0, 0))
        with contextlib.closing(Journal(self._path)) as journal:
            return journal.find(wanted)


class CapturedPositions:
    """The transactions of a live database: Litestream's level 0 files say where in the WAL each one ends.

    Litestream takes several commits together when they come fast, so a moment may lie within a file: then
    another moment has to be found.
    """

    seconds = 15.0
    wait_seconds = 0.3

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends: dict[str, tuple[bytes, int, int]] = {}

    def find(self, state: IndexHeader) -> Position | None:
        """See PositionFinder; the sequence is 0."""
        if not state.frames:
            return None
        end = frame_offset(state.frames + 1, state.page_size)
        for name in sorted(os.listdir(self._folder), reverse=True)[:_RECENT_FILES]:
            if ltx.parse_file_name(name) is not None and (known := self._end(name)) is not None:
                salts, wal_end, txid = known
                if (salts, wal_end) == (state.salts, end):
                    return Position(0, txid)
        return None

    def _end(self, name: str) -> tuple[bytes, int, int] | None:
        found = self._ends.get(name)
        if found is None:
            try:
                with (self._folder / name).open("rb") as file:
                    header = ltx.decode_header(file.read(ltx.HEADER_BYTES))
            except (FileNotFoundError, LtxError):
                return None  # removed, or not written entirely yet
            salts = struct.pack(">II", header.wal_salt1, header.wal_salt2)
            found = self._ends[name] = (salts, header.wal_offset + header.wal_size, header.max_txid)
        return found


def pack(database: Path, where: PositionFinder, out: BinaryIO) -> None:
    """Write the image of *database* to *out*. Raises DatabaseError, OSError, sqlite3.Error."""
    with _pinned(database, where) as (view, position):
        head = ImageHead(
            page_size=view.state.page_size,
            commit=view.state.commit,
            sequence=position.sequence,
            txid=position.txid,
            time_ms=time.time_ns() // 1_000_000,
        )
        for piece in packed(head, _reported(_blocks(view))):
            out.write(piece)
        out.flush()


@contextlib.contextmanager
def _pinned(database: Path, where: PositionFinder) -> Generator[tuple[PinnedDatabase, Position]]:
    """A moment whose position is known: found among several, where positions are noted after commits."""
    deadline = time.monotonic() + where.seconds
    while True:
        with PinnedDatabase(database) as view:
            until = min(deadline, time.monotonic() + where.wait_seconds)
            while True:
                if (position := where.find(view.state)) is not None:
                    yield view, position
                    return
                if time.monotonic() >= until:
                    break
                time.sleep(_LOOK_SECONDS)
        if time.monotonic() >= deadline:
            raise DatabaseError(f"{database}: nothing says which position it has")


def _blocks(view: PinnedDatabase) -> Iterator[bytes]:
    state = view.state
    count = BLOCK_BYTES // state.page_size
    for first in range(1, state.commit + 1, count):
        yield view.read(first, min(count, state.commit + 1 - first))


def unpack(source: BinaryIO, target: Path) -> ImageHead:
    """Write the database to the new file *target*, on the disk; it is removed if anything goes wrong.

    Raises DatabaseError, OSError (the file exists, the disk is full).
    """
    unpacker = Unpacker(source)
    with target.open("xb", buffering=0) as file:
        try:
            for block in _reported(unpacker.blocks()):
                _write(file.fileno(), block)
            os.fsync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return unpacker.head


def _reported(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same, with a line about it now and then for whoever waits."""
    done, said = 0, 0
    for block in blocks:
        yield block
        done += len(block)
        if done - said >= BLOCK_BYTES:
            said = done
            sys.stderr.write(f"@{done}\n")
            sys.stderr.flush()


def to_ltx(source: BinaryIO, out: BinaryIO) -> None:
    """Turn an image into an LTX snapshot: all transactions from the first one up to that of the image.

    Raises DatabaseError, OSError.
    """
    unpacker = Unpacker(source)
    head = unpacker.head
    header = ltx.Header(
        page_size=head.page_size, commit=head.commit, min_txid=1, max_txid=head.txid, time_ms=head.time_ms
    )
    for piece in ltx.encoded(header, _pages(head.page_size, _reported(unpacker.blocks()))):
        out.write(piece)
    out.flush()


def _pages(size: int, blocks: Iterator[bytes]) -> Iterator[ltx.Page]:
    number, rest = 0, b""
    for block in blocks:
        data = rest + block if rest else block
        end = len(data) - len(data) % size
        for at in range(0, end, size):
            number += 1
            if number != ltx.lock_page(size):
                yield ltx.Page(number, data[at : at + size])
        rest = data[end:]
    if rest:
        raise DatabaseError("the image ends within a page")


def _write(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


class Applied(msgspec.Struct, frozen=True):
    """What the file is after records were applied."""

    txid: int
    commit: int
    page_size: int


def apply(source: BinaryIO, target: Path, txid: int) -> Applied:
    """Apply the records of *source* to the database file *target*, which nobody has open, and sync it.

    The file is at transaction *txid*; the records must go on from there. Raises DatabaseError (a gap, no
    record at all for that page size), LtxError, OSError: the file is then of no use.
    """
    fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = int.from_bytes(os.pread(fd, 2, 16), "big")
        page_size = 65536 if size == 1 else size
        while prefix := source.read(RECORD.size):
            if len(prefix) < RECORD.size:
                raise DatabaseError("the records end within one")
            length, expected = RECORD.unpack(prefix)
            part = _Part(source, length)
            page_size = _apply_record(fd, part, txid, expected, page_size)
            txid = expected
            sys.stderr.write(f"@{length}\n")
            sys.stderr.flush()
        os.fsync(fd)
        return Applied(txid, os.fstat(fd).st_size // page_size, page_size)
    finally:
        os.close(fd)


def _apply_record(fd: int, file: _Part, txid: int, expected: int, page_size: int) -> int:
    header, pages = ltx.open_pages(file)
    if header.max_txid != expected:
        raise DatabaseError(f"the record of transaction {expected} holds {header.max_txid}")
    must_be_full = header.min_txid > txid + 1 or header.max_txid <= txid or header.page_size != page_size
    if header.page_size != page_size:
        os.ftruncate(fd, 0)
    count = 0
    for page in pages:
        os.pwrite(fd, page.data, (page.number - 1) * header.page_size)
        count += 1
    if must_be_full and count != ltx.page_count(header.commit, header.page_size):
        raise DatabaseError(f"after transaction {txid} comes {header.min_txid}: some are missing")
    os.ftruncate(fd, header.commit * header.page_size)
    return header.page_size


class _Part:
    """The next *size* bytes of a stream, as a file."""

    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source, self._left = source, size

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def check(database: Path, *, in_use: bool = False) -> str:
    """``ok``, or what SQLite finds wrong with *database*. Raises sqlite3.Error.

    *in_use*: others may write it, so its WAL counts, too, and it is read in one transaction, which holds up
    the checkpoints of whoever writes. Otherwise nobody has it open, and no file is made beside it.
    """
    how = "mode=ro" if in_use else "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"{database.absolute().as_uri()}?{how}", uri=True, timeout=10, isolation_level=None
    )
    try:
        connection.execute("BEGIN")
        rows = connection.execute("PRAGMA integrity_check(10)").fetchall()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:  # too damaged to be checked
        return str(error)
    finally:
        connection.close()
    return "; ".join(str(row[0]) for row in rows)


# --- the command


def main(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    try:
        answer = _run(arguments)
    except BrokenPipeError:
        return 1  # who has started this is gone, or has had enough
    except (DatabaseError, OSError, sqlite3.Error) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 1
    if answer is not None:
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.flush()
    return 0


def _run(arguments: Sequence[str]) -> object:
    match arguments:
        case ["pack", database, "--journal", journal]:
            return pack(Path(database), JournalPositions(Path(journal)), sys.stdout.buffer)
        case ["pack", database, "--capture", folder]:
            return pack(Path(database), CapturedPositions(Path(folder)), sys.stdout.buffer)
        case ["unpack", file]:
            return unpack(sys.stdin.buffer, Path(file))
        case ["apply", file, txid]:
            return apply(sys.stdin.buffer, Path(file), int(txid))
        case ["to-ltx"]:
            return to_ltx(sys.stdin.buffer, sys.stdout.buffer)
        case ["check", file]:
            return check(Path(file))
        case ["check-in-use", file]:
            return check(Path(file), in_use=True)
        case _:
            raise DatabaseError(f"not a command: {' '.join(arguments)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

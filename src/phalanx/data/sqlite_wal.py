"""SQLite's write-ahead log and its index, as formats: https://sqlite.org/fileformat2.html section 4,
https://sqlite.org/walformat.html. Nothing here touches a file.

The log (``-wal``), integers big-endian::

    header   32 bytes   magic (its last bit: byte order of the checksums), version, page size, number of the
                        checkpoint, two salts, checksum of the 24 bytes before
    frame    24 bytes   page number, size of the database in pages (0 unless it ends a transaction), the
                        salts, checksum of all before: the first 8 bytes of each header and each page
             a page     as it is after the transaction

The index (``-shm``) is shared memory, in the machine's byte order, in pieces of 32 KiB::

    header   48 bytes   twice: readers take it only when both are equal
    marks    40 bytes   how much is in the database file already, which frames readers use, the locks
    tables              of each piece: page numbers of 4096 frames (4062 in the first piece, which begins with
                        the header), then 8192 slots of a hash table of frames by page number
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import NamedTuple

WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
INDEX_PIECE_BYTES = 32768
INDEX_HEADER_BYTES = 48
SALTS_BYTES = 8

WRITE_LOCK, CHECKPOINT_LOCK, RECOVER_LOCK, READ_LOCK, ALIVE_LOCK = 120, 121, 122, 123, 128
"""Bytes of the index that are locked (fcntl). READ_LOCK is the first of five; ALIVE_LOCK is held, shared, by
everybody who has the index open."""
READERS = 5

_MAGIC = 0x377F0682
_VERSION = 3007000
_BIG_ENDIAN = sys.byteorder == "big"
_MASK = 0xFFFFFFFF
_UNUSED_MARK = 0xFFFFFFFF
_WAL_HEADER = Struct(">IIII8sII")
_FRAME_HEADER = Struct(">II8sII")
_FRAME_BEGIN = Struct(">II")
_INDEX_HEADER = Struct("=IIIBBHII2I8s2I")
_FIRST_FRAMES, _FRAMES, _SLOTS, _HASH = 4062, 4096, 8192, 383
_MARKS_AT = 96
_FIRST_NUMBERS_AT = 136
_SLOTS_AT = _FRAMES * 4


def checksum(
    data: bytes | memoryview, s0: int, s1: int, *, big_endian: bool = _BIG_ENDIAN
) -> tuple[int, int]:
    """Go on with the checksum *s0*, *s1* over *data*, a multiple of 8 bytes, taken as 32-bit integers."""
    words: memoryview | array[int] = memoryview(data).cast("I")
    if big_endian != _BIG_ENDIAN:
        words = array("I", bytes(data))
        words.byteswap()
    pairs = iter(words)
    for even, odd in zip(pairs, pairs, strict=True):
        s0 = (s0 + even + s1) & _MASK
        s1 = (s1 + odd + s0) & _MASK
    return s0, s1


# --- the log


class WalHeader(NamedTuple):
    """What a log says of itself. ``checksum`` is what that of the first frame goes on from."""

    page_size: int
    number: int
    salts: bytes
    checksum: tuple[int, int]
    big_endian: bool = _BIG_ENDIAN


def encode_wal_header(page_size: int, number: int, salts: bytes) -> bytes:
    """The header of a new log. *number*: of the checkpoint."""
    head = _WAL_HEADER.pack(_MAGIC | _BIG_ENDIAN, _VERSION, page_size, number & _MASK, salts, 0, 0)[:24]
    s0, s1 = checksum(head, 0, 0)
    return head + _FRAME_BEGIN.pack(s0, s1)


def decode_wal_header(data: bytes) -> WalHeader | None:
    """None if it is no valid one: SQLite ignores such a log."""
    if len(data) < WAL_HEADER_BYTES:
        return None
    magic, version, page_size, number, salts, s0, s1 = _WAL_HEADER.unpack_from(data)
    if magic & ~1 != _MAGIC or version != _VERSION or not 512 <= page_size <= 65536:
        return None
    big_endian = bool(magic & 1)
    if page_size & (page_size - 1) or checksum(data[:24], 0, 0, big_endian=big_endian) != (s0, s1):
        return None
    return WalHeader(page_size, number, salts, (s0, s1), big_endian)


def frame_offset(frame: int, page_size: int) -> int:
    """Where frame *frame* begins in the log; frames count from 1."""
    return WAL_HEADER_BYTES + (frame - 1) * (page_size + FRAME_HEADER_BYTES)


def encode_frame(
    number: int, data: bytes, commit: int, salts: bytes, s0: int, s1: int, big_endian: bool
) -> tuple[bytes, int, int]:
    """The header of a frame for page *number*, and the checksum up to its end."""
    s0, s1 = checksum(_FRAME_BEGIN.pack(number, commit), s0, s1, big_endian=big_endian)
    s0, s1 = checksum(data, s0, s1, big_endian=big_endian)
    return _FRAME_HEADER.pack(number, commit, salts, s0, s1), s0, s1


class Frame(NamedTuple):
    """A valid frame. ``commit``: the database's size in pages, if this ends a transaction, else 0."""

    frame: int
    page: int
    commit: int


def valid_frames(header: WalHeader, frames: Iterable[bytes]) -> Iterator[Frame]:
    """The frames of a log that are valid, in order. *frames*: their bytes, from the first one on."""
    s0, s1 = header.checksum
    for index, data in enumerate(frames, 1):
        if len(data) < FRAME_HEADER_BYTES + header.page_size:
            return
        page, commit, salts, *wanted = _FRAME_HEADER.unpack_from(data)
        if salts != header.salts or not page:
            return
        view = memoryview(data)
        s0, s1 = checksum(view[:8], s0, s1, big_endian=header.big_endian)
        s0, s1 = checksum(view[FRAME_HEADER_BYTES:], s0, s1, big_endian=header.big_endian)
        if [s0, s1] != wanted:
            return
        yield Frame(index, page, commit)


# --- the index


class IndexHeader(NamedTuple):
    """The state of the log that readers see. ``change`` counts commits, ``commit`` is the database's size in
    pages, ``checksum`` that of the last frame. Without frames ``page_size`` and ``commit`` may be 0."""

    change: int
    big_endian: bool
    page_size: int
    frames: int
    commit: int
    checksum: tuple[int, int]
    salts: bytes

    def encode(self) -> bytes:
        """One of the two copies."""
        size = self.page_size & 0xFF00 | self.page_size >> 16
        head = _INDEX_HEADER.pack(
            _VERSION,
            0,
            self.change & _MASK,
            1,
            self.big_endian,
            size,
            self.frames,
            self.commit,
            *self.checksum,
            self.salts,
            0,
            0,
        )[:40]
        s0, s1 = checksum(head, 0, 0)
        return head + Struct("=II").pack(s0, s1)


def decode_index_header(data: bytes) -> IndexHeader | None:
    """None if it is not valid: it was not written yet, or only in part."""
    version, _, change, is_init, big_endian, size, frames, commit, f0, f1, salts, s0, s1 = (
        _INDEX_HEADER.unpack(data)
    )
    if not is_init or version != _VERSION or checksum(data[:40], 0, 0) != (s0, s1):
        return None
    page_size = (size & 0xFE00) + ((size & 1) << 16)
    return IndexHeader(change, bool(big_endian), page_size, frames, commit, (f0, f1), salts)


class Marks:
    """The marks in the first piece of an index."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory[_MARKS_AT : _MARKS_AT + 40].cast("I")

    @property
    def backfilled(self) -> int:
        """How many frames are in the database file already."""
        return self._words[0]

    @backfilled.setter
    def backfilled(self, frames: int) -> None:
        self._words[0] = frames

    @property
    def attempted(self) -> int:
        """How many frames may be there, in part."""
        return self._words[8]

    @attempted.setter
    def attempted(self, frames: int) -> None:
        self._words[8] = frames

    def reader(self, slot: int) -> int:
        """The last frame that readers with READ_LOCK + *slot* (1 to 4) use."""
        return self._words[1 + slot]

    def set_reader(self, slot: int, frame: int | None) -> None:
        """Set that (None: nobody's). READ_LOCK + *slot* is held exclusively."""
        self._words[1 + slot] = _UNUSED_MARK if frame is None else frame

    def restart(self) -> None:
        """A new log, nothing of it in the database file. READ_LOCK + 1 to 4 are held."""
        self.backfilled = self.attempted = 0
        self.set_reader(1, 0)
        for slot in range(2, READERS):
            self.set_reader(slot, None)

    def release(self) -> None:
        """Let go of the memory."""
        self._words.release()


def piece_of(frame: int) -> int:
    """The piece of the index that has frame *frame*."""
    return (frame + _FRAMES - _FIRST_FRAMES - 1) // _FRAMES


class Table:
    """One piece of an index: which page each frame has, and the frames of a page."""

    def __init__(self, memory: memoryview, piece: int) -> None:
        begin = piece * INDEX_PIECE_BYTES
        first = _FIRST_NUMBERS_AT if piece == 0 else 0
        self.before = 0 if piece == 0 else _FIRST_FRAMES + (piece - 1) * _FRAMES
        """The number of frames before the first one here."""
        self.count = _FIRST_FRAMES if piece == 0 else _FRAMES
        self._raw = memory[begin + first : begin + INDEX_PIECE_BYTES]
        self.numbers = memory[begin + first : begin + _SLOTS_AT].cast("I")
        self._slots = memory[begin + _SLOTS_AT : begin + INDEX_PIECE_BYTES].cast("H")

    def prepare(self, frames: int) -> None:
        """Remove what is there of frames after *frames*: left by a writer that was killed.

        Readers may look at it meanwhile: they take no frame after those of the header.
        """
        keep = max(0, frames - self.before)
        if keep == 0:
            self._raw[:] = bytes(len(self._raw))
            return
        rest = self.numbers[keep:].cast("B")
        if not rest.tobytes().strip(b"\0"):
            return
        # The slots first: a page number is what shows that there is something to remove.
        for slot, entry in enumerate(self._slots):
            if entry > keep:
                self._slots[slot] = 0
        rest[:] = bytes(len(rest))

    def add(self, frame: int, page: int) -> None:
        """Note that *frame* has *page*. The frames come in order, after :meth:`prepare`."""
        entry = frame - self.before
        slot = page * _HASH % _SLOTS
        while self._slots[slot]:
            slot = (slot + 1) % _SLOTS
        self.numbers[entry - 1] = page
        self._slots[slot] = entry

"""LTX, the file format of Litestream for the pages that some transactions have changed.

Version 3 of the format, as github.com/superfly/ltx documents it; integers are big-endian::

    header    100 bytes   magic "LTX1", flags, page size, commit (size of the database in pages), first and
                          last transaction, time in ms, checksum before, WAL offset, size and salts, node
    page      6 bytes     page number, flags; then, where flag 1 is set, 4 bytes of size and an LZ4 block
                          of that size (older writers: an LZ4 frame without a size)
    …         pages in ascending order; a header of zeros ends them
    index     varints (page number, offset, size) for each page, a zero, 8 bytes of size of all this
    trailer   16 bytes    checksum of the database afterwards, CRC-64/GO-ISO of the file with bit 63 set

The file's checksum covers everything but itself, with each page's data *uncompressed*.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import lz4.block
import lz4.frame
import msgspec
from fastcrc import crc64

from phalanx.errors import LtxError

HEADER_BYTES = 100
TRAILER_BYTES = 16
NO_CHECKSUM = 1 << 1
"""Header flag: no rolling checksum of the database is kept. Litestream 0.5 always sets it."""

_MAGIC = b"LTX1"
_HAS_SIZE = 1
_CHECKSUM_FLAG = 1 << 63
_PENDING_BYTE = 0x40000000
_HEADER = struct.Struct(">4sIIIQQqQqqIIQ20x")
_PAGE = struct.Struct(">IH")
_SIZED_PAGE = struct.Struct(">IHI")
_PAGE_NUMBER = struct.Struct(">I")
_TRAILER = struct.Struct(">QQ")
_END_OF_PAGES = bytes(_PAGE.size)
_FILE_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.ltx")
_FRAME_MAGIC = b"\x04\x22\x4d\x18"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What an LTX file says of itself. ``commit``: the size of the database afterwards, in pages.

    ``wal_offset``, ``wal_size`` and the salts: which part of the WAL the file was made of.
    """

    page_size: int
    commit: int
    min_txid: int
    max_txid: int
    time_ms: int = 0
    flags: int = NO_CHECKSUM
    pre_checksum: int = 0
    wal_offset: int = 0
    wal_size: int = 0
    wal_salt1: int = 0
    wal_salt2: int = 0
    node_id: int = 0

    @property
    def is_snapshot(self) -> bool:
        """Whether the file holds every page, from the first transaction on."""
        return self.min_txid == 1

    @property
    def tracks_checksums(self) -> bool:
        """Whether the file has a checksum of the whole database, before and after."""
        return not self.flags & NO_CHECKSUM


class Page(msgspec.Struct, frozen=True):
    """One page as it is afterwards. Numbers count from 1."""

    number: int
    data: bytes


class Readable(Protocol):
    """A buffered binary file: ``read(n)`` gives n bytes unless it ends."""

    def read(self, size: int, /) -> bytes: ...


class LtxFile(msgspec.Struct, frozen=True):
    """One decoded file, every checksum verified."""

    header: Header
    pages: tuple[Page, ...]
    post_checksum: int = 0

    @property
    def is_full(self) -> bool:
        """Whether it holds every page of the database, whatever its first transaction is."""
        return len(self.pages) == page_count(self.header.commit, self.header.page_size)


def lock_page(page_size: int) -> int:
    """The page that SQLite never uses: the one with the locks, at 1 GiB (file format 1.5)."""
    return _PENDING_BYTE // page_size + 1


def page_count(commit: int, page_size: int) -> int:
    """How many pages a file has that holds every page of a database of *commit* pages."""
    return commit - (1 if lock_page(page_size) <= commit else 0)


def page_checksum(number: int, data: bytes) -> int:
    """A page's part of the database's checksum, which is the exclusive or of all parts, bit 63 set."""
    return _CHECKSUM_FLAG | crc64.go_iso(data, crc64.go_iso(_PAGE_NUMBER.pack(number)))


def is_page_size(size: int) -> bool:
    """Whether SQLite can have pages of *size* bytes: a power of two from 512 to 65,536."""
    return 512 <= size <= 65536 and size & (size - 1) == 0


def file_name(min_txid: int, max_txid: int) -> str:
    """The name of a file with those transactions."""
    return f"{min_txid:016x}-{max_txid:016x}.ltx"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """First and last transaction, None for a name that is none."""
    found = _FILE_NAME.fullmatch(name)
    return (int(found[1], 16), int(found[2], 16)) if found else None


# --- reading


def decode_header(data: bytes | memoryview) -> Header:
    """The header alone; the checksum is not looked at. Raises LtxError."""
    if len(data) < HEADER_BYTES:
        raise LtxError(f"{len(data)} bytes are too few for a header")
    magic, flags, page_size, commit, first, last, time, pre, offset, size, salt1, salt2, node = (
        _HEADER.unpack_from(data)
    )
    if magic != _MAGIC:
        raise LtxError(f"it begins with {bytes(magic)!r}, not {_MAGIC!r}")
    header = Header(
        page_size=page_size,
        commit=commit,
        min_txid=first,
        max_txid=last,
        time_ms=time,
        flags=flags,
        pre_checksum=pre,
        wal_offset=offset,
        wal_size=size,
        wal_salt1=salt1,
        wal_salt2=salt2,
        node_id=node,
    )
    _check_header(header)
    return header


def _check_header(header: Header) -> None:
    if header.flags & ~NO_CHECKSUM:
        raise LtxError(f"flags {header.flags:#x} are unknown")
    if not is_page_size(header.page_size):
        raise LtxError(f"a page size of {header.page_size}")
    if header.commit < 1:
        # The format has it for a deleted database; a database that Litestream captures is never empty.
        raise LtxError("a database without pages")
    if not 1 <= header.min_txid <= header.max_txid:
        raise LtxError(f"transactions from {header.min_txid} to {header.max_txid}")
    if header.wal_offset < 0 or header.wal_size < 0:
        raise LtxError("a negative place in the WAL")
    if not header.wal_offset and (header.wal_size or header.wal_salt1 or header.wal_salt2):
        raise LtxError("a part of a WAL without its place there")
    if header.is_snapshot or not header.tracks_checksums:
        if header.pre_checksum:
            raise LtxError("a checksum of the database before, where there is none")
    elif not header.pre_checksum & _CHECKSUM_FLAG:
        raise LtxError("no checksum of the database before, where one is kept")


def decode(data: bytes) -> LtxFile:
    """A whole file. Raises LtxError for whatever is wrong with it; see :func:`open_pages`."""
    reader = _Reader(io.BytesIO(data))
    pages = tuple(reader.pages())
    return LtxFile(reader.header, pages, reader.post_checksum)


def open_pages(file: Readable) -> tuple[Header, Iterator[Page]]:
    """The header, and the pages one after the other, for files of any size: memory stays flat.

    *file* holds one LTX file, nothing more.
    Raises LtxError, here for the header and from the iterator for all else. Index, trailer, checksum and
    completeness are verified after the last page: what the iterator gave before it ended without an error
    may be wrong, and must not be used for good.

    No change of a file gives other pages unseen. Not every changed byte is an error: LZ4 can say the same
    page in several ways, and the file's checksum is over the page.
    """
    reader = _Reader(file)
    return reader.header, reader.pages()


def holds_every_page(file: Readable) -> bool:
    """Whether that one needs nothing before it. Reads all of it; raises LtxError as :func:`open_pages`."""
    header, pages = open_pages(file)
    return sum(1 for _ in pages) == page_count(header.commit, header.page_size)


def read_pages(path: Path, numbers: Collection[int]) -> Iterator[Page]:
    """Some of the pages of the file at *path*, found by its index; those that it does not have are left out.

    Checks no more than it must: not the file's checksum. Raises LtxError, OSError.
    """
    with path.open("rb") as file:
        page_size = decode_header(file.read(HEADER_BYTES)).page_size
        for number, at, size in _index_entries(_index(path)):
            if number not in numbers:
                continue
            file.seek(at)
            page = file.read(size)
            _, flags = _PAGE.unpack_from(page)
            content = page[_PAGE.size :]
            if flags & _HAS_SIZE:
                yield Page(number, _unpack_block(content[4:], page_size, number))
            else:
                yield Page(number, _unpack_frame(content, page_size, number))


def _index(path: Path) -> bytes:
    with path.open("rb") as file:
        end = file.seek(-TRAILER_BYTES - 8, os.SEEK_END)
        index_bytes = int.from_bytes(file.read(8), "big")
        if not 0 < index_bytes <= end:
            raise LtxError(f"an index of {index_bytes} bytes")
        file.seek(end - index_bytes)
        return file.read(index_bytes)


def page_numbers(path: Path) -> list[int]:
    """The numbers of all pages in the file at *path*, by its index. Raises LtxError, OSError."""
    return [number for number, _, _ in _index_entries(_index(path))]


def _index_entries(index: bytes) -> Iterator[tuple[int, int, int]]:
    """Page number, place and size in bytes of each page; a page number of 0 ends them."""
    values: list[int] = []
    value = shift = 0
    for byte in index:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            values.append(value)
            value = shift = 0
            if len(values) == 3:
                yield values[0], values[1], values[2]
                values.clear()


class _Reader:
    """Reads one file from beginning to end. ``post_checksum`` is known when ``pages()`` is through."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        head = self._read(HEADER_BYTES, "its header")
        self.header = decode_header(head)
        self.post_checksum = 0
        self._crc = crc64.go_iso(head)
        self._at = HEADER_BYTES
        self._count = 0
        # The index is known beforehand: its size and checksum are compared instead of keeping it.
        self._index_bytes, self._index_crc = 0, 0
        self._rolling = _CHECKSUM_FLAG

    def _read(self, size: int, what: str) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise LtxError(f"it ends in {what}")
        return data

    def pages(self) -> Iterator[Page]:
        header, last = self.header, 0
        unused = lock_page(header.page_size)
        while (prefix := self._read(_PAGE.size, "its pages")) != _END_OF_PAGES:
            number, flags = _PAGE.unpack(prefix)
            if not last < number <= header.commit or number == unused or flags & ~_HAS_SIZE:
                raise LtxError(
                    f"page {number} with flags {flags:#x} after page {last}, in a database of {header.commit}"
                )
            page = self._page(number, flags, prefix)
            last = number
            yield page
        self._end()

    def _page(self, number: int, flags: int, prefix: bytes) -> Page:
        page_size = self.header.page_size
        if flags & _HAS_SIZE:
            size_field = self._read(4, f"page {number}")
            block_bytes = int.from_bytes(size_field, "big")
            if block_bytes > _block_bound(page_size):
                raise LtxError(f"page {number} has {block_bytes} compressed bytes")
            content = _unpack_block(self._read(block_bytes, f"page {number}"), page_size, number)
            prefix += size_field
            size = len(prefix) + block_bytes
        else:
            frame = self._frame(number)
            content = _unpack_frame(frame, page_size, number)
            size = len(prefix) + len(frame)
        self._crc = crc64.go_iso(content, crc64.go_iso(prefix, self._crc))
        entry = _varint(number) + _varint(self._at) + _varint(size)
        self._index_crc = crc64.go_iso(entry, self._index_crc)
        self._index_bytes += len(entry)
        self._at += size
        self._count += 1
        if self.header.tracks_checksums and self.header.is_snapshot:
            self._rolling = _CHECKSUM_FLAG | self._rolling ^ page_checksum(number, content)
        return Page(number, content)

    def _frame(self, number: int) -> bytes:
        """The bytes of one LZ4 frame (lz4_Frame_format.md), whose end only its blocks tell."""
        what = f"page {number}"
        frame = bytearray(self._read(7, what))
        if not frame.startswith(_FRAME_MAGIC):
            raise LtxError(f"{what} is no LZ4 frame")
        descriptor = frame[4]
        frame += self._read((8 if descriptor & 0x08 else 0) + (4 if descriptor & 0x01 else 0), what)
        while size := int.from_bytes(mark := self._read(4, what), "little"):
            block_bytes = (size & 0x7FFFFFFF) + (4 if descriptor & 0x10 else 0)
            if len(frame) + block_bytes > 2 * _block_bound(self.header.page_size) + 64:
                raise LtxError(f"{what} has a frame that is too large")
            frame += mark + self._read(block_bytes, what)
        return bytes(frame + mark + self._read(4 if descriptor & 0x04 else 0, what))

    def _end(self) -> None:
        index = self._read(self._index_bytes + 1, "its index")
        size = self._read(8, "its index")
        trailer = self._read(TRAILER_BYTES, "its trailer")
        if self._file.read(1):
            raise LtxError("it goes on after its trailer")
        crc = self._crc
        for part in (_END_OF_PAGES, index, size, trailer[:8]):
            crc = crc64.go_iso(part, crc)
        self.post_checksum, checksum = _TRAILER.unpack(trailer)
        if checksum != crc | _CHECKSUM_FLAG:
            raise LtxError(f"its checksum is {crc | _CHECKSUM_FLAG:016x}, the trailer says {checksum:016x}")
        if (
            index[-1] != 0
            or crc64.go_iso(index[:-1]) != self._index_crc
            or int.from_bytes(size, "big") != len(index)
        ):
            raise LtxError("its index does not fit its pages")
        _check_trailer(self.header, self.post_checksum, self._rolling)
        _check_complete(self.header, self._count)


def _block_bound(size: int) -> int:
    """How large *size* bytes can become by LZ4 (LZ4_COMPRESSBOUND)."""
    return size + size // 255 + 16


def _unpack_block(block: bytes, page_size: int, number: int) -> bytes:
    try:
        content = lz4.block.decompress(block, uncompressed_size=page_size)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise LtxError(f"page {number} is damaged: {error}") from None
    if len(content) != page_size:
        raise LtxError(f"page {number} has {len(content)} bytes instead of {page_size}")
    return content


def _unpack_frame(frame: bytes, page_size: int, number: int) -> bytes:
    unpacker = lz4.frame.LZ4FrameDecompressor()
    try:
        # At most one byte more than a page, whatever size a damaged frame says it has.
        content = unpacker.decompress(frame, max_length=page_size + 1)
    except (RuntimeError, ValueError, MemoryError, EOFError) as error:
        raise LtxError(f"page {number} is damaged: {error}") from None
    if len(content) != page_size or not unpacker.eof or unpacker.unused_data:
        raise LtxError(f"page {number} has {len(content)} bytes instead of {page_size}")
    return content


def _check_trailer(header: Header, post_checksum: int, rolling: int) -> None:
    if not header.tracks_checksums:
        if post_checksum:
            raise LtxError("a checksum of the database, where none is kept")
    elif not post_checksum & _CHECKSUM_FLAG:
        raise LtxError("no checksum of the database, where one is kept")
    elif header.is_snapshot and post_checksum != rolling:
        raise LtxError(f"the database's checksum is {rolling:016x}, the trailer says {post_checksum:016x}")


def _check_complete(header: Header, pages: int) -> None:
    wanted = page_count(header.commit, header.page_size)
    if header.is_snapshot and pages != wanted:
        raise LtxError(f"a snapshot of {wanted} pages with {pages} of them")


# --- writing


def encode(header: Header, pages: Iterable[Page], post_checksum: int = 0) -> bytes:
    """A file with *pages*, in ascending order of their numbers. Raises LtxError, ValueError."""
    return b"".join(encoded(header, pages, post_checksum))


def encoded(header: Header, pages: Iterable[Page], post_checksum: int = 0) -> Iterator[bytes]:
    """The same piece by piece, for databases that do not fit into memory. (The index has to: some ten bytes
    a page.) Raises ValueError for a page that may not follow, LtxError for all else that may not be."""
    _check_header(header)
    head = _HEADER.pack(
        _MAGIC,
        header.flags,
        header.page_size,
        header.commit,
        header.min_txid,
        header.max_txid,
        header.time_ms,
        header.pre_checksum,
        header.wal_offset,
        header.wal_size,
        header.wal_salt1,
        header.wal_salt2,
        header.node_id,
    )
    crc = crc64.go_iso(head)
    yield head
    index = bytearray()
    at, last, count, unused = HEADER_BYTES, 0, 0, lock_page(header.page_size)
    rolling, rolls = _CHECKSUM_FLAG, header.is_snapshot and header.tracks_checksums
    for page in pages:
        number = page.number
        if not last < number <= header.commit or number == unused or len(page.data) != header.page_size:
            raise ValueError(f"page {number} of {len(page.data)} bytes after page {last}")
        block = lz4.block.compress(page.data, store_size=False)
        prefix = _SIZED_PAGE.pack(number, _HAS_SIZE, len(block))
        crc = crc64.go_iso(page.data, crc64.go_iso(prefix, crc))
        yield prefix + block
        if rolls:
            rolling = _CHECKSUM_FLAG | rolling ^ page_checksum(number, page.data)
        size = len(prefix) + len(block)
        index += _varint(number) + _varint(at) + _varint(size)
        at, last, count = at + size, number, count + 1
    _check_trailer(header, post_checksum, rolling)
    _check_complete(header, count)
    index += b"\0"
    tail = _END_OF_PAGES + bytes(index) + len(index).to_bytes(8, "big") + post_checksum.to_bytes(8, "big")
    yield tail + (crc64.go_iso(tail, crc) | _CHECKSUM_FLAG).to_bytes(8, "big")


def _varint(value: int) -> bytes:
    """Base 128, least significant group first (protobuf's and Go's unsigned varint)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

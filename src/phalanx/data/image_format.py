"""Database images as streams: the format of snapshots.

A packed image is an ordinary .lz4 file (``lz4 -d`` gives the database, without Phalanx) with two extra
frames, which lz4 skips; integers are little-endian::

    head      skippable frame 0x184D2A50: 4 bytes of size, JSON (:class:`ImageHead`)
    blocks    one LZ4 frame for every 4 MiB of the database
    tail      skippable frame 0x184D2A51: 4 bytes of size, JSON (:class:`ImageTail`)
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import lz4.frame
import msgspec

from phalanx.data import ltx
from phalanx.errors import DatabaseError

FORMAT = 1
BLOCK_BYTES = 4 << 20
_HEAD_MAGIC, _TAIL_MAGIC = 0x184D2A50, 0x184D2A51
_SKIPPABLE = struct.Struct("<II")
_MAX_JSON_BYTES = 1 << 16
_READ_BYTES = 1 << 18
_BLOCK_SIZE_4_MIB = 7
"""LZ4F_max4MB of lz4frame.h."""


class ImageHead(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is of. ``sequence`` is 0 where only the transaction is known, ``time_ms`` Unix time."""

    format: int = FORMAT
    page_size: int
    commit: int
    sequence: int = 0
    txid: int
    time_ms: int = 0

    @property
    def raw_bytes(self) -> int:
        """Of the database."""
        return self.page_size * self.commit


class ImageTail(msgspec.Struct, frozen=True):
    """The SHA-256 of the database, and that of the JSON of the head, in hexadecimal digits."""

    sha256: str
    head_sha256: str


def skippable(magic: int, content: msgspec.Struct) -> bytes:
    """A frame that LZ4 skips (lz4_Frame_format.md)."""
    data = msgspec.json.encode(content)
    return _SKIPPABLE.pack(magic, len(data)) + data


def parse_head(data: bytes) -> tuple[ImageHead, int] | None:
    """The head of a packed image, and its size; None while *data* is too short. Raises DatabaseError."""
    if len(data) < _SKIPPABLE.size:
        return None
    magic, size = _SKIPPABLE.unpack_from(data)
    if magic != _HEAD_MAGIC or size > _MAX_JSON_BYTES:
        raise DatabaseError("this is no packed image of a database")
    end = _SKIPPABLE.size + size
    if len(data) < end:
        return None
    try:
        head = msgspec.json.decode(data[_SKIPPABLE.size : end], type=ImageHead)
    except ValueError as error:  # msgspec's errors are ValueErrors, too
        raise DatabaseError(f"the head of the image is damaged: {error}") from None
    if head.format != FORMAT:
        raise DatabaseError(f"the image has format {head.format}", "use the version of Phalanx that wrote it")
    if not ltx.is_page_size(head.page_size) or not 1 <= head.commit < 1 << 32:
        raise DatabaseError(f"the image has {head.commit} pages of {head.page_size} bytes")
    return head, end


def parse_tail(end: bytes) -> ImageTail:
    """The tail of a packed image, whose last bytes are *end* (1 KB is enough). Raises DatabaseError."""
    begin = end.rfind(_TAIL_MAGIC.to_bytes(4, "little"))
    try:
        return msgspec.json.decode(end[begin + _SKIPPABLE.size :], type=ImageTail)
    except ValueError as error:  # msgspec's errors are ValueErrors, too
        raise DatabaseError(f"the tail of the image is damaged: {error}") from None


def packed(head: ImageHead, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The stream of an image whose content comes in *blocks* of up to BLOCK_BYTES.

    Compressed by one thread while another one reads and sums the next block.
    """
    begin = skippable(_HEAD_MAGIC, head)
    yield begin
    digest, pending = hashlib.sha256(), None
    with ThreadPoolExecutor(1) as pool:
        for block in blocks:
            following: Future[bytes] = pool.submit(_compress, block)
            digest.update(block)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
    yield skippable(_TAIL_MAGIC, ImageTail(digest.hexdigest(), _head_sum(begin)))


def _head_sum(frame: bytes) -> str:
    return hashlib.sha256(frame[_SKIPPABLE.size :]).hexdigest()


def _compress(block: bytes) -> bytes:
    return lz4.frame.compress(block, block_size=_BLOCK_SIZE_4_MIB, store_size=True)


class Unpacker:
    """Turns the bytes of a packed image into the database, piece by piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest, self._size = hashlib.sha256(), 0
        self.head = self._read_head()

    def _read_head(self) -> ImageHead:
        frame = self._read(_SKIPPABLE.size)
        frame += self._read(min(_SKIPPABLE.unpack(frame)[1], _MAX_JSON_BYTES))
        found = parse_head(frame)
        assert found is not None
        self._head_sum = _head_sum(frame)
        return found[0]

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise DatabaseError(f"the image ends after {self._size} bytes of the database")
        return data

    def blocks(self) -> Iterator[bytes]:
        """The database; the last block came before its checksum was compared. Raises DatabaseError."""
        rest = b""
        while True:
            rest += self._read(_SKIPPABLE.size - len(rest)) if len(rest) < _SKIPPABLE.size else b""
            magic, size = _SKIPPABLE.unpack_from(rest)
            if magic == _TAIL_MAGIC:
                break
            frame = lz4.frame.LZ4FrameDecompressor()
            while not frame.eof:
                more = rest or (self._read_some() if frame.needs_input else b"")
                try:
                    block = frame.decompress(more, max_length=BLOCK_BYTES)
                except (RuntimeError, MemoryError) as error:
                    raise DatabaseError(f"the image is damaged after {self._size} bytes: {error}") from None
                rest = b""
                self._size += len(block)
                if self._size > self.head.raw_bytes:
                    raise DatabaseError("the image holds more than its head says")
                self._digest.update(block)
                yield block
            rest = frame.unused_data or b""
        self._end(rest, size)

    def _read_some(self) -> bytes:
        data = self._file.read(_READ_BYTES)
        if not data:
            raise DatabaseError(f"the image ends after {self._size} bytes of the database")
        return data

    def _end(self, rest: bytes, size: int) -> None:
        if size > _MAX_JSON_BYTES:
            raise DatabaseError("the tail of the image is damaged")
        rest = rest[_SKIPPABLE.size :]
        rest += self._read(max(0, size - len(rest)))
        if len(rest) > size or self._file.read(1):
            raise DatabaseError("the image goes on after its tail")
        try:
            tail = msgspec.json.decode(rest, type=ImageTail)
        except ValueError as error:  # msgspec's errors are ValueErrors, too
            raise DatabaseError(f"the tail of the image is damaged: {error}") from None
        if tail.head_sha256 != self._head_sum:
            raise DatabaseError("the head of the image is damaged")
        if self._size != self.head.raw_bytes or tail.sha256 != self._digest.hexdigest():
            raise DatabaseError(
                f"the image is damaged: {self._size} bytes with SHA-256 {self._digest.hexdigest()}, "
                f"not {self.head.raw_bytes} with {tail.sha256}"
            )

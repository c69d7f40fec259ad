"""One record of the log, as the replica gets it: the bytes of an LTX file, or a file of any size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from phalanx.data import ltx
from phalanx.errors import LtxError

_INDEX_END = ltx.TRAILER_BYTES + 8
_NO_LAST_BYTES = bytes(range(0x80, 0x100))


class Record:
    """An open record. ``count`` pages, ``is_full``: all that the database has; both as its index says,
    which only the end of :meth:`pages` proves."""

    def __init__(self, file: BinaryIO) -> None:
        self.count = _count_pages(file)
        file.seek(0)
        self.header, self._pages = ltx.open_pages(file)
        self.is_full = self.count == ltx.page_count(self.header.commit, self.header.page_size)

    def pages(self) -> Iterator[ltx.Page]:
        """The pages, once. Raises LtxError, at the end for most that can be wrong with the file."""
        count = 0
        for page in self._pages:
            if page.number == 1 and page.data[18:20] != b"\2\2":
                raise LtxError("the database is not in WAL mode any more")
            count += 1
            yield page
        if count != self.count:
            raise LtxError(f"{count} pages, its index says {self.count}")


@contextlib.contextmanager
def open_record(data: bytes | Path) -> Generator[Record]:
    """Raises LtxError, OSError."""
    if isinstance(data, bytes):
        yield Record(io.BytesIO(data))
    else:
        with data.open("rb") as file:
            yield Record(file)


def _count_pages(file: BinaryIO) -> int:
    """By the index at the end: three numbers for each page, and a zero. The last byte of each is < 128."""
    size = file.seek(0, io.SEEK_END)
    if size < ltx.HEADER_BYTES + _INDEX_END:
        raise LtxError(f"{size} bytes are too few")
    file.seek(size - _INDEX_END)
    index_bytes = int.from_bytes(file.read(8), "big")
    if index_bytes > size - ltx.HEADER_BYTES - _INDEX_END:
        raise LtxError(f"an index of {index_bytes} bytes in a file of {size}")
    file.seek(size - _INDEX_END - index_bytes)
    return (len(file.read(index_bytes).translate(None, _NO_LAST_BYTES)) - 1) // 3

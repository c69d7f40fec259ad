"""What a WAL holds beyond the place up to which it was captured (sqlite.org/fileformat2, section 4).

Only the ``-wal`` file is read by hand: no lock of SQLite is on that one, so opening and closing it in a
process that also has connections does no harm.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

from phalanx.data.records import WalPlace

_HEADER_BYTES = 32
_FRAME_HEADER = struct.Struct(">6I")
_SALTS = struct.Struct(">II")
_SALTS_AT = 16


class WalTail:
    """Looks at one WAL."""

    def __init__(self, wal: Path) -> None:
        self._wal = wal
        self._descriptor = -1
        self._sequence_page = 0

    def learn(self, sequence_page: int) -> None:
        """Which page Litestream writes after each checkpoint; 0: unknown. The WAL may be another file now."""
        self._sequence_page = sequence_page
        self.close()

    def is_only_ours(self, end: WalPlace | None) -> bool:
        """Whether nothing follows *end* but the row that Litestream writes by itself after a checkpoint.

        A checkpoint that could not restart the WAL (somebody reads) is tried again by the next sync, and
        writes such a row each time: to answer each with a sync would go on for ever. False when in doubt.
        """
        if end is None or not self._sequence_page:
            return False
        frame_bytes = _FRAME_HEADER.size + end.page_size
        try:
            header = self._read(_HEADER_BYTES, 0)
            frames = self._read(frame_bytes + _FRAME_HEADER.size, end.offset)
        except OSError:
            return False
        salts = (end.salt1, end.salt2)
        if len(header) < _HEADER_BYTES or _SALTS.unpack_from(header, _SALTS_AT) != salts:
            return False
        if len(frames) < _FRAME_HEADER.size:
            return False
        number, commit, *rest = _FRAME_HEADER.unpack_from(frames)
        if tuple(rest[:2]) != salts or not commit or number != self._sequence_page:
            return False
        if len(frames) < frame_bytes + _FRAME_HEADER.size:
            return True
        return tuple(_FRAME_HEADER.unpack_from(frames, frame_bytes)[2:4]) != salts

    def reaches(self, end: WalPlace, frames: int) -> bool:
        """Whether the WAL has that many frames, if it is still the one of *end*. False when in doubt."""
        try:
            head = self._read(
                _FRAME_HEADER.size, _HEADER_BYTES + (frames - 1) * (_FRAME_HEADER.size + end.page_size)
            )
        except OSError:
            return False
        return len(head) == _FRAME_HEADER.size and _FRAME_HEADER.unpack(head)[2:4] == (end.salt1, end.salt2)

    def _read(self, size: int, offset: int) -> bytes:
        if self._descriptor < 0:
            self._descriptor = os.open(self._wal, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._descriptor, size, offset)

    def flush(self) -> None:
        """Put what it has on the disk, as far as that is possible. Blocks; for any thread."""
        with contextlib.suppress(OSError), open(self._wal, "rb") as file:
            os.fdatasync(file.fileno())

    def close(self) -> None:
        """Let go of the file. Twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

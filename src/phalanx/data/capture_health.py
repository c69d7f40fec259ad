"""Whether what is committed gets captured at present: since when not, why, and how much waits in the WAL.

A capture that fails goes on trying, and the WAL keeps what was committed meanwhile. That is no loss as long
as this node lives, but nothing of it would survive the node: so it is said, and counted.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from phalanx import system
from phalanx.data.records import WalPlace
from phalanx.data.sqlite_wal import FRAME_HEADER_BYTES, WAL_HEADER_BYTES, decode_wal_header
from phalanx.data.wal_index import Mark

GRACE_SECONDS = 2.0
"""So long it may fail before that counts: one restart of Litestream takes a tenth of it."""


class CaptureHealth:
    """Of one capture, which tells it what happens."""

    def __init__(self) -> None:
        self._complete_until = system.wall()
        self._why, self._failing_since = "", 0.0

    def completed(self, until: float) -> None:
        """All that was committed before *until*, Unix seconds, is in files."""
        self._complete_until, self._why = until, ""

    def failed(self, why: str) -> None:
        """It did not work just now."""
        if not self._why:
            self._failing_since = system.now()
        self._why = why

    def reset(self) -> None:
        """There is nothing to capture now."""
        self.completed(system.wall())

    @property
    def trouble(self) -> str:
        """``since 2026-01-31T12:00:00Z: why``, once it has failed for longer than the grace; else empty."""
        if not self._why or system.now() - self._failing_since < GRACE_SECONDS:
            return ""
        since = datetime.fromtimestamp(self._complete_until, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"since {since}: {self._why}"


def uncaptured_bytes(wal: Path, mark: Mark | None, end: WalPlace | None) -> int:
    """How much of *wal* is committed, up to *mark*, and in no file: those go up to *end*.

    0 where there is no WAL. An upper bound where it was begun anew since.
    """
    if mark is None or mark.frames == 0:
        return 0
    if end is not None and (end.salt1, end.salt2) == (mark.salt1, mark.salt2):
        frame_bytes = FRAME_HEADER_BYTES + end.page_size
        return max(0, WAL_HEADER_BYTES + mark.frames * frame_bytes - end.offset)
    try:
        with wal.open("rb") as file:
            header = decode_wal_header(file.read(WAL_HEADER_BYTES))
    except OSError:
        return 0
    return mark.frames * (FRAME_HEADER_BYTES + header.page_size) if header is not None else 0

"""The LTX files that a reign has left in the folder of its capture, as of one look.

There may be hundreds of thousands of them, where NATS was away for long: everything here blocks, and belongs
into a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from phalanx.data import ltx
from phalanx.decide.settling import Place
from phalanx.errors import LtxError

log = logging.getLogger("phalanx.data")


class CapturedFiles:
    """Of one database, in its *folder*."""

    def __init__(self, folder: Path) -> None:
        self._level0 = folder / "capture" / "ltx" / "0"
        try:
            names = os.listdir(self._level0)
        except FileNotFoundError:
            names = []
        found = [txids[1] for name in names if (txids := ltx.parse_file_name(name)) is not None]
        self._txids = sorted(found)

    @property
    def last(self) -> int:
        """The newest transaction, 0 if there is none."""
        return self._txids[-1] if self._txids else 0

    def __contains__(self, txid: int) -> bool:
        return txid in self._txids

    def place_after(self, logged_txid: int) -> Place | None:
        """Where in which WAL the transactions up to that one end; None where no file tells."""
        if (place := self.end_of(logged_txid)) is not None or logged_txid + 1 not in self._txids:
            return place
        # One that holds every page begins where its WAL does, not where the one before ended.
        with contextlib.suppress(LtxError, OSError), self._path(logged_txid + 1).open("rb") as file:
            if not ltx.holds_every_page(file):
                file.seek(0)
                header = ltx.decode_header(file.read(ltx.HEADER_BYTES))
                return Place(header.wal_salt1, header.wal_salt2, header.wal_offset)
        return None

    def end_of(self, txid: int) -> Place | None:
        """Where in which WAL the file of that transaction ends; None where it is not there, or unreadable."""
        try:
            with self._path(txid).open("rb") as file:
                return place_after(ltx.decode_header(file.read(ltx.HEADER_BYTES)))
        except FileNotFoundError:
            return None
        except (LtxError, OSError) as error:
            log.warning("captured file %s tells nothing: %s", self._path(txid), error)
            return None

    def count_after(self, logged_txid: int) -> int:
        """How many files after those of *logged_txid* hold a transaction each, at least. One that holds every
        page may have been made after a gap, and hold nothing new."""
        count = 0
        for txid in self._after(logged_txid):
            # A file that cannot be read counts for nothing: the number is a lower bound.
            with contextlib.suppress(LtxError, OSError), self._path(txid).open("rb") as file:
                count += not ltx.holds_every_page(file)
        return count

    def drop_broken_chain(self, logged_txid: int) -> None:
        """Remove all of them if they cannot follow on the log's last transaction: some between are gone.

        So it is where NATS has lost what was shipped: the next record then holds every page.
        """
        if self._after(logged_txid) != list(range(logged_txid + 1, self.last + 1)):
            log.warning("%s: captured files do not follow on %d", self._level0, logged_txid)
            self.drop()

    def drop(self) -> None:
        """Remove all of them: the next record then holds every page."""
        for txid in self._txids:
            self._path(txid).unlink()

    def _after(self, txid: int) -> list[int]:
        return [each for each in self._txids if each > txid]

    def _path(self, txid: int) -> Path:
        return self._level0 / ltx.file_name(txid, txid)


def place_after(header: ltx.Header) -> Place:
    """Where in which WAL the file with *header* ends."""
    return Place(header.wal_salt1, header.wal_salt2, header.wal_offset + header.wal_size)

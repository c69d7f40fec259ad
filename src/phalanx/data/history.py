"""Whether the log still is the one that was applied to a replica.

NATS servers that lose power together may lose their last writes, although they acknowledged them, and then
store others under the same sequences. The first of these is always the seal of a new reign. So the log is the
same one as long as

* the entry at the replica's position is of the transaction that was applied there, and
* the last seal that was applied is still there, with its nonce:

had another seal come after that one, sequences and transactions would have moved against each other.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path

import msgspec

from phalanx.data.entries import Claim, Foreign, LogEntry, Seal
from phalanx.data.log import LOST_WRITES, WalLog
from phalanx.errors import BusTimeout, DatabaseError
from phalanx.types import Position

log = logging.getLogger("phalanx.following")

REMEMBERED = 4096
"""Nonces of the last entries that were taken, to know them again at once."""


class _LastSeal(msgspec.Struct, frozen=True):
    """The last seal that was applied to the replica in the file *replica*."""

    replica: str
    sequence: int
    nonce: str


class History:
    """What was taken from the log for one replica. *file* keeps its last seal across starts."""

    def __init__(self, wal_log: WalLog, file: Path | None) -> None:
        self._log, self._file = wal_log, file
        self._nonces: OrderedDict[int, str] = OrderedDict()
        self._seal: _LastSeal | None = None

    def open(self, replica: str) -> None:
        """Read what an earlier start has remembered of the replica in that file. Blocks, briefly."""
        self._seal = None
        if self._file is None:
            return
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=_LastSeal)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s cannot be read, and is not used: %s", self._file, error)
            return
        if found.replica == replica:  # else it was made anew meanwhile
            self._seal = found

    def take(self, entry: LogEntry) -> None:
        """*entry* is about to be applied."""
        self._nonces[entry.sequence] = entry.nonce
        if len(self._nonces) > REMEMBERED:
            self._nonces.popitem(last=False)

    def knows(self, entry: LogEntry) -> bool:
        """Whether it is, for certain, what was taken there."""
        return self._nonces.get(entry.sequence) == entry.nonce

    def applied(self, entry: LogEntry, replica: str) -> None:
        """*entry* was applied to the replica in that file. Blocks briefly where it is a seal."""
        seal = self._seal
        if isinstance(entry, Seal):
            self._seal = _LastSeal(replica, entry.sequence, entry.nonce)
        elif seal is not None and seal.replica != replica:
            self._seal = _LastSeal(replica, seal.sequence, seal.nonce)
        if self._seal is not seal:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        fresh = self._file.with_name(f"{self._file.name}.new")
        try:
            # Not synced: it matters only where NATS has lost writes, and it must not delay a takeover.
            fresh.write_bytes(msgspec.json.encode(self._seal))
            fresh.replace(self._file)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._file, error)

    async def verify(self, applied: Position, first: int) -> int:
        """Compare the log, which begins at *first*, with what was applied; the epoch there, 0 if unknown.

        Raises DatabaseError when it is another one, BusError when that cannot be told now.
        """
        seal = self._seal
        if seal is not None and first <= seal.sequence <= applied.sequence:
            entry = await self._entry(seal.sequence)
            if entry is not None and entry.nonce != seal.nonce:
                raise _lost(entry, f"the seal at {seal.sequence}")
        if not first <= applied.sequence:
            return 0
        entry = await self._entry(applied.sequence)
        if entry is None or isinstance(entry, Claim | Foreign):
            return 0
        known = self._nonces.get(entry.sequence, entry.nonce)
        if entry.txid != applied.txid or entry.nonce != known:
            raise _lost(entry, str(applied))
        return entry.epoch

    async def _entry(self, sequence: int) -> LogEntry | None:
        """What the log holds there; None if it was purged meanwhile."""
        page = await self._log.read(sequence, limit=1, max_bytes=1)
        if not page:
            raise BusTimeout("verify the log", "the replica that answers is behind")
        return page[0] if page[0].sequence == sequence else None


def _lost(entry: LogEntry, what: str) -> DatabaseError:
    return DatabaseError(
        f"the log holds something else at {entry.sequence} (epoch {getattr(entry, 'epoch', 'unknown')}) than "
        f"{what}, which was applied: {LOST_WRITES}"
    )

"""Keeps the programs of a live database from checkpoints that cannot come to anything.

Litestream reads from behind the whole log (READ_LOCK 0 of the index), so nobody but itself moves the log into
the file. From 1000 frames on each commit of a program tries that all the same, in vain, and sorts the index
for it first (wal.c, walCheckpoint): 0.1 ms at 2000 frames, 1 ms at 16,000. With the checkpoint lock held by
somebody else it gets SQLITE_BUSY before it begins, which an automatic checkpoint ignores.

It is a lock for a moment only: it goes by itself :data:`GATE_SECONDS` after it was last asked for. So it
outlives neither a node that hangs, nor Litestream; and whoever needs that lock to recover the index of a
program that was killed in the middle of a commit waits no longer (SQLite tries for 10 s).

This is for the replica process: it has no connection to the live database whose locks would be lost when the
index is closed here.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from phalanx.data.file_locks import EXCLUSIVE, lock_holder, set_lock
from phalanx.data.sqlite_wal import CHECKPOINT_LOCK, WRITE_LOCK
from phalanx.data.wal_files import index_path

GATE_SECONDS = 1.0
"""So long is the lock held unless it is asked for again."""

TRY_SECONDS = 0.005
"""How long somebody else's checkpoint is waited for, without a pause."""
PASS_POLL_SECONDS = 0.0003
"""Between looks at who has the write lock. Litestream syncs before it checkpoints: that takes longer."""


class CheckpointGate:
    """The checkpoint lock of one live database at a time; open at first."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._until = 0.0
        self._passing = 0

    @property
    def look_seconds(self) -> float | None:
        """After so long :meth:`look` has to be called; None while the gate is open."""
        if self._descriptor < 0:
            return None
        return PASS_POLL_SECONDS if self._passing else max(0.001, self._until - time.monotonic())

    def look(self) -> None:
        """Open the gate if it is time, or if whoever may pass has come."""
        if self._descriptor < 0:
            return
        has_come = self._passing and lock_holder(self._descriptor, WRITE_LOCK) in (self._passing, None)
        if has_come or time.monotonic() >= self._until:
            self.open()

    def close(self, live: Path, passing: int = 0) -> bool:
        """Take the lock, or keep it for another :data:`GATE_SECONDS`; whether it is ours now.

        It is not while somebody checkpoints, or where there is no index. *passing*: a process that is let
        through: the gate opens as soon as it has the write lock, so that nobody else can come after it.
        Raises OSError.
        """
        index = index_path(live)
        if self._descriptor >= 0 and not _is_at(self._descriptor, index):
            self.open()  # the file was made anew, and nobody locks the old one
        if self._descriptor < 0 and not self._take(index):
            return False
        self._until, self._passing = time.monotonic() + GATE_SECONDS, passing
        return True

    def _take(self, index: Path) -> bool:
        try:
            descriptor = os.open(index, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        # Under a flood the lock is free for microseconds only, between two attempts of the program.
        deadline = time.monotonic() + TRY_SECONDS
        try:
            while not set_lock(descriptor, CHECKPOINT_LOCK, 1, EXCLUSIVE):
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def open(self) -> None:
        """Let go of the lock, if it is held."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False

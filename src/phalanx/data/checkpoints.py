"""The checkpoints of a live database while it is captured: Litestream's, and nobody else's in between.

Litestream checkpoints at the end of a sync, under the database's write lock: all who write wait. So it is not
to do so often, nor to have more to put on the disk then than it must. In between, programs had better not
try (``data.checkpoint_gate`` says why): the gate is closed while the WAL is long or grows fast. It is open
during each sync at whose end Litestream will checkpoint, and while a program writes as fast as it can, it
lets Litestream pass in any sync. A gate that opened too late costs an attempt in vain; the next sync
checkpoints.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from phalanx import system
from phalanx.data.checkpoint_gate import GATE_SECONDS
from phalanx.data.litestream import CHECKPOINT_SECONDS, Paths
from phalanx.data.records import WalPlace, frames_between
from phalanx.data.wal_tail import WalTail
from phalanx.errors import DatabaseError

Gate = Callable[[bool, int], Awaitable[bool]]
"""Closes the gate (True) for ``GATE_SECONDS``, for all but one process (0: for all), or opens it; whether it
is closed then. May raise DatabaseError."""

CHECKPOINT_BYTES = 64 << 20
"""About so long the WAL becomes before Litestream checkpoints it. Each time programs wait for some 20 ms."""
LEAST_PAGES = 1000
FLUSH_BYTES = 4 << 20
"""Whenever so much has been captured, the WAL is put on the disk: beforehand, not within a checkpoint."""
FLUSH_SECONDS = 0.01
"""The pause in which it is left alone, while a sync goes on."""
CLOSE_FRAMES = 900
"""From so many frames on programs are kept from checkpoints: by default they begin at 1000."""
BUSY_FRAMES = 64
"""A sync that has captured more than so many pages found a program that writes as fast as it can."""
RETRY_SECONDS = 5.0
"""A gate that has failed is left alone for so long: its process may hang, and no sync is to wait for it."""

_MARGIN_SECONDS = 2.0
_ANSWER_SECONDS = 0.5


def checkpoint_pages(page_size: int) -> int:
    """From how many pages on Litestream is to checkpoint."""
    return max(LEAST_PAGES, CHECKPOINT_BYTES // page_size)


class Checkpoints:
    """Of one live database. *gate*: that of the process that has the lock; None: programs do as they like."""

    def __init__(self, paths: Paths, tail: WalTail, gate: Gate | None) -> None:
        self._paths, self._tail, self._gate = paths, tail, gate
        self._closed_until = self._retry_at = 0.0
        self._is_busy = False
        self._unflushed = 0
        self._flushes = False
        self._flusher: asyncio.Task[None] | None = None

    async def before_sync(self, end: WalPlace | None, litestream: int, *, hurried: bool) -> None:
        """Everything is captured up to *end*. Lets the process *litestream* checkpoint in this sync, if it
        may want to. *hurried*: somebody waits for the sync: nothing else is to keep the disk busy."""
        if end is None:
            return
        if (self._is_busy or self._unflushed >= FLUSH_BYTES) and not hurried:
            self._unflushed = 0
            self._start_flushing()
        if self._closed_until <= system.now():
            return
        if self._is_busy:
            await self._ask(True, litestream)
            self._closed_until = 0.0  # it may open by itself at any moment
        elif self._is_due(end):
            await self._ask(False, 0)

    def _is_due(self, end: WalPlace) -> bool:
        """Whether Litestream will checkpoint, if the program goes on as calmly as until now."""
        if self._tail.reaches(end, checkpoint_pages(end.page_size) - BUSY_FRAMES):
            return True
        try:
            age = system.wall() - os.stat(self._paths.live).st_mtime
        except OSError:
            return True
        return age > CHECKPOINT_SECONDS - _MARGIN_SECONDS

    async def after_sync(self, before: WalPlace | None, end: WalPlace | None) -> None:
        """The sync has captured what lies between. Closes the gate, if that is of use."""
        self._flushes = False
        if end is None:
            return
        frames = frames_between(before, end)
        restarted = before is not None and (before.salt1, before.salt2) != (end.salt1, end.salt2)
        # Little is in a WAL that was just begun anew, whoever writes.
        self._is_busy = frames > BUSY_FRAMES or (self._is_busy and restarted)
        self._unflushed = 0 if restarted else self._unflushed + frames * end.page_size
        if not self._is_busy and frames_between(None, end) < CLOSE_FRAMES:
            return
        if system.now() >= self._retry_at and self._closed_until - system.now() < GATE_SECONDS * 2 / 3:
            await self._ask(True, 0)

    async def end(self) -> None:
        """There are no syncs for now: everybody may checkpoint."""
        self._flushes = False
        if self._flusher is not None:
            self._flusher.cancel()  # its thread ends by itself
            await asyncio.wait({self._flusher})
        await self._ask(False, 0)

    def _start_flushing(self) -> None:
        self._flushes = True
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name="capture, flushing")

    async def _flush(self) -> None:
        """Once, and again and again for as long as the sync lasts: the program writes on."""
        while True:
            await asyncio.to_thread(self._tail.flush)
            await asyncio.sleep(FLUSH_SECONDS)
            if not self._flushes:
                return

    async def _ask(self, closed: bool, passing: int) -> None:
        if self._gate is None:
            return
        asked, self._closed_until = system.now(), 0.0
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                if await self._gate(closed, passing):
                    self._closed_until = asked + GATE_SECONDS
        except (DatabaseError, TimeoutError):
            # Commits are slower, and nothing is lost; what the process has is told by its owner.
            self._retry_at = system.now() + RETRY_SECONDS

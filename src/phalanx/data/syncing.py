"""One call to Litestream after the other, with an eye on it: it may refuse, hang or end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from phalanx import system
from phalanx.data.control_socket import Lost, Refused
from phalanx.data.litestream import Litestream

log = logging.getLogger("phalanx.capture")

FAILING_SECONDS = 10.0
"""So long may syncs be refused before a new Litestream is tried."""
FAILING_AT_FIRST_SECONDS = 3.0
"""So long before its first sync: then something is wrong from the start."""
PROGRESS_SECONDS = 1.0
"""How often a sync that takes long is looked at for progress."""

_FIRST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 1.0
_EXIT_POLLS, _EXIT_POLL_SECONDS = 50, 0.002
_DISK_FULL = ("no space left on device", "disk full", "disk quota exceeded", "database or disk is full")


class RunEnded(Exception):
    """A run of Litestream is over: what to report, and whether the next one begins with a full record.

    *withdrawn*: what it has written last is no good, and that is over: the next run may begin at once.
    """

    def __init__(self, kind: str, detail: str, *, full: bool = False, withdrawn: bool = False) -> None:
        self.kind, self.detail, self.full, self.withdrawn = kind, detail, full, withdrawn
        super().__init__(detail)


class Syncing:
    """Syncs, for as long as Litestream and the disk let it. *progress*: gives what changes while it works.
    *on_failure*: called with the reason each time that it has not worked."""

    def __init__(
        self,
        progress: Callable[[], object],
        stall_seconds: float,
        on_event: Callable[[str, str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._progress, self._stall_seconds = progress, stall_seconds
        self._on_event, self._on_failure = on_event, on_failure
        self._disk_full = False

    async def sync(self, litestream: Litestream, check: Callable[[], None], *, first: bool) -> int:
        """The last transaction that is in a file then. Refusals are answered by trying again.

        *check* is called before each further attempt, and may raise. Raises RunEnded: it has exited, hangs,
        or has refused for too long (a full disk is waited for, however long that takes).
        """
        failing_since, pause = 0.0, _FIRST_RETRY_SECONDS
        limit = FAILING_AT_FIRST_SECONDS if first else FAILING_SECONDS
        while True:
            try:
                txid = await self._once(litestream)
            except Lost as error:
                raise await self._lost(litestream, error) from None
            except Refused as error:
                now = system.now()
                self._on_failure(f"Litestream cannot sync: {error}")
                if not failing_since:
                    failing_since = now
                    log.warning("Litestream cannot sync, trying on: %s", error)
                if is_disk_full(str(error)):
                    self.note_full_disk(str(error))
                elif now - failing_since > limit:
                    raise RunEnded("failing", f"Litestream cannot sync: {error}") from None
            else:
                if self._disk_full:
                    self._disk_full = False
                    self._on_event("disk-recovered", "there is room again; what was committed is captured")
                return txid
            await asyncio.sleep(pause)
            check()
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)

    def note_full_disk(self, detail: str) -> None:
        """Reported once, until a sync has worked again."""
        if not self._disk_full:
            self._disk_full = True
            self._on_event("disk-full", detail)

    async def _lost(self, litestream: Litestream, error: Lost) -> RunEnded:
        # The connection breaks a moment before the process can be seen to have ended.
        for _ in range(_EXIT_POLLS):
            if litestream.exited:
                return RunEnded("exited", f"Litestream {litestream.how}")
            await asyncio.sleep(_EXIT_POLL_SECONDS)
        return RunEnded("stalled", f"Litestream runs, but does not answer: {error}")

    async def _once(self, litestream: Litestream) -> int:
        """With a deadline that moves on while there is progress."""
        loop = asyncio.get_running_loop()
        seen: object = None
        try:
            async with asyncio.timeout(self._stall_seconds) as deadline:

                def look() -> None:
                    nonlocal seen, timer
                    if (now := self._progress()) != seen:
                        seen = now
                        deadline.reschedule(loop.time() + self._stall_seconds)
                    else:
                        self._on_failure("a sync gets nowhere")
                    timer = loop.call_later(PROGRESS_SECONDS, look)

                timer = loop.call_later(PROGRESS_SECONDS, look)
                try:
                    return await litestream.sync()
                finally:
                    timer.cancel()
        except TimeoutError:
            detail = f"a sync got nowhere for {self._stall_seconds:g} s; {await litestream.diagnosis()}"
            raise RunEnded("stalled", detail) from None


def is_disk_full(text: str) -> bool:
    """Whether an error's text says that the disk is full."""
    lower = text.lower()
    return any(words in lower for words in _DISK_FULL)

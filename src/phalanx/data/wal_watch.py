"""Tells when the WAL of a database changes: inotify on the file, and on its folder for what comes and goes.

Events are read only when somebody has time for them: until then the kernel keeps equal ones as one, so a
thousand commits cost no more than one (inotify(7), "coalesced").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

if sys.platform == "linux":
    from asyncinotify import Inotify, Mask, Watch

log = logging.getLogger("phalanx.capture")

POLL_SECONDS = 0.02
"""How often the files are looked at where the system tells nothing of changes."""


class WalWatch:
    """Calls *wake* once when something may have changed since the last :meth:`take`, while armed."""

    def __init__(self, live: Path, wake: Callable[[], None]) -> None:
        self._live, self._wal, self._wake = live, live.with_name(live.name + "-wal"), wake
        self._loop = asyncio.get_running_loop()
        self._armed = False
        self._open_linux() if sys.platform == "linux" else self._open_polling()

    if sys.platform == "linux":

        def _open_linux(self) -> None:
            # A timeout of 0: its flag for not waiting is none (in 4.4 it is that for close-on-exec).
            self._inotify = Inotify(cache_size=4, sync_timeout=0)
            os.set_blocking(self._inotify.fd, False)
            self._wal_watch: Watch | None = None
            self._file_watch: Watch | None = None
            try:
                self._add(self._live.parent, Mask.CREATE | Mask.MOVE | Mask.DELETE | Mask.ONLYDIR)
                self._watch_wal()
            except BaseException:
                self._inotify.close()
                raise

        def _add(self, path: Path, mask: Mask) -> Watch:
            return self._inotify.add_watch(path, mask)  # pyright: ignore[reportUnknownMemberType]

        def _watch_wal(self) -> None:
            # The path may be another file now. Whether the old watch is gone already does not matter.
            if self._wal_watch is not None:
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(self._wal_watch)
            self._wal_watch = None
            with contextlib.suppress(FileNotFoundError):
                self._wal_watch = self._add(self._wal, Mask.MODIFY)

        def watch_file(self) -> None:
            """Also tell of changes of the database file itself: a program makes it empty first."""
            with contextlib.suppress(FileNotFoundError):
                self._file_watch = self._add(self._live, Mask.MODIFY)

        def unwatch_file(self) -> None:
            """Do not any more: every checkpoint changes it."""
            if self._file_watch is not None:
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(self._file_watch)
                self._file_watch = None

        def take(self) -> bool:
            """Whether something has changed since the last time."""
            changed = replaced = False
            while (event := self._inotify.sync_get()) is not None:
                name = event.name
                if name is None:
                    changed = True  # of the file itself; or events were lost, which comes to the same
                elif name.name in (self._live.name, self._wal.name):
                    changed = True
                    replaced = replaced or name.name == self._wal.name
            if replaced:
                self._watch_wal()
            return changed

        def arm(self) -> None:
            """From now on *wake* is called, once."""
            if not self._armed:
                self._armed = True
                self._loop.add_reader(self._inotify.fd, self._readable)

        def _readable(self) -> None:
            self.disarm()
            self._wake()

        def disarm(self) -> None:
            """Do not call *wake* any more."""
            if self._armed:
                self._armed = False
                self._loop.remove_reader(self._inotify.fd)

        def close(self) -> None:
            """End the watch. Twice is harmless."""
            self.disarm()
            self._inotify.close()

    else:

        def _open_polling(self) -> None:
            self._seen = self._look()
            self._timer: asyncio.TimerHandle | None = None

        def _look(self) -> object:
            found: list[tuple[int, int, int]] = []
            for path in (self._wal, self._live):
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            return found

        def watch_file(self) -> None: ...

        def unwatch_file(self) -> None: ...

        def take(self) -> bool:
            before, self._seen = self._seen, self._look()
            return before != self._seen

        def arm(self) -> None:
            if not self._armed:
                self._armed = True
                self._timer = self._loop.call_later(POLL_SECONDS, self._poll)

        def _poll(self) -> None:
            if self._look() != self._seen:
                self._armed = False
                self._wake()
            else:
                self._timer = self._loop.call_later(POLL_SECONDS, self._poll)

        def disarm(self) -> None:
            self._armed = False
            if self._timer is not None:
                self._timer.cancel()

        def close(self) -> None:
            self.disarm()

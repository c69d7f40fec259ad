"""Tells when the WAL of a database changes: inotify on the file, and on its folder for what comes and goes.

Events are read only when somebody has time for them: until then the kernel keeps equal ones as one, so a
thousand commits cost no more than one (inotify(7), "coalesced").

Where the system has no inotify or refuses it (its limits, a file that this user may not read), the files are
looked at instead: that costs a little, and a commit may be seen some milliseconds later.
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
    """Calls *wake* once when something may have changed since the last :meth:`take`, while armed.

    No method raises: what inotify refuses is polled from then on, until :meth:`renew`.
    """

    def __init__(self, live: Path, wake: Callable[[], None]) -> None:
        self._live, self._wake = live, wake
        self._told: set[int | None] = set()
        self._inotify: _Notices | None = None
        self._polling = _Polling(live, wake)
        self._open()

    @property
    def is_polling(self) -> bool:
        """Whether the files are looked at again and again."""
        return self._inotify is None

    def _open(self) -> None:
        if sys.platform == "linux":
            try:
                self._inotify = _Notices(self._live, self._wake)
            except OSError as error:
                self._fall_back(error)

    def _fall_back(self, error: OSError) -> None:
        notices, self._inotify = self._inotify, None
        if notices is not None:
            if notices.is_armed:
                self._polling.arm()
            notices.close()
        if error.errno not in self._told:
            self._told.add(error.errno)
            where, why = error.filename or self._live, error.strerror or error
            log.warning("inotify is refused for %s (%s): it is polled every %g s", where, why, POLL_SECONDS)

    def renew(self) -> None:
        """Try inotify again where it was refused. Only while not armed."""
        if self._inotify is None:
            self._open()

    def watch_file(self) -> None:
        """Also tell of changes of the database file itself: a program makes it empty first."""
        if self._inotify is not None:
            try:
                self._inotify.watch_file()
            except OSError as error:
                self._fall_back(error)

    def unwatch_file(self) -> None:
        """Do not any more: every checkpoint changes it."""
        if self._inotify is not None:
            self._inotify.unwatch_file()

    def take(self) -> bool:
        """Whether something may have changed since the last time."""
        if self._inotify is None:
            return self._polling.take()
        try:
            return self._inotify.take()
        except OSError as error:
            self._fall_back(error)
            return True

    def arm(self) -> None:
        """From now on *wake* is called, once."""
        (self._inotify or self._polling).arm()

    def disarm(self) -> None:
        """Do not call *wake* any more."""
        (self._inotify or self._polling).disarm()

    def close(self) -> None:
        """End the watch. Twice is harmless."""
        self._polling.disarm()
        if self._inotify is not None:
            self._inotify.close()


class _Polling:
    """Looks at the files while armed."""

    def __init__(self, live: Path, wake: Callable[[], None]) -> None:
        self._paths, self._wake = (live.with_name(live.name + "-wal"), live), wake
        self._seen: object = None
        self._timer: asyncio.TimerHandle | None = None

    def _look(self) -> object:
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = os.stat(path)
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append(None)
        return found

    def take(self) -> bool:
        before, self._seen = self._seen, self._look()
        return before != self._seen

    def arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        self._timer = None
        if self._look() != self._seen:
            self._wake()
        else:
            self.arm()

    def disarm(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


if sys.platform == "linux":

    class _Notices:
        """What inotify tells. Every method but :meth:`disarm` and :meth:`close` may raise OSError."""

        def __init__(self, live: Path, wake: Callable[[], None]) -> None:
            self._live, self._wal, self._wake = live, live.with_name(live.name + "-wal"), wake
            self._loop = asyncio.get_running_loop()
            self.is_armed = False
            # A timeout of 0: its flag for not waiting is none (in 4.4 it is that for close-on-exec).
            self._inotify = Inotify(cache_size=4, sync_timeout=0)
            os.set_blocking(self._inotify.fd, False)
            self._wal_watch: Watch | None = None
            self._file_watch: Watch | None = None
            try:
                self._add(live.parent, Mask.CREATE | Mask.MOVE | Mask.DELETE | Mask.ONLYDIR)
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
            with contextlib.suppress(FileNotFoundError):
                self._file_watch = self._add(self._live, Mask.MODIFY)

        def unwatch_file(self) -> None:
            if self._file_watch is not None:
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(self._file_watch)
                self._file_watch = None

        def take(self) -> bool:
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
            if not self.is_armed:
                self.is_armed = True
                self._loop.add_reader(self._inotify.fd, self._readable)

        def _readable(self) -> None:
            self.disarm()
            self._wake()

        def disarm(self) -> None:
            if self.is_armed:
                self.is_armed = False
                self._loop.remove_reader(self._inotify.fd)

        def close(self) -> None:
            self.disarm()
            self._inotify.close()

"""Captures the commits of an app's live database while this node is active: Litestream, looked after.

Every change of the WAL makes Litestream read it at once, and what it wrote is announced (``on_captured``).
Litestream is restarted when it ends, when it hangs, and when it cannot be trusted any more; commits are not
lost meanwhile, as the guard (``data.wal_guard``) keeps the WAL, and a gap is made good by a full record
(``data.records``). What the program may do to its files is noticed before anything captured is announced:

* its own checkpoints, VACUUM, any page size: nothing to notice. ``journal_mode = DELETE`` fails: the file is in use.
* another file at the path, or none: Litestream and the guard begin anew with it, by a full record.
* the ``-wal`` removed, or the file replaced without it: the program itself works on pages that are nowhere any
  more. Nobody can mend that from outside; ``failed`` says so, and the program has to be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from phalanx import child, system
from phalanx.data.control_socket import Lost, Refused
from phalanx.data.litestream import Litestream, Paths, check_path
from phalanx.data.records import Records
from phalanx.data.wal_guard import WalGuard
from phalanx.data.wal_tail import WalTail
from phalanx.data.wal_watch import WalWatch
from phalanx.errors import DatabaseError, PhalanxError, SyncTimeout
from phalanx.ports import SectionContext
from phalanx.types import Resource

log = logging.getLogger("phalanx.capture")

PACE_SECONDS = 0.008
"""The least time from one start of a sync to the next while commits keep coming. Each sync costs two fsyncs, a
file and some 1 ms of a core, which the program's own commits compete with. A commit after a rest does not wait."""
LOOK_SECONDS = 5.0
"""How often it is synced although nothing seems to have changed: a Litestream that hangs is noticed so."""
STALL_SECONDS = 10.0
"""So long may a sync take without any sign of progress before Litestream is killed."""
FAILING_SECONDS = 10.0
"""So long may syncs be refused before a new Litestream is tried."""
FIRST_SYNC_SECONDS = 5.0
"""How long the start waits for the first sync. It goes on behind it where a large file is captured whole."""
FIRST_RESTART_SECONDS = 0.0
NEXT_RESTART_SECONDS = 0.2
LONGEST_RESTART_SECONDS = 5.0
SETTLED_SECONDS = 30.0
"""A Litestream that has run so long is restarted at once again."""
REPLACED_SECONDS = 0.25
"""Who replaces a database removes its WAL first; so long it may take until the new one is there."""

_FIRST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 1.0
_PROGRESS_LOOK_SECONDS = 1.0
_DISK_FULL = ("no space left on device", "disk full", "disk quota exceeded", "database or disk is full")

T = TypeVar("T")
OnEvent = Callable[[str, str], None]


class _Ended(Exception):
    """This run of Litestream is over: what to report, and whether the next one begins with a full record."""

    def __init__(self, kind: str, detail: str, *, full: bool = False) -> None:
        self.kind, self.detail, self.full = kind, detail, full
        super().__init__(detail)


class _Broken(Exception):
    """Nothing can be captured until the program has been stopped."""


class Capture:
    """Of one live database, for one active section.

    *on_captured*: called with the last captured transaction whenever it has grown. *on_event*: (kind, detail)
    for the audit trail. Kinds: ``started``, ``exited``, ``stalled``, ``failing``, ``disk-full``,
    ``disk-recovered``, ``gap``, ``database-replaced``, ``database-deleted``, ``broken``. Both are called from
    the event loop.
    """

    def __init__(
        self,
        live: Path,
        folder: Path,
        section: SectionContext,
        *,
        on_captured: Callable[[int], None],
        on_event: OnEvent,
        monitor_seconds: float = 10.0,
        pace_seconds: float = PACE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._paths = Paths(Path(os.path.abspath(live)), Path(os.path.abspath(folder)))
        self._wal = self._paths.live.with_name(self._paths.live.name + "-wal")
        self._section, self._on_captured, self._on_event = section, on_captured, on_event
        self._monitor_seconds, self._pace_seconds = monitor_seconds, pace_seconds
        self._stall_seconds = stall_seconds
        marker = f"{section.app}.{section.epoch}.litestream.{secrets.token_hex(8)}"
        self._resource = Resource("process", marker, section.app, section.epoch)
        self._records = Records(self._paths)
        self._tail = WalTail(self._wal)
        self._guard: WalGuard | None = None
        self._watch: WalWatch | None = None
        self._litestream: Litestream | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self._waiters: list[asyncio.Future[int]] = []
        self._identity: tuple[int, int] | None = None
        self._wal_identity: tuple[int, int] | None = None
        self._full = False
        self._disk_full = False
        self._restarts = 0
        self.failed: asyncio.Future[DatabaseError] = asyncio.get_running_loop().create_future()
        """Done when nothing more can be captured until the program has been stopped: why."""

    @property
    def captured(self) -> int:
        """The last transaction that is in a file."""
        return self._records.newest

    @property
    def restarts(self) -> int:
        """How many times Litestream had to be started again."""
        return self._restarts

    @property
    def pid(self) -> int:
        """Litestream's process id, 0 while there is none."""
        return self._litestream.pid if self._litestream else 0

    @property
    def is_running(self) -> bool:
        """Whether commits are being captured right now."""
        return self._ready.is_set()

    # --- start

    async def start(self, last_txid: int = 0) -> int:
        """Begin; returns the last captured transaction once Litestream is ready, 0 if there is none.

        *last_txid*: the last one of the log. Without local files up to it the first record is a full one.
        A database that does not exist (or is empty) yet is waited for, after the return.
        Raises DatabaseError, and then nothing is left running: the file is no SQLite database, Litestream
        does not answer within 5 s, or cannot capture.
        """
        try:
            check_path(self._paths.live)
            try:
                await child.in_thread(partial(self._records.open, last_txid))
                self._watch = WalWatch(self._paths.live, self._wake.set)
            except OSError as error:
                raise DatabaseError(f"{self._paths.folder}: {error}") from None
            first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._supervisor = asyncio.create_task(self._supervise(first), name="capture")
            await _first_of(self._supervisor, first)
            if self._supervisor.done():
                self._supervisor.result()
        except BaseException:
            await child.finish(asyncio.create_task(self._shut_down(), name="capture, giving up"))
            raise
        return self.captured

    def _exists(self) -> bool:
        # A program creates its file empty. Whoever writes first decides on page size and the like: not we.
        try:
            return os.stat(self._paths.live).st_size > 0
        except OSError:
            return False

    # --- supervision

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """Keep a Litestream at work. *first* is done when the first one is; before, errors are raised."""
        delay = FIRST_RESTART_SECONDS
        while True:
            if not self._exists():
                if not first.done():
                    first.set_result(None)
                await self._wait_for_database()
            began = system.now()
            try:
                await self._run(first)
            except _Broken as error:
                await self._end_run()
                if not first.done():
                    raise DatabaseError(str(error)) from None
                self._fail(str(error))
                return
            except _Ended as end:
                await self._end_run()
                if not first.done():
                    raise DatabaseError(
                        f"Litestream cannot capture {self._paths.live}: {end.detail}"
                    ) from None
                self._full = self._full or end.full
                self._event(end.kind, end.detail)
            except DatabaseError as error:
                await self._end_run()
                if not first.done():
                    raise
                self._event("failing", str(error))
            except BaseException:
                await self._end_run()
                raise
            if system.now() - began > SETTLED_SECONDS:
                delay = FIRST_RESTART_SECONDS
            await asyncio.sleep(delay)
            delay = min(max(NEXT_RESTART_SECONDS, 2 * delay), LONGEST_RESTART_SECONDS)
            self._restarts += 1

    def _event(self, kind: str, detail: str) -> None:
        log.log(logging.INFO if kind == "started" else logging.WARNING, "capture %s: %s", kind, detail)
        self._on_event(kind, detail)

    def _fail(self, problem: str) -> None:
        error = DatabaseError(problem, "stop the program, so that it opens its database anew")
        self._event("broken", str(error))
        self._refuse_waiters(error)
        if not self.failed.done():
            self.failed.set_result(error)

    async def _wait_for_database(self) -> None:
        assert self._watch is not None
        while True:
            self._watch.take()
            self._watch.watch_file()
            if self._exists():
                return
            await self._sleep_until_woken(LOOK_SECONDS)

    async def _run(self, first: asyncio.Future[None]) -> None:
        """One Litestream, from its start to its end, which is raised."""
        await self._keep_wal()
        try:
            await child.in_thread(partial(self._records.prepare, full=self._full))
        except OSError as error:
            raise _Ended(self._os_kind(error), f"{self._paths.capture}: {error}") from None
        self._litestream = Litestream(
            self._paths, self._resource, self._section.register, self._monitor_seconds
        )
        try:
            await self._litestream.start()
        except OSError as error:
            raise _Ended(self._os_kind(error), str(error)) from None
        waiting = asyncio.get_running_loop().call_later(FIRST_SYNC_SECONDS, _done, first)
        try:
            while self._guard is not None and not self._ready.is_set():
                await self._turn()
        finally:
            waiting.cancel()
        _done(first)
        while True:
            await self._next()
            await self._turn()

    def _os_kind(self, error: OSError) -> str:
        return "disk-full" if _is_disk_full(str(error)) else "failing"

    async def _keep_wal(self) -> None:
        """Have the guard at its place: on the file that is there now, holding its WAL."""
        if self._guard is None:
            self._guard = WalGuard(self._paths.live)
        identity = _identity(self._paths.live)
        try:
            await self._guard.open()
            await self._guard.hold()
        finally:
            if not self._guard.is_open:
                await self._guard.close()
                self._guard = None
        self._identity = identity
        self._wal_identity = None

    async def _end_run(self) -> None:
        """Kill Litestream; the guard holds the WAL until the next one is ready."""
        self._ready.clear()
        litestream, self._litestream = self._litestream, None
        if litestream is not None:
            await litestream.kill()
        guard = self._guard
        if guard is None:
            return
        if self._identity != _identity(self._paths.live):
            self._guard = None
            await guard.strand()
            await guard.close()
        else:
            with contextlib.suppress(DatabaseError):
                await guard.hold()

    # --- one turn

    async def _next(self) -> None:
        """Until there is something to do."""
        assert self._watch is not None
        quiet_until = system.now() + LOOK_SECONDS
        while True:
            left = quiet_until - system.now()
            woken = await self._sleep_until_woken(max(0.0, left))
            if self._waiters or not woken or left <= 0:
                return
            if self._watch.take() and not self._tail.is_only_ours(self._records.end):
                return

    async def _sleep_until_woken(self, seconds: float) -> bool:
        assert self._watch is not None
        self._watch.arm()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        finally:
            self._wake.clear()
            self._watch.disarm()
        return True

    async def _turn(self) -> None:
        """Sync once, and tell everybody."""
        assert self._watch is not None
        began = system.now()
        self._look_at_files()
        waiters, self._waiters = self._waiters, []
        try:
            self._watch.take()  # what has changed until here is in this sync
            txid = await self._sync()
            self._look_at_files()
            if not self._records.accept(txid):
                raise _Ended(
                    "gap",
                    f"after transaction {self._records.newest} commits may be missing; all is captured anew",
                    full=True,
                )
        except BaseException:
            self._waiters = waiters + self._waiters
            raise
        await self._synced(txid, waiters)
        await self._pause(began)

    async def _synced(self, txid: int, waiters: list[asyncio.Future[int]]) -> None:
        if not self._ready.is_set() and txid:
            assert self._guard is not None
            await self._guard.release()
            self._tail.learn(await self._guard.page_of("_litestream_seq"))
            self._wal_identity = _identity(self._wal)
            self._full = False
            self._ready.set()
            self._event("started", f"Litestream {self.pid}, transaction {txid}")
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(self._records.newest)
        if txid > self._announced:
            self._announced = txid
            self._on_captured(txid)

    _announced = 0

    async def _pause(self, began: float) -> None:
        """At most every other moment for Litestream, and never two syncs at once: but who waits does not wait."""
        took = system.now() - began
        end = began + max(self._pace_seconds, 2 * took)
        while not self._waiters and (left := end - system.now()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    def _look_at_files(self) -> None:
        """Whether the files are still those that Litestream has open. Raises _Ended, _Broken."""
        identity = _identity(self._paths.live)
        if identity != self._identity:
            if identity is None:
                raise _Ended("database-deleted", f"{self._paths.live} is gone", full=True)
            raise _Ended("database-replaced", f"another file is at {self._paths.live}", full=True)
        if self._wal_identity is not None and _identity(self._wal) != self._wal_identity:
            raise _Broken(f"{self._wal} was removed while the database is in use")

    async def _sync(self) -> int:
        """Have Litestream sync until it does. Raises _Ended."""
        assert self._litestream is not None
        failing_since, pause = 0.0, _FIRST_RETRY_SECONDS
        while True:
            try:
                txid = await self._sync_once(self._litestream)
            except Lost as error:
                if await self._has_exited(self._litestream):
                    raise _Ended("exited", f"Litestream {self._litestream.how}") from None
                raise _Ended("stalled", f"Litestream does not answer: {error}") from None
            except Refused as error:
                now = system.now()
                failing_since = failing_since or now
                self._refused(str(error), first=now == failing_since)
                if now - failing_since > FAILING_SECONDS and not self._disk_full:
                    raise _Ended("failing", f"Litestream cannot sync: {error}") from None
            else:
                if self._disk_full:
                    self._disk_full = False
                    self._event("disk-recovered", "there is room again, nothing was lost")
                return txid
            await asyncio.sleep(pause)
            self._look_at_files()
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)

    def _refused(self, text: str, *, first: bool) -> None:
        if _is_disk_full(text):
            if not self._disk_full:
                self._disk_full = True
                self._event("disk-full", text)
        elif first:
            log.warning("Litestream cannot sync, trying on: %s", text)

    async def _sync_once(self, litestream: Litestream) -> int:
        """With a deadline that moves on while there is progress."""
        loop = asyncio.get_running_loop()
        seen = None
        try:
            async with asyncio.timeout(self._stall_seconds) as deadline:

                def look() -> None:
                    nonlocal seen, timer
                    if (now := self._progress()) != seen:
                        seen = now
                        deadline.reschedule(loop.time() + self._stall_seconds)
                    timer = loop.call_later(_PROGRESS_LOOK_SECONDS, look)

                timer = loop.call_later(_PROGRESS_LOOK_SECONDS, look)
                try:
                    return await litestream.sync()
                finally:
                    timer.cancel()
        except TimeoutError:
            detail = f"a sync got nowhere for {self._stall_seconds:g} s; {await litestream.diagnosis()}"
            raise _Ended("stalled", detail) from None

    def _progress(self) -> object:
        """Something that changes while Litestream writes: the files in its folder and the newest one's size."""
        try:
            entries = [(entry.name, entry.stat().st_size) for entry in os.scandir(self._paths.level0)]
        except OSError:
            return None
        return max(entries, default=None), len(entries)

    async def _has_exited(self, litestream: Litestream) -> bool:
        # The connection breaks a moment before the process can be seen to have ended.
        for _ in range(50):
            if litestream.exited:
                return True
            await asyncio.sleep(0.002)
        return False

    # --- for others

    async def sync(self, timeout: float) -> int:
        """Wait until all that was committed before this call is in files; the last transaction then.

        A sync that runs already does not count: it may have read before the commit.
        Raises SyncTimeout, and DatabaseError when nothing can be captured any more.
        """
        self._check_alive()
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except TimeoutError:
            raise SyncTimeout(self._section.app, timeout, "Litestream") from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _check_alive(self) -> None:
        if self.failed.done():
            raise self.failed.result()
        if self._supervisor is None:
            raise DatabaseError("nothing is being captured", "wait until the app is active")
        if self._supervisor.done():
            raise DatabaseError("capturing has ended", "see the log of the node")

    def files(self, after_txid: int) -> list[tuple[int, Path]]:
        """The LTX files of the transactions after *after_txid*, in order."""
        return self._records.files(after_txid)

    def forget(self, up_to_txid: int) -> None:
        """Remove the files up to *up_to_txid*: they are safe elsewhere. The newest stays."""
        self._records.forget(up_to_txid)

    # --- end

    async def stop(self, sync_seconds: float = 0.0) -> sqlite3.Connection | None:
        """End it: Litestream is gone when this returns. Twice is harmless.

        *sync_seconds*: how long at most a last sync may take; 0: none.
        Returns the connection that keeps the WAL, if there is one: whoever closes it last empties and removes
        the WAL.
        """
        if sync_seconds > 0:
            with contextlib.suppress(PhalanxError):
                await self.sync(sync_seconds)
        work = asyncio.create_task(self._shut_down(), name="capture, stopping")
        await child.finish(work)
        guard, self._guard = self._guard, None
        return guard.give() if guard is not None else None

    async def _shut_down(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            self._section.unregister(self._resource.id)
        if self._watch is not None:
            self._watch.close()
        self._tail.close()
        if self._guard is not None:
            await self._guard.release()
        self._refuse_waiters(DatabaseError("capturing has ended"))

    def _refuse_waiters(self, error: DatabaseError) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _first_of(task: asyncio.Task[None], future: asyncio.Future[None]) -> None:
    await asyncio.wait({task, future}, return_when=asyncio.FIRST_COMPLETED)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at *path*; None: none. It does not open it."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_disk_full(text: str) -> bool:
    lower = text.lower()
    return any(words in lower for words in _DISK_FULL)

"""Captures the commits of an app's live database while this node is active: Litestream, looked after.

Every change of the WAL makes Litestream read it at once, and what it wrote is announced (``on_captured``).
Litestream is restarted when it ends, when it hangs, and when it cannot be trusted any more; commits are not
lost meanwhile, as the guard (``data.wal_guard``) keeps the WAL, and a gap is made good by a full record
(``data.records``). What the program may do to its files is noticed before anything captured is announced:

* its own checkpoints, VACUUM, any page size: nothing to notice. ``journal_mode = DELETE`` fails, as the file
  is in use.
* a program that is killed within a commit: what was captured of that is withdrawn (``data.committed``).
* another file at the path, or none: Litestream and the guard begin anew with it, by a full record.
* the ``-wal`` removed, or the file replaced without removing it: the program itself works on pages that are
  nowhere any more. Nobody can mend that from outside; ``failed`` says so, and the program has to be stopped.
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

from phalanx import child, system
from phalanx.data.barrier import Barrier, answer
from phalanx.data.capture_health import CaptureHealth, uncaptured_bytes
from phalanx.data.checkpoints import BUSY_FRAMES, Checkpoints, Gate, checkpoint_pages
from phalanx.data.committed import Committed, Verdict
from phalanx.data.litestream import MONITOR_SECONDS, Litestream, Paths, check_path
from phalanx.data.records import Backlog, FilesLost, Records, frames_between
from phalanx.data.syncing import RunEnded, Syncing, is_disk_full
from phalanx.data.wal_guard import WalGuard
from phalanx.data.wal_index import Mark
from phalanx.data.wal_tail import WalTail
from phalanx.data.wal_watch import WalWatch
from phalanx.errors import DatabaseError, PhalanxError, SyncTimeout
from phalanx.ports import SectionContext
from phalanx.types import Resource

log = logging.getLogger("phalanx.capture")

PACE_SECONDS = 0.003
"""The least time from one start of a sync to the next while commits keep coming. Each sync costs two fsyncs,
a file and some 1 ms of a core, and the program's own commits need the same. After a rest nobody waits."""
REST_FACTORS = (2, 12)
"""So many times as long as a sync took passes until the next one starts; the second one under a busy program:
then its commits come first, and what waits is captured in one go, each page once, which is less work for all.
With (2, 6) and 0.1 s a writer flat out had 0.73 of its throughput on two cores, with these 0.89."""
LONGEST_REST_SECONDS = 0.3
LOOK_SECONDS = 5.0
"""How often it is synced although nothing seems to have changed: a Litestream that hangs is noticed so."""
STALL_SECONDS = 10.0
"""So long may a sync take without any sign of progress before Litestream is killed."""
FIRST_SYNC_SECONDS = 5.0
"""How long the start waits for the first sync. It goes on behind it where a large file is captured whole."""
NEXT_RESTART_SECONDS = 0.2
"""The pause before the second restart; the first one comes at once, and each pause is twice the last one."""
LONGEST_RESTART_SECONDS = 5.0
SETTLED_SECONDS = 30.0
"""A Litestream that has run so long is restarted at once again."""
REPLACED_SECONDS = 0.25
"""Who replaces a database with care removes its WAL first; so long it may take until the new one is there."""
ADOPT_SECONDS = 2.0
"""How long it may take to find out whether what Litestream wrote last was committed; else that is captured
again by the next run."""
DOUBT_SECONDS = (0.0005, 0.02)
"""First and longest pause between two looks whether a commit under way has come to its end."""
BEHIND_SYNCS = 3
"""So many syncs in a row may leave out what was committed before them."""
REPEAT_SECONDS = 60.0
"""What fails in the same way again and again is reported again only after that time."""

_REPLACED_POLL_SECONDS = 0.01

FileId = tuple[int, int]


class _Broken(Exception):
    """Nothing can be captured until the program has been stopped."""


class Capture:
    """Of one live database, for one active section.

    *on_captured*: called with the last captured transaction whenever it has grown. *on_event*: (kind, detail)
    for the audit trail. Kinds: ``started``, ``exited``, ``stalled``, ``failing``, ``gap``, ``withdrawn``,
    ``disk-full``, ``disk-recovered``, ``database-replaced``, ``database-deleted``, ``broken``. Both are
    called from the event loop, and must not raise.
    """

    def __init__(
        self,
        live: Path,
        folder: Path,
        section: SectionContext,
        *,
        on_captured: Callable[[int], None],
        on_event: Callable[[str, str], None],
        gate: Gate | None = None,
        monitor_seconds: float = MONITOR_SECONDS,
        pace_seconds: float = PACE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._paths = Paths(Path(os.path.abspath(live)), Path(os.path.abspath(folder)))
        self._section, self._on_captured, self._on_event = section, on_captured, on_event
        self._monitor_seconds, self._pace_seconds = monitor_seconds, pace_seconds
        marker = f"{section.app}.{section.epoch}.litestream.{secrets.token_hex(8)}"
        self._resource = Resource("process", marker, section.app, section.epoch)
        self._registered = False
        self._records = Records(self._paths)
        self._tail = WalTail(self._paths.wal)
        self._committed = Committed(self._paths.live)
        self._behind = 0
        self._checkpoints = Checkpoints(self._paths, self._tail, gate)
        self._health = CaptureHealth()
        self._syncing = Syncing(
            lambda: self._records.progress, stall_seconds, self._event, self._health.failed
        )
        self._guard: WalGuard | None = None
        self._watch: WalWatch | None = None
        self._litestream: Litestream | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._barrier = Barrier()
        self._file: FileId | None = None
        self._wal: FileId | None = None
        self._ready, self._full = False, False
        self._announced, self._restarts = 0, 0
        self._last_failing = ("", 0.0)
        loop = asyncio.get_running_loop()
        self._kept: asyncio.Future[None] = loop.create_future()
        """Done once the guard keeps the WAL; not where there is none yet."""
        self._first: asyncio.Future[None] = loop.create_future()
        """Done once Litestream is ready for the first time."""
        self.failed: asyncio.Future[DatabaseError] = loop.create_future()
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
    def pid(self) -> int | None:
        """Litestream's process id, None while there is none."""
        return self._litestream.pid if self._litestream else None

    @property
    def trouble(self) -> str:
        """Since when commits are not captured, and why, though it is tried again and again; else empty."""
        return self._health.trouble

    @property
    def uncaptured_bytes(self) -> int:
        """How much of the WAL is committed, and in no file yet."""
        return uncaptured_bytes(self._paths.wal, self._committed.mark(), self._records.end)

    @property
    def is_running(self) -> bool:
        """Whether commits are being captured right now."""
        return self._ready

    # --- start

    async def start(self, last_txid: int = 0) -> int:
        """Begin; returns the last captured transaction once Litestream is ready, 0 if there is none.

        *last_txid*: the last one of the log. Without local files up to it the first record is a full one.
        A database that does not exist (or is empty) yet is waited for, after the return; so is the first sync
        where it takes longer than 5 s.
        Raises DatabaseError, and then nothing is left running: the file is no SQLite database, Litestream
        does not answer within 5 s, or cannot capture. (:meth:`stop` still has the guard's connection.)
        """
        await self.begin(last_txid)
        return await self.wait_ready()

    async def begin(self, last_txid: int = 0) -> None:
        """The same, but returns as soon as the guard keeps the WAL: nothing that is committed from then on
        escapes Litestream, which is being started. :meth:`sync` waits for it. Raises as :meth:`start`.

        A database that is not in WAL mode yet has to become so first, before anybody uses it.
        """
        try:
            check_path(self._paths.live)
            try:
                await child.in_thread(partial(self._records.open, last_txid))
                self._watch = WalWatch(self._paths.live, self._wake.set)
            except OSError as error:
                raise DatabaseError(f"{self._paths.folder}: {error}") from None
            self._announced = self._records.newest
            self._supervisor = asyncio.create_task(self._supervise(self._first), name="capture")
            await self._wait_until(self._kept, self._first)
        except BaseException:
            await child.finish(asyncio.create_task(self._shut_down(), name="capture, giving up"))
            raise

    async def wait_ready(self) -> int:
        """The rest of :meth:`start` after :meth:`begin`."""
        try:
            await self._wait_until(self._first)
        except BaseException:
            await child.finish(asyncio.create_task(self._shut_down(), name="capture, giving up"))
            raise
        return self.captured

    async def _wait_until(self, *reached: asyncio.Future[None]) -> None:
        supervisor = self._supervisor
        assert supervisor is not None
        await asyncio.wait({supervisor, *reached}, return_when=asyncio.FIRST_COMPLETED)
        if supervisor.done():
            supervisor.result()

    async def _register(self, resource: Resource) -> None:
        await self._section.register(resource)
        self._registered = True

    # --- supervision

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """Keep a Litestream at work. *first* is done when one is ready; until then errors are raised, each as
        a DatabaseError, and from then on ``failed`` tells of them: this never ends in silence."""
        try:
            await self._keep_at_work(first)
        except Exception as error:
            if not first.done():
                raise self._as_database_error(error) from error
            self._note_bug(error)

    async def _keep_at_work(self, first: asyncio.Future[None]) -> None:
        delay = 0.0
        while True:
            began, withdrawn = system.now(), False
            try:
                if not _has_content(self._paths.live):
                    _set(first)
                    self._health.reset()
                    await self._wait_for_database()
                    began = system.now()
                await self._run(first)
            except Exception as error:
                full = isinstance(error, RunEnded) and error.full
                withdrawn = isinstance(error, RunEnded) and error.withdrawn
                await self._end_run(adopt=not full and not withdrawn)
                # A full record mends what it was asked for, unless it was asked for before.
                if not first.done() and not withdrawn and (not full or self._full):
                    raise self._as_database_error(error) from error
                if not self._note_end(error):
                    return
            except asyncio.CancelledError:
                await self._end_run(adopt=True)
                raise
            if withdrawn or system.now() - began > SETTLED_SECONDS:
                delay = 0.0
            await asyncio.sleep(delay)
            delay = min(max(NEXT_RESTART_SECONDS, 2 * delay), LONGEST_RESTART_SECONDS)
            self._restarts += 1

    def _as_database_error(self, error: Exception) -> DatabaseError:
        if isinstance(error, DatabaseError):
            return error
        return DatabaseError(f"{self._paths.live} cannot be captured: {error}")

    def _note_end(self, error: Exception) -> bool:
        """Report why a run has ended; whether there may be another one."""
        self._health.failed(str(error) or type(error).__name__)
        match error:
            case RunEnded():
                self._full = self._full or error.full
                self._event(error.kind, error.detail)
            case FilesLost():
                self._fail(error)
                return False
            case PhalanxError() | OSError():
                if is_disk_full(str(error)):
                    self._syncing.note_full_disk(str(error))
                else:
                    self._event("failing", str(error))
            case _Broken():
                self._fail(DatabaseError(str(error), "stop the program, so that it opens its database anew"))
                return False
            case _:
                self._note_bug(error)
                return False
        return True

    def _note_bug(self, error: Exception) -> None:
        log.error("capturing has failed", exc_info=error)
        self._fail(DatabaseError(f"capturing has failed: {type(error).__name__}: {error}"))

    def _fail(self, error: DatabaseError) -> None:
        self._event("broken", str(error))
        self._barrier.refuse(error)
        if not self.failed.done():
            self.failed.set_result(error)

    def _event(self, kind: str, detail: str) -> None:
        now = system.now()
        if kind == "failing":
            if self._last_failing[0] == detail and now - self._last_failing[1] < REPEAT_SECONDS:
                return
            self._last_failing = (detail, now)
        log.log(logging.INFO if kind == "started" else logging.WARNING, "capture %s: %s", kind, detail)
        self._on_event(kind, detail)

    async def _wait_for_database(self) -> None:
        """Until there is a file that is not empty: who writes first decides on page size and the like."""
        assert self._watch is not None
        try:
            while True:
                self._watch.take()
                self._watch.watch_file()
                if _has_content(self._paths.live):
                    return
                answer(self._barrier.take(), self.captured)  # nothing has been committed
                await self._sleep(LOOK_SECONDS)
        finally:
            self._watch.unwatch_file()

    # --- one run of Litestream

    async def _run(self, first: asyncio.Future[None]) -> None:
        """One Litestream, from its start to its end, which is raised."""
        assert self._watch is not None
        self._watch.renew()
        guard = await self._keep_wal()
        if guard.holds:
            _set(self._kept)
        page_size = await guard.page_size()
        await child.in_thread(partial(self._records.prepare, page_size, full=self._full))
        self._litestream = litestream = Litestream(
            self._paths,
            self._resource,
            self._register,
            self._monitor_seconds,
            checkpoint_pages(page_size),
            self._on_exit,
        )
        try:
            await litestream.start()
        except DatabaseError as error:
            raise RunEnded("exited" if litestream.exited else "failing", str(error)) from None
        timer = asyncio.get_running_loop().call_later(FIRST_SYNC_SECONDS, _set, first)
        try:
            while not self._ready:
                await self._turn(litestream, guard)
        finally:
            timer.cancel()
        _set(first)
        while True:
            await self._next(litestream)
            await self._turn(litestream, guard)

    def _on_exit(self) -> None:
        """Litestream has ended, whoever did it."""
        if self._guard is not None:
            self._guard.hold_soon()
        self._wake.set()

    async def _keep_wal(self) -> WalGuard:
        """Have the guard at its place: on the file that is there now, holding its WAL."""
        if self._wal is not None and _file_id(self._paths.wal) == self._wal and self._guard is None:
            raise _Broken(f"{self._paths.wal} belongs to a file that is no longer at {self._paths.live}")
        if self._guard is None:
            self._guard = WalGuard(self._paths.live)
        self._file, self._wal = _file_id(self._paths.live), None
        await self._guard.open()
        await self._guard.hold()
        return self._guard

    async def _end_run(self, *, adopt: bool) -> None:
        """Kill Litestream; the guard holds the WAL until the next one is ready.

        *adopt*: what it has written last is good, though it came to no answer.
        """
        self._ready = False
        litestream, self._litestream = self._litestream, None
        if litestream is not None:
            await litestream.kill()
        await self._checkpoints.end()
        guard, same = self._guard, self._file == _file_id(self._paths.live)
        if guard is None:
            return
        if not same:
            self._guard = None
            await guard.close()
        elif self._wal_is_gone():
            # Whoever opens the database next must find nobody: only then does SQLite begin a new WAL.
            self._guard = None
            await guard.save()
            await guard.close()
        else:
            with contextlib.suppress(DatabaseError):
                await guard.hold()
            if adopt and litestream is not None and not await self._adopt():
                self._full = True

    async def _adopt(self) -> bool:
        """Accept what Litestream has written last, as far as it can be told that it was committed.

        False: it does not follow on what was accepted before.
        """
        deadline = system.now() + ADOPT_SECONDS
        try:
            for file in self._records.unaccepted():
                left = deadline - system.now()
                if await self._committed.verdict(file, None, timeout=left) is not Verdict.COMMITTED:
                    break
                if not self._records.accept(self._records.newest + 1):
                    return False
            self._records.withdraw()  # the rest: the next run captures it again, or what is in its place then
        except (OSError, DatabaseError):
            return False
        return True

    def _wal_is_gone(self) -> bool:
        return self._wal is not None and _file_id(self._paths.wal) != self._wal

    def _check_files(self) -> None:
        """Whether the files are still those that Litestream has open. Raises RunEnded, _Broken."""
        file = _file_id(self._paths.live)
        if file == self._file:
            return
        if file is None:
            raise RunEnded("database-deleted", f"{self._paths.live} is gone", full=True)
        raise RunEnded("database-replaced", f"another file is at {self._paths.live}", full=True)

    async def _check_wal(self) -> None:
        if not self._wal_is_gone():
            return
        deadline = system.now() + REPLACED_SECONDS
        while system.now() < deadline:
            await asyncio.sleep(_REPLACED_POLL_SECONDS)
            self._check_files()
        raise _Broken(f"{self._paths.wal} was removed while the database is in use")

    # --- one turn

    async def _next(self, litestream: Litestream) -> None:
        """Until there is something to do."""
        assert self._watch is not None
        quiet_until = system.now() + LOOK_SECONDS
        while not self._barrier and (left := quiet_until - system.now()) > 0:
            if litestream.exited:
                raise RunEnded("exited", f"Litestream {litestream.how}")
            await self._sleep(left)
            if self._watch.take() and not self._tail.is_only_ours(self._records.end):
                return

    async def _sleep(self, seconds: float) -> None:
        """Until a file changes, a barrier is asked for, or so long."""
        assert self._watch is not None
        self._watch.arm()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            self._wake.clear()
            self._watch.disarm()

    async def _turn(self, litestream: Litestream, guard: WalGuard) -> None:
        """Sync once, and tell everybody."""
        assert self._watch is not None
        began, at = system.now(), system.wall()
        # Whoever asks from here on may have committed after the sync began, and waits for the next one.
        waiters, before = self._barrier.take(), self._records.end
        committed = self._committed.mark()
        try:
            self._check_files()
            await self._check_wal()
            self._watch.take()  # what has changed until here is in this sync
            await self._checkpoints.before_sync(before, litestream.pid or 0, hurried=bool(waiters))
            txid = await self._syncing.sync(litestream, self._check_files, first=not self._ready)
            self._check_files()
            await self._check_wal()
            await self._see_committed(litestream, guard, txid, committed)
            if not self._records.accept(txid):
                missing = f"after transaction {self._records.newest} commits may be missing"
                raise RunEnded("gap", f"{missing}: the whole database is captured anew", full=True)
            if not self._ready and txid:
                await self._become_ready(litestream, guard, txid)
            has_all = self._has_reached(committed)
        except BaseException:
            self._barrier.put_back(waiters)
            raise
        if self._ready and has_all:
            self._health.completed(at)
            answer(waiters, self.captured)
        else:
            self._barrier.put_back(waiters)
        if self.captured > self._announced:
            self._announced = self.captured
            self._on_captured(self.captured)
        await self._checkpoints.after_sync(before, self._records.end)
        await self._rest(began, is_busy=frames_between(before, self._records.end) > BUSY_FRAMES)

    async def _see_committed(
        self, litestream: Litestream, guard: WalGuard, txid: int, before: Mark | None
    ) -> None:
        """Wait until what was captured, up to *txid*, is committed. Raises RunEnded: some of it never was.

        *before*: what was committed before this sync.
        """
        for file in self._records.unaccepted(txid):
            pause, longest = DOUBT_SECONDS
            while (verdict := await self._committed.verdict(file, before)) is Verdict.IN_DOUBT:
                await asyncio.sleep(pause)
                pause = min(longest, 1.5 * pause)
                self._check_files()
                await self._check_wal()
                if litestream.exited:
                    raise RunEnded("exited", f"Litestream {litestream.how}")
            if verdict is Verdict.PHANTOM:
                self._records.withdraw()
                await guard.overwrite()
                detail = "a program was killed within its commit: what was captured of that is withdrawn"
                raise RunEnded("withdrawn", detail, withdrawn=True)

    def _has_reached(self, committed: Mark | None) -> bool:
        """Whether all that was *committed* is captured. Raises RunEnded when it is not for the third time."""
        end = self._records.end
        if self._committed.covers(end, committed) or self._tail.is_only_ours(end):
            self._behind = 0
            return True
        self._behind += 1
        if self._behind >= BEHIND_SYNCS:
            self._behind = 0
            raise RunEnded("gap", f"Litestream is at {end} and does not go on to {committed}", full=True)
        return False

    async def _become_ready(self, litestream: Litestream, guard: WalGuard, txid: int) -> None:
        await guard.release()
        self._tail.learn(await guard.page_of("_litestream_seq"))
        self._wal, self._full, self._ready = _file_id(self._paths.wal), False, True
        self._event("started", f"Litestream {litestream.pid}, transaction {txid}")

    async def _rest(self, began: float, *, is_busy: bool) -> None:
        """Leave the machine to others for a multiple of what the sync took. A barrier is not held up."""
        took = system.now() - began
        rest = (REST_FACTORS[is_busy] - 1) * took
        end = began + max(self._pace_seconds, took + min(rest, LONGEST_REST_SECONDS))
        while not self._barrier and (left := end - system.now()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    # --- for others

    async def sync(self, timeout: float) -> int:
        """Wait until all that was committed before this call is in files; the last transaction then.

        A sync that runs already does not count: it may have read before the commit.
        Raises SyncTimeout, and DatabaseError when nothing can be captured any more.
        """
        self._check_alive()
        waiter = self._barrier.enter()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        except TimeoutError:
            raise SyncTimeout(self._section.app, timeout, "Litestream") from None
        finally:
            self._barrier.leave(waiter)

    def _check_alive(self) -> None:
        if self.failed.done():
            raise self.failed.result()
        if self._supervisor is None or self._supervisor.done():
            raise DatabaseError("nothing is being captured", "wait until the app is active")

    def files(self, after_txid: int, limit: int | None = None) -> list[tuple[int, Path]]:
        """The LTX files of the transactions after *after_txid*, in order; at most *limit* of them."""
        return self._records.files(after_txid, limit)

    def backlog(self, after_txid: int) -> Backlog:
        """How many these are, and how large."""
        return self._records.backlog(after_txid)

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
        await child.finish(asyncio.create_task(self._shut_down(), name="capture, stopping"))
        guard, self._guard = self._guard, None
        return guard.give() if guard is not None else None

    async def _shut_down(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        if self._registered:
            self._registered = False
            self._section.unregister(self._resource.id)
        if self._watch is not None:
            self._watch.close()
        self._tail.close()
        if self._guard is not None:
            await self._guard.release()
        self._barrier.refuse(DatabaseError("capturing has ended"))


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _file_id(path: Path) -> FileId | None:
    """Which file is at *path*; None: none. It does not open it."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _has_content(path: Path) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False

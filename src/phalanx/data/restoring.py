"""Restoring an app's database as it was at any position: a snapshot, and the log from there on; or the log
alone, where it still begins with a record that holds every page.

All or nothing: the database is put together in a folder beside its target, ``.<name>-restoring``, checked by
SQLite, and only then linked to its name. A folder that an interrupted restore has left is removed by the next
one to the same place.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import logging
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from phalanx import system
from phalanx.data import disk, image_process, ltx
from phalanx.data.entries import LogRecord
from phalanx.data.log import WalLog
from phalanx.data.snapshots import Progress, Snapshot, Snapshots, no_progress
from phalanx.errors import DatabaseError
from phalanx.types import Position

log = logging.getLogger("phalanx.snapshots")

LAGGING_SECONDS = 15.0
"""How long an entry may be missing that the log is known to have: the replica that answers lags behind."""

_MARGIN_BYTES = 64 << 20
_LOCK = "lock"
_LOCK_ATTEMPTS = 20
_FILE_CHUNK = 1 << 18
_CLOCK_SECONDS = 60.0
"""A time that is later than now by more than this is taken for a mistake."""


class Restored(msgspec.Struct, frozen=True):
    """What was restored: from which snapshot, up to which position, with how many records of the log.

    ``snapshot`` is empty where the log alone had all of it.
    """

    snapshot: str
    position: Position
    records: int
    size_bytes: int
    seconds: float


class Wanted(msgspec.Struct, frozen=True):
    """The state to restore: of a snapshot by name, at a sequence of the log, at a time (Unix seconds, by the
    clock of NATS), or, if nothing is given, the newest one. At most one of the three."""

    snapshot: str = ""
    sequence: int = 0
    time: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.snapshot) + bool(self.sequence) + bool(self.time) > 1:
            raise ValueError("at most one of snapshot, sequence and time")


class _Plan(msgspec.Struct, frozen=True):
    """``snapshot`` is None where the log alone is enough. Its entries after ``start`` are needed."""

    snapshot: Snapshot | None
    start: int
    sequence: int
    log_bytes: int

    @property
    def txid(self) -> int:
        """The transaction to go on from."""
        return self.snapshot.txid if self.snapshot is not None else 0

    @property
    def raw_bytes(self) -> int:
        """Of the snapshot's database."""
        return self.snapshot.raw_bytes if self.snapshot is not None else 0


class Restoring:
    """Restores of one app. BusError everywhere: NATS could not be reached."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots, self._log, self._app = snapshots, snapshots.log, snapshots.app

    async def restore(
        self, wanted: Wanted, target: Path, progress: Progress = no_progress, *, check: bool = True
    ) -> Restored:
        """Write the database to the new file *target*. Raises DatabaseError, OSError: nothing is there then.

        *check*: have SQLite check it before it gets its name.
        """
        began = system.now()
        _check_target(target)
        plan = await self.plan(wanted)
        _check_room(target.parent, plan)
        total = plan.raw_bytes + plan.log_bytes
        with _folder(target) as folder:
            file = folder / "database"
            if plan.snapshot is not None:
                await self._snapshots.unpack(plan.snapshot, file, lambda done, _: progress(done, total))
            else:
                file.touch()  # the first record holds every page
            records = _Records(self._log, plan.start, plan.sequence, folder)
            if plan.sequence > plan.start:
                await self._apply(records, file, plan, progress)
            if check:
                await image_process.check(file)
            size = await asyncio.to_thread(_publish, file, target)
        progress(total, total)
        position = Position(plan.sequence, records.txid or plan.txid)
        name = plan.snapshot.name if plan.snapshot is not None else ""
        return Restored(name, position, records.count, size, system.now() - began)

    async def _apply(self, records: _Records, file: Path, plan: _Plan, progress: Progress) -> None:
        total = plan.raw_bytes + plan.log_bytes
        done = plan.raw_bytes

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(min(done, total), total)

        async with contextlib.aclosing(records.read()) as stream:
            await image_process.apply(stream, file, plan.txid, on_bytes)

    # --- what it takes

    async def plan(self, wanted: Wanted) -> _Plan:
        """The newest snapshot up to what is *wanted*, and the end of the log that goes on from there; or the
        log alone, from a record on that holds every page.

        Raises DatabaseError: there is no such state, or it is not to be had any more.
        """
        found = await self._snapshots.list_snapshots()
        if wanted.snapshot:
            snapshot = await self._snapshots.find(wanted.snapshot)
            return _Plan(snapshot, snapshot.sequence, snapshot.sequence, 0)
        state = await self._log.state()
        sequence = wanted.sequence or state.last
        if wanted.time:
            sequence = await self._sequence_at(wanted.time, found)
        if sequence > state.last:
            raise DatabaseError(
                f"the log of app {self._app!r} ends at {state.last}: there is no position {sequence}"
            )
        snapshot = await self._newest_up_to(sequence, found)
        start = snapshot.sequence if snapshot is not None else state.first - 1
        if snapshot is None and not await self._begins_with_all(state.first, sequence):
            raise self._too_old(wanted, sequence, found)
        if snapshot is not None and sequence > start and state.first > start + 1:
            raise DatabaseError(
                f"the log of app {self._app!r} begins at {state.first}, so position {sequence} is gone: "
                f"the snapshot before it is at {start}",
                f"restore that one: {snapshot.name}",
            )
        share = (sequence - start) / max(1, state.messages)
        return _Plan(snapshot, start, sequence, round(state.bytes * min(1.0, share)))

    def _too_old(self, wanted: Wanted, sequence: int, found: list[Snapshot]) -> DatabaseError:
        """Nothing is left that leads to that position."""
        what = f"position {sequence}" if not wanted.time else _when(wanted.time)
        if not found:
            return DatabaseError(
                f"app {self._app!r} has no snapshot, and its log does not hold all that leads to {what}",
                "make one: phalanx snapshot create",
            )
        oldest = found[0]
        if oldest.sequence <= sequence:
            return DatabaseError(
                f"the log of app {self._app!r} does not go on from any snapshot up to {sequence}: NATS has "
                "lost acknowledged writes since",
                f"restore one of them by its name, such as {oldest.name}",
            )
        has = f"{oldest.name}, which has the data of {_when(oldest.time)}"
        return DatabaseError(
            f"{what} is before the oldest snapshot of app {self._app!r}, {has}, and its log does not hold "
            "all that leads there",
            "see what there is: phalanx snapshot list",
        )

    async def _begins_with_all(self, first: int, sequence: int) -> bool:
        """Whether the first record of the log, which begins at *first*, is one up to *sequence* and holds
        every page: so that nothing before it is needed."""
        at = first
        while at <= sequence:
            entries = await self._log.read(at, limit=16, max_bytes=1)
            record = next((entry for entry in entries if isinstance(entry, LogRecord)), None)
            if record is not None:
                return record.sequence <= sequence and await asyncio.to_thread(_holds_every_page, record)
            if not entries:
                return False
            at = entries[-1].sequence + 1
        return False

    async def _newest_up_to(self, sequence: int, found: list[Snapshot]) -> Snapshot | None:
        for one in reversed(found):
            if one.sequence <= sequence and await self._snapshots.is_of_this_log(one):
                return one
        return None

    async def _sequence_at(self, time: float, found: list[Snapshot]) -> int:
        if time > system.wall() + _CLOCK_SECONDS:
            raise DatabaseError(f"the time {_when(time)} is in the future")
        at = await self._log.record_at_time(time)
        if found and time >= found[0].time:
            # Before all that the log still holds: the snapshot that it goes on from is what was there.
            return max(found[0].sequence, at)
        return at


def _holds_every_page(record: LogRecord) -> bool:
    """False where that is not known: a large record, unless it is the first of all."""
    if record.txid == 1 or record.pointer is not None:
        return record.txid == 1
    return ltx.holds_every_page(io.BytesIO(record.data))


class _Record:
    """One record on its way, from the log or from the object that it points to."""

    def __init__(self, wal: WalLog, record: LogRecord, folder: Path) -> None:
        self._wal, self._record, self._folder = wal, record, folder
        self.txid, self.size = record.txid, record.size

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its LTX file."""
        if self._record.pointer is None:
            yield self._record.data
            return
        # Into a file first: its digest is verified at its end, and its size before the process takes it.
        file = self._folder / "record"
        await self._wal.download(self._record, file)
        with await asyncio.to_thread(file.open, "rb") as opened:
            while chunk := await asyncio.to_thread(opened.read, _FILE_CHUNK):
                yield chunk


class _Records:
    """The records after one position up to another one, each of which must be there."""

    def __init__(self, wal: WalLog, after: int, last: int, folder: Path) -> None:
        self._wal, self._after, self._last, self._folder = wal, after, last, folder
        self.txid, self.count = 0, 0

    async def read(self) -> AsyncGenerator[_Record]:
        """In order. Raises DatabaseError when entries are missing, BusError."""
        at = self._after
        deadline = system.now() + LAGGING_SECONDS
        while at < self._last:
            entries = await self._wal.read(at + 1)
            for entry in entries:
                if entry.sequence > self._last:
                    break
                if entry.sequence != at + 1:
                    raise DatabaseError(f"the log goes from {at} to {entry.sequence}: some of it is gone")
                at = entry.sequence
                if isinstance(entry, LogRecord):
                    self.txid, self.count = entry.txid, self.count + 1
                    yield _Record(self._wal, entry, self._folder)
            if entries:
                deadline = system.now() + LAGGING_SECONDS
            elif system.now() >= deadline:
                raise DatabaseError(f"the log does not give what is after {at}, up to {self._last}")
            else:
                await asyncio.sleep(0.05)


# --- files


def _beside(target: Path) -> tuple[Path, ...]:
    """The database, and the files that SQLite would take for parts of it."""
    return (target, *(target.with_name(target.name + suffix) for suffix in ("-wal", "-shm", "-journal")))


def _check_target(target: Path) -> None:
    for path in _beside(target):
        if os.path.lexists(path):
            raise DatabaseError(f"{path} exists", "choose another place, or move it away")
    if not target.parent.is_dir():
        raise DatabaseError(f"there is no folder {target.parent}", "make it, or choose another place")


def _check_room(folder: Path, plan: _Plan) -> None:
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    needed = plan.raw_bytes + plan.log_bytes + _MARGIN_BYTES
    if free < needed:
        raise DatabaseError(
            f"the disk of {folder} has {free >> 20} MiB free, the database needs some {needed >> 20} MiB",
            "choose another place",
        )


@contextlib.contextmanager
def _folder(target: Path) -> Generator[Path]:
    """A folder of our own beside *target*, empty at the beginning and gone at the end."""
    folder = target.parent / f".{target.name}-restoring"
    lock = _own(folder, target)
    try:
        for left in folder.iterdir():
            if left.name != _LOCK:
                left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _own(folder: Path, target: Path) -> int:
    """A descriptor that has the folder locked. Whoever had it before may be removing it just now."""
    for _ in range(_LOCK_ATTEMPTS):
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(lock)
            raise DatabaseError(f"something is being restored to {target} already") from None
        os.close(lock)
    raise DatabaseError(f"{folder} is being removed again and again")


def _publish(file: Path, target: Path) -> int:
    """Give *file*, which is on the disk already, its name, unless something else has it by now."""
    for path in _beside(target)[1:]:
        if os.path.lexists(path):
            raise DatabaseError(f"{path} exists", "choose another place, or move it away")
    try:
        os.link(file, target)
    except FileExistsError:
        raise DatabaseError(f"{target} exists", "choose another place, or move it away") from None
    file.unlink()
    disk.sync_folder(target.parent, "restore: sync folder")
    return target.stat().st_size


def _when(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")

"""Snapshots of an app's database: images at a known position, in the app's object store.

Each is one object ``snapshot-<sequence, 20 digits>`` in the format of ``data.image_format``; what it is of
stands in the object's metadata, described in docs/storage.md. An object is stored as a whole or not at all,
so every snapshot that is listed is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec

from phalanx import system
from phalanx.data import disk, image_process
from phalanx.data.entries import LogEntry, LogRecord, Seal
from phalanx.data.image_format import FORMAT, ImageHead
from phalanx.data.image_process import ImageSource
from phalanx.data.log import WalLog
from phalanx.data.objects import ObjectInfo, ObjectStore
from phalanx.decide import retention
from phalanx.errors import BusError, DatabaseError, DiskFull
from phalanx.types import Position

log = logging.getLogger("phalanx.snapshots")

SHIPPED_SECONDS = 15.0
"""How long the last captured transaction may take to get into the log."""

_LOOK_BACK = 4096
"""So many entries before the end of the log a transaction is looked for that was captured just now."""

_NAME = re.compile(r"snapshot-(\d{20})")

Progress = Callable[[int, int], None]
"""``progress(done, total)``: bytes of the database. The total may be estimated; both are equal at the end."""


def no_progress(_done: int, _total: int) -> None:
    """For those who do not want to know."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is of. ``time``: how new its data is, ``created``: when it was finished (Unix seconds).

    ``raw_bytes`` and ``size_bytes``: of the database, and of what is stored. ``nonce``: of the log's entry at
    ``sequence``, empty where that was purged.
    """

    name: str
    sequence: int
    txid: int
    epoch: int = 0
    node: str = ""
    page_size: int
    commit: int
    time: float
    created: float
    size_bytes: int
    kind: str = "scheduled"
    note: str = ""
    nonce: str = ""

    @property
    def position(self) -> Position:
        """Its place in the log."""
        return Position(self.sequence, self.txid)

    @property
    def raw_bytes(self) -> int:
        """Of the database."""
        return self.page_size * self.commit


def snapshot_name(sequence: int) -> str:
    """The name of the snapshot at *sequence*."""
    return f"snapshot-{sequence:020d}"


class Tidied(msgspec.Struct, frozen=True):
    """What was removed: names of snapshots, entries of the log."""

    snapshots: tuple[str, ...] = ()
    entries: int = 0


class Snapshots:
    """The snapshots of one app. BusError everywhere: NATS could not be reached."""

    def __init__(self, objects: ObjectStore, wal: WalLog, app: str, node: str = "") -> None:
        self.objects, self.log, self.app = objects, wal, app
        self._node = node

    # --- what is there

    async def list_snapshots(self) -> list[Snapshot]:
        """All of them, the oldest position first. Those of another format are left out, and logged."""
        found = [_parse(info) for info in await self.objects.list_objects() if _NAME.fullmatch(info.name)]
        return sorted((one for one in found if one is not None), key=lambda one: one.sequence)

    async def newest(self) -> Snapshot | None:
        """The one with the highest position that the log goes on from; None if there is none.

        It does not look at all of them: there may be thousands, and each may cost a look into the log.
        """
        end = (await self.log.state()).last
        for one in reversed(await self.list_snapshots()):
            if one.sequence <= end and await self.is_of_this_log(one):
                return one
        return None

    async def list_usable(self) -> list[Snapshot]:
        """Those that the log goes on from, or went on from until it was purged; the oldest first."""
        state = await self.log.state()
        found = [one for one in await self.list_snapshots() if one.sequence <= state.last]
        return [one for one in found if one.sequence < state.first or await self.is_of_this_log(one)]

    async def is_of_this_log(self, snapshot: Snapshot) -> bool:
        """False for a snapshot of what is not in the log any more: NATS had lost acknowledged writes, and
        their places were taken by others."""
        entry = await self._entry(snapshot.sequence)
        return entry is None or not snapshot.nonce or entry.nonce == snapshot.nonce

    async def find(self, name: str) -> Snapshot:
        """The one with that name. Raises DatabaseError if there is none."""
        info = await self.objects.info(name) if _NAME.fullmatch(name) else None
        if info is not None and (found := _parse(info)) is not None:
            return found
        raise DatabaseError(f"app {self.app!r} has no snapshot {name!r}", "see: phalanx snapshot list")

    # --- making one

    async def create(
        self,
        source: ImageSource,
        *,
        epoch: int = 0,
        kind: str = "scheduled",
        note: str = "",
        progress: Progress = no_progress,
    ) -> Snapshot:
        """Store a snapshot of *source* as it is now. A scheduled one that is there already is not made again.

        *epoch*: of the reign whose live database is the source. Raises DatabaseError, OSError.
        """
        total = 0

        def on_bytes(done: int) -> None:
            progress(min(done, total), total)

        async with image_process.pack(source, on_bytes) as packing:
            head, total = packing.head, packing.head.raw_bytes
            sequence = head.sequence or await self.sequence_of(head.txid, epoch)
            name = snapshot_name(sequence)
            before = await self.objects.info(name)
            if before is not None and kind == "scheduled" and (known := _parse(before)) is not None:
                return known
            entry = await self._entry(sequence)
            metadata = _metadata(head, sequence, entry) | {
                "epoch": str(epoch),
                "node": self._node,
                "kind": kind,
                "note": note,
            }
            async with contextlib.aclosing(packing.chunks()) as chunks:
                await self.objects.put(name, chunks, metadata)
        progress(total, total)
        return await self.find(name)

    async def sequence_of(self, txid: int, epoch: int) -> int:
        """Where the log has *txid* of the reign *epoch*; waits until it is there. Raises DatabaseError."""
        deadline = system.now() + SHIPPED_SECONDS
        start = max(1, (await self.log.state()).last - _LOOK_BACK)
        while True:
            entries = await self.log.read(start)
            for entry in entries:
                start = entry.sequence + 1
                # The seal, where nothing was written in that reign yet.
                if isinstance(entry, LogRecord | Seal) and (entry.txid, entry.epoch) == (txid, epoch):
                    return entry.sequence
            if system.now() >= deadline:
                raise DatabaseError(
                    f"app {self.app!r}: transaction {txid} is not in the log after {SHIPPED_SECONDS:g} s"
                )
            if not entries:
                await asyncio.sleep(0.05)

    async def _entry(self, sequence: int) -> LogEntry | None:
        """The log's entry at *sequence*, None where that was purged."""
        entries = await self.log.read(sequence, limit=1, max_bytes=1)
        return entries[0] if entries and entries[0].sequence == sequence else None

    # --- reading one

    def image(self, snapshot: Snapshot) -> AsyncGenerator[bytes]:
        """Its stream, as :func:`image_process.unpack` takes it. Close it where you do not read to the end."""
        return self.objects.get(snapshot.name)

    async def unpack(self, snapshot: Snapshot, target: Path, progress: Progress = no_progress) -> ImageHead:
        """Write its database to the new file *target*, on the disk. All or nothing.

        Raises DatabaseError (it was deleted meanwhile, or is damaged), DiskFull, OSError.
        """
        total = snapshot.raw_bytes
        await asyncio.to_thread(disk.check_room, target.parent, snapshot.name, total)

        def on_bytes(done: int) -> None:
            progress(min(done, total), total)

        try:
            async with contextlib.aclosing(self.image(snapshot)) as chunks:
                head = await image_process.unpack(chunks, target, on_bytes)
            if (head.page_size, head.commit) != (snapshot.page_size, snapshot.commit):
                raise DatabaseError(f"{snapshot.name} holds {head.commit} pages, not {snapshot.commit}")
        except BaseException as error:
            _remove(target)
            if disk.is_full(error):
                raise DiskFull(target.parent, snapshot.name, total) from None
            raise
        progress(total, total)
        return head

    async def verify(
        self, name: str, scratch: Path | None = None, progress: Progress = no_progress
    ) -> Snapshot:
        """Restore a snapshot into a temporary file in *scratch*, and have SQLite check it.

        Raises DatabaseError with what is wrong; DiskFull, OSError: it could not be looked at.
        """
        snapshot = await self.find(name)
        with tempfile.TemporaryDirectory(prefix="phalanx-verify-", dir=scratch) as folder:
            file = Path(folder) / "database"
            await self.unpack(snapshot, file, progress)
            if file.stat().st_size != snapshot.raw_bytes:
                raise DatabaseError(f"{name} has {file.stat().st_size} bytes, not {snapshot.raw_bytes}")
            await image_process.check(file)
        return snapshot

    # --- removing

    async def delete(self, name: str) -> None:
        """Remove a snapshot. Raises DatabaseError: there is none of that name, or it is the last of use."""
        await self.find(name)
        if [one.name for one in await self.list_usable()] == [name]:
            raise DatabaseError(
                f"{name} is the last snapshot of app {self.app!r}: new standbys need it",
                "make another one first: phalanx snapshot create",
            )
        await self.objects.delete(name)

    async def tidy(self, limits: retention.Limits) -> Tidied:
        """Remove the snapshots that may go, then the part of the log that nothing needs any more.

        Snapshots of what the log has lost count for nothing; they only go with their age.
        """
        found, now = await self.list_snapshots(), await self.objects.now()
        usable = await self.list_usable()
        plan = retention.plan([_kept(one) for one in usable], limits, now)
        lost = [one for one in found if one not in usable and one.created < now - limits.age_seconds]
        doomed = (*plan.delete, *(one.name for one in lost))
        for name in doomed:
            await self.objects.delete(name)
        # Somebody else may have deleted snapshots, too: the log is purged by what is there now.
        left = [one.sequence for one in await self.list_usable()]
        entries = await self.log.purge(plan.purge) if plan.purge and plan.purge in left else 0
        try:
            await self.objects.sweep()
        except BusError as error:
            log.warning("app %s: left-overs of snapshots are not removed yet: %s", self.app, error)
        return Tidied(doomed, entries)


def _metadata(head: ImageHead, sequence: int, entry: LogEntry | None) -> dict[str, str]:
    """Of the object; all values are texts. The time is Unix milliseconds."""
    return {
        "format": str(FORMAT),
        "sequence": str(sequence),
        "txid": str(head.txid),
        "page_size": str(head.page_size),
        "commit": str(head.commit),
        "raw_bytes": str(head.raw_bytes),
        "time": str(round(entry.time * 1000) if entry is not None else head.time_ms),
        "nonce": entry.nonce if entry is not None else "",
    }


def _parse(info: ObjectInfo) -> Snapshot | None:
    """A snapshot by its object; None if it is none that this version can use."""
    data = info.metadata
    try:
        if data["format"] != str(FORMAT):
            raise ValueError(f"format {data['format']}")
        return Snapshot(
            name=info.name,
            sequence=int(data["sequence"]),
            txid=int(data["txid"]),
            epoch=int(data["epoch"]),
            node=data["node"],
            page_size=int(data["page_size"]),
            commit=int(data["commit"]),
            time=int(data["time"]) / 1000,
            created=info.time,
            size_bytes=info.size,
            kind=data["kind"],
            note=data["note"],
            nonce=data["nonce"],
        )
    except (KeyError, ValueError) as error:
        log.warning("%s is no snapshot that this version can use: %s", info.name, error)
        return None


def _kept(one: Snapshot) -> retention.Kept:
    return retention.Kept(one.name, one.sequence, one.created)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)

"""A second copy of an app's database, outside NATS, that Litestream alone can restore.

The layout is Litestream's own (its file replica), so plain ``litestream restore -o out.db file://<folder>``
gives the data, with no Phalanx at all::

    ltx/9/0000000000000001-<txid>.ltx    a base: every page as of that transaction
    ltx/0/<txid>-<txid>.ltx              one record of the log each
    phalanx.json                         up to which position it is, and of what (Litestream does not look)

Whatever is killed whenever: what lies there can be restored, to the newest or to an older state. That is why
each file is written under another name first, and why there are two orders:

* Records are added in ascending order, so the transactions after a base have no gap.
* A base that the records do not lead to (transactions were lost, their numbers are used again) comes after
  *all* files with its own or a higher number are gone, the highest first: none of these may ever be applied
  to it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Protocol

import msgspec

from phalanx.data import image_process, ltx
from phalanx.data.entries import LogRecord
from phalanx.data.snapshots import Snapshot, Snapshots
from phalanx.errors import DatabaseError
from phalanx.types import Position

log = logging.getLogger("phalanx.snapshots")

RECORDS, BASES = 0, 9
"""Litestream's levels that are used. It compacts into those between; we don't."""

NOTE = "phalanx.json"
_FORMAT = 1


class Copied(msgspec.Struct, frozen=True, order=True):
    """One file of the second copy: its transactions, its size."""

    level: int
    min_txid: int
    max_txid: int
    size_bytes: int = 0


class Destination(Protocol):
    """Where a second copy is kept. Every method raises DatabaseError or OSError when it cannot."""

    async def list_files(self, level: int) -> list[Copied]:
        """The files of one level, by their transactions. Those that are not finished are not among them."""
        ...

    async def write(self, file: Copied, chunks: AsyncIterable[bytes], time: float) -> None:
        """Keep a file: as a whole or not at all, and on the disk when this returns. *time* (Unix seconds) is
        what Litestream takes for the time of its data."""
        ...

    async def delete(self, file: Copied) -> None:
        """Remove a file, if it is there."""
        ...

    async def read_note(self) -> bytes:
        """What :meth:`write_note` has kept, empty if nothing."""
        ...

    async def write_note(self, data: bytes) -> None:
        """Keep *data* instead of what was there."""
        ...


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What ``phalanx.json`` says: up to where the copy is, and which entry of the log that was."""

    format: int = _FORMAT
    platform: str
    app: str
    sequence: int
    txid: int
    nonce: str = ""


class Updated(msgspec.Struct, frozen=True):
    """What an update has brought: the copy's position, records and bases that are new, and, if the log goes
    on in a way that needs a new snapshot first, why it had to stop there."""

    position: Position
    records: int = 0
    bases: int = 0
    waits_for: str = ""


class SecondCopy:
    """The second copy of one app's database. Only one at a time may write to a destination.

    Methods raise DatabaseError, BusError, OSError; they can be called again then, and go on.
    """

    def __init__(self, destination: Destination, snapshots: Snapshots, platform: str) -> None:
        self._destination, self._snapshots, self._log = destination, snapshots, snapshots.log
        self._platform, self._app = platform, snapshots.app

    async def update(self) -> Updated:
        """Bring it up to the end of the log, and give it the newest snapshot as a base."""
        note, bases = await self._read_note(), 0
        newest = await self._snapshots.newest()
        if not await self._goes_on(note):
            if newest is None:
                return Updated(_position(note), waits_for="a snapshot")
            note, bases = await self._rebase(newest), 1
        note, records, waits_for = await self._add_records(note)
        if waits_for and newest is not None and newest.sequence > note.sequence:
            note, bases = await self._rebase(newest), bases + 1
            note, more, waits_for = await self._add_records(note)
            records += more
        if newest is not None and not waits_for:
            bases += await self._add_base(newest)
        return Updated(_position(note), records, bases, waits_for)

    async def tidy(self, count: int) -> int:
        """Keep the *count* newest bases and what follows the oldest of them; how many files were removed."""
        bases = await self._destination.list_files(BASES)
        doomed, kept = bases[: -max(1, count)], bases[-max(1, count) :]
        if kept:
            records = await self._destination.list_files(RECORDS)
            doomed += [file for file in records if file.max_txid <= kept[0].max_txid]
        for file in doomed:
            await self._destination.delete(file)
        return len(doomed)

    # --- where it is

    async def _read_note(self) -> Note:
        data = await self._destination.read_note()
        if not data:
            for level in (BASES, RECORDS):
                if await self._destination.list_files(level):
                    raise DatabaseError(
                        "the destination of the second copy holds a replica that Phalanx did not make",
                        "choose an empty folder (copy_to)",
                    )
            note = Note(platform=self._platform, app=self._app, sequence=0, txid=0)
            await self._write_note(note)
            return note
        try:
            note = msgspec.json.decode(data, type=Note)
        except ValueError as error:  # msgspec's errors are ValueErrors, too
            raise DatabaseError(
                f"{NOTE} of the second copy is damaged: {error}", "empty the folder"
            ) from None
        if (note.format, note.platform, note.app) != (_FORMAT, self._platform, self._app):
            raise DatabaseError(
                f"the destination holds the copy of app {note.app!r} of platform {note.platform!r} "
                f"(format {note.format})",
                "give each app a folder of its own (copy_to)",
            )
        return note

    async def _write_note(self, note: Note) -> None:
        await self._destination.write_note(msgspec.json.encode(note))

    async def _goes_on(self, note: Note) -> bool:
        """Whether the log is the one that was copied, and still has what comes after it."""
        state = await self._log.state()
        if state.last < note.sequence or (state.messages and state.first > note.sequence + 1):
            return False
        entries = await self._log.read(max(1, note.sequence), limit=1, max_bytes=1)
        if not entries or entries[0].sequence != note.sequence:
            return True  # purged since
        # After a loss of acknowledged writes, the same sequence may be another entry.
        return not note.nonce or entries[0].nonce == note.nonce

    # --- what is added

    async def _add_records(self, note: Note) -> tuple[Note, int, str]:
        """Copy what the log has after *note*; the new note, how many records, why it had to stop."""
        count = 0
        while entries := await self._log.read(note.sequence + 1):
            before = note
            for entry in entries:
                if entry.sequence != note.sequence + 1:
                    return note, count, f"a snapshot: the log goes from {note.sequence} to {entry.sequence}"
                if isinstance(entry, LogRecord):
                    if entry.txid != note.txid + 1:
                        await self._write_note(note)
                        return note, count, f"a snapshot: after transaction {note.txid} comes {entry.txid}"
                    await self._add_record(entry)
                    count += 1
                note = msgspec.structs.replace(
                    note,
                    sequence=entry.sequence,
                    txid=entry.txid if isinstance(entry, LogRecord) else note.txid,
                    nonce=entry.nonce,
                )
            if note != before:
                await self._write_note(note)
        return note, count, ""

    async def _add_record(self, record: LogRecord) -> None:
        if record.pointer is None:
            found = ltx.decode_header(record.data).max_txid
            if found != record.txid:
                raise DatabaseError(f"record {record.sequence} of transaction {record.txid} holds {found}")
        file = Copied(RECORDS, record.txid, record.txid, record.size)
        async with contextlib.aclosing(self._content(record)) as chunks:
            await self._destination.write(file, chunks, record.time)

    async def _content(self, record: LogRecord) -> AsyncGenerator[bytes]:
        if record.pointer is None:
            yield record.data
            return
        async with contextlib.aclosing(self._log.objects.get(record.pointer.name)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _add_base(self, snapshot: Snapshot) -> int:
        """Keep *snapshot* as a base, where that is new; how many bases there are more."""
        bases = await self._destination.list_files(BASES)
        if any(file.max_txid >= snapshot.txid for file in bases):
            return 0
        await self._write_base(snapshot)
        return 1

    async def _rebase(self, snapshot: Snapshot) -> Note:
        """Begin anew with *snapshot*: nothing there leads to it."""
        found = [file for level in (RECORDS, BASES) for file in await self._destination.list_files(level)]
        for file in sorted(found, key=lambda one: one.max_txid, reverse=True):
            if file.max_txid >= snapshot.txid:
                await self._destination.delete(file)
        await self._write_base(snapshot)
        note = Note(
            platform=self._platform,
            app=self._app,
            sequence=snapshot.sequence,
            txid=snapshot.txid,
            nonce=snapshot.nonce,
        )
        await self._write_note(note)
        log.info("app %s: the second copy begins anew at %s", self._app, snapshot.position)
        return note

    async def _write_base(self, snapshot: Snapshot) -> None:
        image = self._snapshots.image(snapshot)
        async with contextlib.aclosing(image), contextlib.aclosing(image_process.to_ltx(image)) as chunks:
            await self._destination.write(Copied(BASES, 1, snapshot.txid), chunks, snapshot.time)


def _position(note: Note) -> Position:
    return Position(note.sequence, note.txid)

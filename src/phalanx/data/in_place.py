"""Restoring an app's database in place: asked for by a key, carried out by the next activation.

The state to restore becomes one more record of the log, which holds every page: so it follows to every node
as any other change does, nothing of the history is rewritten, and it can be undone the same way.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phalanx import system
from phalanx.data import ltx
from phalanx.data.entries import Draft
from phalanx.data.restoring import Restoring, Wanted
from phalanx.data.status import RESTORE_FAILED, RESTORE_KEY, RESTORED, RestoreRequest
from phalanx.errors import DatabaseError, WrongRevision
from phalanx.types import Position

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.data")


async def restore_if_asked(database: AppDatabase, epoch: int, base: Position) -> Position | None:
    """Append what was asked for to the log, right after *base*, this epoch's seal; where the log is then.

    None if nothing was asked for, or if it cannot be had: then the audit log says why, and the database stays
    as it is. Raises BusError, Fenced.
    """
    names, bucket = database.names, database.names.app_bucket(database.app)
    subject = names.key_subject(bucket, RESTORE_KEY)
    record = await database.bus.read(names.bucket_stream(bucket), subject)
    if record is None or record.removed:
        return None
    began = system.now()
    restored: Position | None = None
    try:
        request = msgspec.json.decode(record.data, type=RestoreRequest)
        restored, what = await _append(database, epoch, base, request)
    except (DatabaseError, OSError, ValueError) as error:
        database.report(RESTORE_FAILED, str(error), level=logging.ERROR, epoch=epoch)
    else:
        database.report(
            RESTORED,
            f"{what}, asked by {request.by or 'somebody'}",
            epoch=epoch,
            duration_seconds=system.now() - began,
            position=str(restored),
        )
    try:
        await database.bus.write(subject, expect=record.revision, headers={"KV-Operation": "DEL"})
    except WrongRevision:
        log.warning("app %s: another restore was asked for meanwhile", database.app)
    return restored


async def _append(
    database: AppDatabase, epoch: int, base: Position, request: RestoreRequest
) -> tuple[Position, str]:
    wanted = Wanted(request.snapshot, request.position or 0, request.time or 0.0)
    image, file = database.folder / "restore.db", database.folder / "restore.ltx"
    try:
        image.unlink(missing_ok=True)
        done = await Restoring(database.snapshots).restore(wanted, image)
        txid = base.txid + 1
        await asyncio.to_thread(_write_full_record, image, file, txid)
        draft = Draft(epoch, txid, file, file.stat().st_size)
        sequence = await database.log.append(base.sequence, draft, timeout=300.0)
        return Position(sequence, txid), f"the database is as it was at {done.position} again"
    finally:
        image.unlink(missing_ok=True)
        file.unlink(missing_ok=True)


def _write_full_record(image: Path, target: Path, txid: int) -> None:
    """An LTX file with every page of the database *image*, which nobody has open."""
    with image.open("rb") as source, target.open("wb") as file:
        head = source.read(100)
        page_size = int.from_bytes(head[16:18], "big")
        page_size = 65536 if page_size == 1 else page_size
        count = image.stat().st_size // page_size
        header = ltx.Header(
            page_size=page_size,
            commit=count,
            min_txid=txid,
            max_txid=txid,
            time_ms=round(system.wall() * 1000),
        )
        unused = ltx.lock_page(page_size)

        def pages() -> Iterator[ltx.Page]:
            source.seek(0)
            for number in range(1, count + 1):
                data = source.read(page_size)
                if number == 1:
                    data = data[:18] + b"\2\2" + data[20:]  # WAL mode, which a restored file may have left
                if number != unused:
                    yield ltx.Page(number, data)

        for piece in ltx.encoded(header, pages()):
            file.write(piece)


__all__ = ["restore_if_asked"]

"""What operators are told of an app's database on one node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from msgspec.structs import replace

from phalanx.data.image_process import check, fingerprint
from phalanx.data.phase import Phase
from phalanx.data.reading import page_size
from phalanx.data.status import DbStatus, DbVerified
from phalanx.errors import BusError, PhalanxError, ReplicaUnavailable
from phalanx.types import Position

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.data")


async def status_of(database: AppDatabase) -> DbStatus:
    """What ``phalanx db status`` shows of this node."""
    follower, reign = database.follower, database.reign
    status = DbStatus(
        app=database.app,
        node=database.node,
        role=str(database.phase),
        reason=database.reason or database.missing,
        position=database.position,
        txid=database.position.txid,
        diverged=len(database.settlements.diverged()),
        size_bytes=_size(database),
        snapshot=await _newest_snapshot(database),
    )
    if follower is not None:
        return replace(
            status,
            known_end=follower.known_end,
            lag_records=follower.lag_records,
            lag_seconds=follower.lag_seconds,
            lag_bytes=follower.lag_bytes,
            epoch=follower.epoch,
            page_size=database.replica.known.page_size,
        )
    if database.phase in (Phase.LIVE, Phase.KEPT):
        status = replace(status, page_size=await asyncio.to_thread(page_size, database.live))
    if reign is not None and reign.capture is not None and reign.shipper is not None:
        return replace(
            status,
            known_end=database.position.sequence,
            epoch=reign.epoch,
            captured_txid=reign.capture.captured,
            shipped_txid=database.position.txid,
            capture_pid=reign.capture.pid or 0,
            spool_bytes=reign.spool_bytes,
            reason=reign.problem() or database.reason,
        )
    return status


async def verify(database: AppDatabase) -> DbVerified:
    """Read the whole database of this node: is it sound, and what is its fingerprint?"""
    try:
        await check(database.readable_path(), in_use=True)
        source, epoch = database.image_source()
        head, digest = await fingerprint(source)
        sequence = head.sequence or await database.snapshots.sequence_of(head.txid, epoch)
    except (PhalanxError, OSError) as error:
        return DbVerified(node=database.node, ok=False, position=database.position, problem=str(error))
    return DbVerified(node=database.node, ok=True, position=Position(sequence, head.txid), fingerprint=digest)


async def _newest_snapshot(database: AppDatabase) -> str:
    try:
        newest = await database.snapshots.newest()
    except BusError as error:
        log.debug("app %s: snapshots can't be listed: %s", database.app, error)
        return ""
    return newest.name if newest is not None else ""


def _size(database: AppDatabase) -> int:
    with contextlib.suppress(ReplicaUnavailable, OSError):
        return database.readable_path().stat().st_size
    return 0

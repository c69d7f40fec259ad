"""Snapshots by schedule, while this node leads: from a standby where there is one, and what they make free.

One task. Deleting what is no longer needed is safe under any epoch, so a deposed leader may still do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.data.copy_folder import CopyFolder
from phalanx.data.second_copy import SecondCopy
from phalanx.data.status import SnapshotProgress, SnapshotRequest
from phalanx.decide.retention import Limits
from phalanx.errors import BusError, DatabaseError, PhalanxError
from phalanx.ports import Message

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.snapshots")

LOOK_SECONDS = 30.0
"""Between looks at the size of the log."""

ASK_SECONDS = 1800.0
"""What a standby may take for one."""

SILENT_SECONDS = 60.0
"""How long nothing may be heard of it meanwhile."""

TIDY_SECONDS = 600.0
"""Between two clean-ups."""

FAILED_SECONDS = 60.0
"""After a failure it is tried again."""

STOP_SECONDS = 3.0
"""How long the end of a reign waits for the task to end."""

HANGS_SECONDS = 3.0
"""A call to the second copy's folder that has taken so long is reported when it is left behind."""


class SnapshotSchedule:
    """Of one reign."""

    def __init__(self, database: AppDatabase) -> None:
        self._database = database
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._bytes_at_last: int | None = None
        self._copy: SecondCopy | None = None
        self._copy_waits = False
        self._tidy_at = 0.0
        self._folder: CopyFolder | None = None
        if copy_to := str(database.config.copy_to):
            self._folder = CopyFolder(Path(copy_to))
            self._copy = SecondCopy(self._folder, database.snapshots, database.names.platform)

    async def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name=f"{self._database.app} snapshots")

    async def stop(self) -> None:
        """End at once; a snapshot that is half made leaves nothing behind. The next leader does not wait for
        a disk that hangs, least of all for that of the second copy: that is reported, and left alone."""
        task, self._task = self._task, None
        if task is None:
            return
        hung = self._folder.hanging_seconds if self._folder is not None else 0.0
        task.cancel()
        await asyncio.wait({task}, timeout=STOP_SECONDS)
        if hung > HANGS_SECONDS:
            self._report_left(f"{self._database.config.copy_to} has not answered for {hung:.0f} s")
        if not task.done():
            self._report_left(f"the snapshots' task has not ended within {STOP_SECONDS:g} s")
            task.add_done_callback(_ended_late)

    def _report_left(self, what: str) -> None:
        self._database.report("snapshot-left", f"{what}: it is left alone", level=logging.ERROR)

    async def _run(self) -> None:
        database, failed = self._database, ""
        while True:
            try:
                if await self._is_due():
                    await self._make()
                    self._tidy_at = 0.0
                # Again and again: what a new snapshot makes free may go only a while after it was made.
                if system.now() >= self._tidy_at:
                    await self.tidy()
                    self._tidy_at = system.now() + TIDY_SECONDS
                await self._update_copy()
                failed, pause = "", LOOK_SECONDS
            except (PhalanxError, OSError) as error:
                if str(error) != failed:
                    failed = str(error)
                    database.report("snapshot-failed", failed, level=logging.ERROR)
                pause = FAILED_SECONDS
            await wait_at_most(self._stopping, pause)

    async def _is_due(self) -> bool:
        """By time or by the size of the log since the last one, and only if something was written since."""
        database = self._database
        state, newest = await database.log.state(), await database.snapshots.newest()
        if self._bytes_at_last is None or newest is None:
            # What was in the log when the last one was made is not known after a change of the leader.
            self._bytes_at_last = state.bytes if newest is not None else 0
        if not database.position.txid or (newest is not None and newest.txid == database.position.txid):
            return False
        if self._copy_waits:
            return True
        since = system.wall() - (newest.created if newest is not None else await self._began())
        grown = state.bytes - self._bytes_at_last
        return since >= float(database.config.snapshot_every) or grown >= int(database.config.log_limit)

    async def _update_copy(self) -> None:
        """Bring the second copy up to now, where there is one; it is a few files a minute at most."""
        if self._copy is None:
            return
        done = await self._copy.update()
        # It begins with a snapshot, and needs another one where transactions were lost.
        self._copy_waits = bool(done.waits_for)
        if done.bases:
            await self._copy.tidy(int(self._database.config.keep_snapshots))
            self._database.report("second-copy-based", f"up to {done.position}", position=str(done.position))

    async def _began(self) -> float:
        """Since when the log has anything; Unix seconds."""
        first = await self._database.log.read(1, limit=1, max_bytes=1)
        return first[0].time if first else system.wall()

    async def _make(self) -> None:
        database = self._database
        grown = (await database.log.state()).bytes
        for node in database.standbys():
            try:
                await self._ask(node)
                break
            except (BusError, DatabaseError, ValueError) as error:
                log.warning("app %s: node %s makes no snapshot: %s", database.app, node, error)
        else:
            await database.make_snapshot(kind="scheduled")
        self._bytes_at_last = grown

    async def _ask(self, node: str) -> None:
        database = self._database
        request = SnapshotRequest(by=f"schedule of {database.node}", kind="scheduled", quiet=True)
        subject = database.names.database_subject(database.app, "snapshot", node)
        heard, last = asyncio.timeout(SILENT_SECONDS), SnapshotProgress()

        def is_last(message: Message) -> bool:
            nonlocal last
            last = msgspec.json.decode(message.data, type=SnapshotProgress)
            heard.reschedule(asyncio.get_running_loop().time() + SILENT_SECONDS)
            return last.is_last

        with contextlib.suppress(TimeoutError):
            async with (
                heard
            ):  # a standby that dies must not hold up the snapshots for as long as one may take
                await database.bus.gather(
                    subject, msgspec.json.encode(request), timeout=ASK_SECONDS, is_last=is_last
                )
        if not last.name:
            raise DatabaseError(last.error or "nothing is heard of it")

    async def tidy(self) -> None:
        """Remove the snapshots and the part of the log that nothing needs any more."""
        database = self._database
        config = database.config
        done = await database.snapshots.tidy(
            Limits(int(config.keep_snapshots), float(config.keep_snapshots_for))
        )
        if done.snapshots or done.entries:
            database.report(
                "snapshots-tidied", f"{len(done.snapshots)} snapshots and {done.entries} log entries removed"
            )


def _ended_late(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended late", task.get_name(), exc_info=error)

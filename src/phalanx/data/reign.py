"""The database in one active section: sealed log, promoted file, capture and shipping.

Order: :meth:`DataReign.seal`, :meth:`~DataReign.promote`, :meth:`~DataReign.start`, then
:meth:`~DataReign.flush` (graceful ends only) and :meth:`~DataReign.stop`, each of which may also come early.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from typing import TYPE_CHECKING

from phalanx import system
from phalanx.data.capture import Capture
from phalanx.data.entries import Seal, SealKind
from phalanx.data.following import confirmed
from phalanx.data.in_place import restore_if_asked
from phalanx.data.log import LogEnd, WalLog
from phalanx.data.schedule import SnapshotSchedule
from phalanx.data.settlement import later_reigns
from phalanx.data.shipping import Shipper
from phalanx.errors import BusError, DatabaseError, PhalanxError, SyncTimeout
from phalanx.ports import SectionContext
from phalanx.types import Position

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.data")

CATCH_UP_SECONDS = 30.0
"""How long an activation may apply what is left of the log: a candidate is behind by milliseconds."""

RESTORE_SECONDS = 600.0
"""How long the replica may take to become what was restored."""

REPLICAS_AGAIN_SECONDS = 0.2
"""How long until NATS is asked again how many copies of the log there are, where it has not answered."""

FLUSH_SECONDS = 8.0
"""How long a graceful end may take to put the rest into the log."""

LOOK_SECONDS = 1.0
"""How often it is looked how much waits, while nothing is captured: nobody tells of that."""

ADOPTS = "adopts a database that was there before"
"""The reason in a seal whose node has the only copy of the database, until its first record."""


async def what_is_missing(wal: WalLog, before: LogEnd, node: str) -> str:
    """What is known to be missing from the log when a reign of *node* follows on *before*."""
    last, record = before.last_seal, before.last_record
    if last is None or last.kind is SealKind.CLOSE:
        return "nothing"
    wrote, empty = last.node, ""
    if record is not None and record.epoch != last.epoch:
        # Who sealed last has shipped nothing: as a rule it was never active, and who led before it died.
        seals = await wal.seals(0)
        reign = [seal for seal in seals if seal.epoch == record.epoch]
        others = [seal.node for seal in seals if seal.epoch > record.epoch and seal.node != node]
        wrote = reign[0].node if reign else f"the node of epoch {record.epoch}"
        if any(seal.kind is SealKind.CLOSE for seal in reign):
            wrote = others.pop() if others else node
        empty = ", ".join(each for each in dict.fromkeys(others) if each != wrote)
    if wrote == node and not empty:
        return "what this node itself has set aside, if anything"
    if wrote == node:
        return f"unknown until {empty} returns"
    return f"unknown until {wrote} returns" + (f" (or {empty}, which has shipped nothing)" if empty else "")


class DataReign:
    """What one epoch does with the database. *kept*: the live database of the last reign is still there."""

    def __init__(self, database: AppDatabase, epoch: int, *, kept: bool) -> None:
        self._database, self.epoch, self._kept = database, epoch, kept
        self._capture: Capture | None = None
        self._shipper: Shipper | None = None
        self._schedule: SnapshotSchedule | None = None
        self._sealed = 0
        self._base = Position(0, 0)
        self._missing = ""
        self._needs_standby = False
        self._ended = False
        self._guard: sqlite3.Connection | None = None
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._learning: asyncio.Task[None] | None = None
        self._captured = asyncio.Event()

    @property
    def spool_bytes(self) -> int:
        """What is committed and waits for the log: captured files, and the part of the WAL that cannot be
        captured at present."""
        waiting = self._shipper.backlog().bytes if self._shipper is not None else 0
        return waiting + self._uncaptured_bytes()

    def _uncaptured_bytes(self) -> int:
        capture = self._capture
        return capture.uncaptured_bytes if capture is not None and capture.trouble else 0

    @property
    def shipped(self) -> Position:
        """What the log has."""
        return self._shipper.shipped if self._shipper is not None else self._base

    @property
    def capture(self) -> Capture | None:
        """The running capture."""
        return self._capture

    @property
    def shipper(self) -> Shipper | None:
        """What puts it into the log."""
        return self._shipper

    # --- becoming active

    async def seal(self) -> None:
        """Seal the log and apply it up to there."""
        database = self._database
        before = await database.log.last()
        self._check_only_copy(before)
        adopts = before.last_record is None and database.live.exists()
        sealed = await database.log.seal(
            self.epoch, database.node, SealKind.OPEN, ADOPTS if adopts else "becomes active"
        )
        self._sealed = sealed.sequence
        self._base = Position(sealed.sequence, sealed.txid)
        if self._kept:
            await self._check_kept(before, sealed)
            return
        self._missing = await what_is_missing(database.log, before, database.node)
        follower = database.follower
        if follower is None:
            raise DatabaseError("its replica does not follow the log")
        try:
            await follower.wait_for(sealed.sequence, CATCH_UP_SECONDS)
        except TimeoutError:
            raise DatabaseError(
                f"its replica is at {follower.applied}, not at {sealed.sequence} after {CATCH_UP_SECONDS:g} s"
            ) from None
        if (restored := await restore_if_asked(database, self.epoch, self._base)) is not None:
            self._base = restored
            await follower.wait_for(restored.sequence, RESTORE_SECONDS)

    def _check_only_copy(self, end: LogEnd) -> None:
        """While nothing is in the log, the node that adopted a file has the only copy of it."""
        seal = end.last_seal
        adopted = end.last_record is None and seal is not None and seal.reason == ADOPTS
        if seal is not None and adopted and seal.node != self._database.node:
            raise DatabaseError(
                f"the database has not been replicated yet: node {seal.node} has the only copy",
                f"start {seal.node} again; or, to give its database up, see docs/operations.md",
            )

    async def _check_kept(self, before: LogEnd, sealed: Seal) -> None:
        """Nobody has led between the reign whose database was kept and this one, so it is all there is."""
        state = await self._database.replica.state()
        seals = [s for s in await self._database.log.seals(state.sealed) if s.sequence < sealed.sequence]
        others = later_reigns(seals, sealed.txid, state.epoch, self._database.node)
        known = {state.epoch, *(seal.epoch for seal in seals)}
        if others or before.epoch not in known:  # the seals of others may be purged
            who = f"node {others[0].node}" if others else f"epoch {before.epoch}"
            raise DatabaseError(f"{who} has led since: this node's database has to be settled first")

    async def promote(self) -> None:
        """The replica becomes the live database; a kept one is taken over as it is."""
        database = self._database
        began = system.now()
        if self._kept:
            # In this order: until the note is there, the files tell what the disk may have lost.
            await database.replica.resume(self.epoch, self._sealed)
            await database.settlements.drop_captured(self._base.txid)
            how, position = "went on with its own database", self._base
        else:
            position, at = self._base, (await database.replica.state()).position.txid
            if at != position.txid:
                raise DatabaseError(f"its replica is at transaction {at}, the log at {position}")
            promoted = await database.replica.promote(database.live, self.epoch, self._sealed)
            how = "promoted its replica"
            if not promoted.txid:
                how = "adopts the database that was there" if promoted.exists else "begins without a database"
        database.report(
            "database-promoted",
            f"{how} at {position}; missing: {self._missing or 'nothing'}",
            epoch=self.epoch,
            duration_seconds=system.now() - began,
            position=str(position),
            missing=self._missing or "nothing",
        )

    async def start(self, section: SectionContext) -> None:
        """Let no commit escape from now on. Litestream is still being started when this returns."""
        database = self._database
        self._capture = capture = Capture(
            database.live,
            database.folder,
            section,
            on_captured=self._on_captured,
            on_event=self._on_capture_event,
            gate=lambda closed, passing: database.replica.gate(database.live, closed, passing),
        )
        await capture.begin(self._base.txid)
        capture.failed.add_done_callback(self._on_capture_failed)
        self._shipper = shipper = Shipper(
            database.log,
            capture,
            epoch=self.epoch,
            node=database.node,
            base=self._base,
            on_fenced=self._on_fenced,
            on_backlog=self._on_backlog,
            wal=database.live.with_name(f"{database.live.name}-wal"),
            forget=capture.forget,
        )
        await shipper.start()
        self._starting = asyncio.create_task(self._see_to_the_start(capture), name="capture, starting")
        self._watching = asyncio.create_task(self._watch_spool(), name="spool, watched")
        self._needs_standby = database.config.sync != "server"
        if database.config.sync == "auto":
            self._learning = asyncio.create_task(self._learn_replicas(), name="log's replicas")

    async def _see_to_the_start(self, capture: Capture) -> None:
        database = self._database
        try:
            await capture.wait_ready()
        except Exception as error:
            if not isinstance(error, PhalanxError):
                log.exception("app %s: the start of capturing has failed", database.app)
            if not self._ended:
                database.on_lost(f"its database cannot be captured: {error}")
            return
        self._captured.set()
        self._schedule = schedule = SnapshotSchedule(database)
        await schedule.start()

    async def _learn_replicas(self) -> None:
        """Where NATS keeps copies of the log, its word will do; until that is known, a standby's."""
        while True:
            try:
                self._needs_standby = (await self._database.log.state()).replicas < 2
                return
            except BusError as error:
                log.debug("app %s: how many copies of the log there are: %s", self._database.app, error)
            await asyncio.sleep(REPLICAS_AGAIN_SECONDS)

    async def wait_captured(self) -> None:
        """Wait until Litestream is at work. If it cannot be, the section is ended, and this with it."""
        await self._captured.wait()

    # --- while active

    def problem(self) -> str:
        """Why commits do not get into the log at present; empty if they do."""
        if self._capture is None or self._shipper is None:
            return ""
        if self._capture.failed.done():
            return f"its database is not captured: {self._capture.failed.result()}"
        if trouble := self._capture.trouble:
            return f"its database is not captured {trouble}"
        trouble = self._shipper.trouble or self._shipper.failing
        return f"its database does not get into the log: {trouble}" if trouble else ""

    def _on_captured(self, txid: int) -> None:
        if self._shipper is not None:
            self._shipper.captured(txid)

    def _on_capture_event(self, kind: str, detail: str) -> None:
        level = logging.INFO if kind in ("started", "disk-recovered") else logging.WARNING
        self._database.report(f"capture-{kind}", detail, level=level, epoch=self.epoch)

    def _on_capture_failed(self, failed: asyncio.Future[DatabaseError]) -> None:
        if not failed.cancelled() and not self._ended:
            self._database.on_lost(f"its database is not captured any more: {failed.result()}")

    def _on_fenced(self, error: PhalanxError) -> None:
        self._database.report("log-refused", str(error), level=logging.ERROR, epoch=self.epoch)
        self._database.on_lost(f"the log takes nothing of this epoch any more: {error}")

    async def _watch_spool(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._shipper is not None and self._uncaptured_bytes():
                self._on_backlog(self._shipper.backlog().bytes)

    def _on_backlog(self, captured_bytes: int) -> None:
        limit, uncaptured = int(self._database.config.spool_limit), self._uncaptured_bytes()
        size_bytes = captured_bytes + uncaptured
        if size_bytes > limit and not self._ended:
            self._ended = True
            reason = f"{size_bytes} bytes wait for the log, more than spool_limit = {limit}"
            if uncaptured and (problem := self.problem()):
                reason += f"; {problem}"
            self._database.report("spool-full", reason, level=logging.ERROR, epoch=self.epoch)
            self._database.on_lost(reason)

    async def sync(self, timeout: float) -> Position:
        """See ``ActiveDatabase.sync``."""
        database = self._database
        app, deadline = database.app, system.now() + timeout
        capture, shipper, starting = self._capture, self._shipper, self._starting
        if capture is None or shipper is None or starting is None:
            raise DatabaseError("nothing is captured yet", "wait until the app is active")
        stage = "Litestream"
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wait({starting})
                txid = await capture.sync(timeout)
                stage = "NATS"
                position = await shipper.wait_shipped(txid, max(0.001, deadline - system.now()))
                if self._needs_standby:
                    stage = "a standby"
                    left = max(0.001, deadline - system.now())
                    await confirmed(
                        database.bus, database.names, app, position.sequence, left, epoch=self.epoch
                    )
        except TimeoutError:
            raise SyncTimeout(app, timeout, stage) from None
        return position

    # --- standing down

    async def flush(self) -> str:
        """Put what was committed into the log and close it; what went wrong, empty if nothing."""
        capture, shipper = self._capture, self._shipper
        if capture is None or shipper is None:
            return ""
        deadline = system.now() + FLUSH_SECONDS
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                txid = await capture.sync(FLUSH_SECONDS)
                await shipper.wait_shipped(txid, max(0.001, deadline - system.now()))
                await shipper.close_log(max(0.001, deadline - system.now()))
        except TimeoutError:
            return f"not all of it was in the log within {FLUSH_SECONDS:g} s"
        except PhalanxError as error:
            return str(error)
        return ""

    async def stop(self) -> None:
        """End capture and shipping at once. Nothing of it runs afterwards."""
        self._ended = True
        tasks = [task for task in (self._starting, self._watching, self._learning) if task is not None]
        self._starting = self._watching = self._learning = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        schedule, self._schedule = self._schedule, None
        if schedule is not None:
            await schedule.stop()
        shipper, capture = self._shipper, self._capture
        if shipper is not None:
            self._base = shipper.shipped
            await shipper.stop()
        self._shipper = None
        if capture is not None:
            self._guard = await capture.stop()
        self._capture = None

    def take_guard(self) -> sqlite3.Connection | None:
        """The connection that keeps the WAL of the live database from being removed, once."""
        guard, self._guard = self._guard, None
        return guard

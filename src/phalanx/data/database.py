"""An app's SQLite database on one node: replica, live database, and the ways between them.

On a standby a follower applies the log to the replica. In an active section the live database lies at the
user's path, Litestream captures it, and a shipper puts what was captured into the log (``data.reign``). When
a section has ended, the live database that it left is settled against the log (``data.settlement``).

The invariant: one of two owns the database at any moment, the *tender* (a task that brings it to a replica
that follows) or the active section. Whoever owns it holds ``_turn``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.config import SQLite
from phalanx.data import disk
from phalanx.data.bootstrap import Bootstrap
from phalanx.data.entries import Seal
from phalanx.data.following import Follower
from phalanx.data.handles import ActiveDatabase, Database
from phalanx.data.image_process import ImageSource
from phalanx.data.log import LogEnd, LogWentBack, WalLog
from phalanx.data.objects import ObjectStore
from phalanx.data.owner import check_owner
from phalanx.data.phase import Phase
from phalanx.data.reading import Readers
from phalanx.data.reign import ADOPTS, DataReign
from phalanx.data.replica_client import ReplicaProcess
from phalanx.data.settlement import Settlements
from phalanx.data.snapshots import Progress, Snapshot, Snapshots, no_progress
from phalanx.data.wal_index import close_removed
from phalanx.decide.backoff import Backoff
from phalanx.errors import DatabaseError, NotActive, PhalanxError, ReplicaUnavailable, StreamGone
from phalanx.names import Names
from phalanx.ports import Bus, SectionContext
from phalanx.types import DatabaseState, Position

log = logging.getLogger("phalanx.data")

RETRY = Backoff(first=0.2, longest=10.0)
TURN_SECONDS = 5.0
"""How long an activation waits for the tender to let go."""

UNKNOWN_DATA_SECONDS = 1.0
"""How much longer a node without a file waits while the log is empty: another may have one to adopt."""

KEPT_LOOK_SECONDS = 1.0
"""How often it is looked again whether a kept database, or what holds this node back, is still so."""

NEAR_ENTRIES = 64
"""A replica that is so near the end of the log counts as one that follows."""

LATE_WRITERS_SECONDS = 60.0
"""How long a live database that has become a replica refuses late writers; then its space is given up."""

LAG_LOOK_SECONDS = 5.0
"""How long a replica that has to catch up may stand still."""

LOOK_SECONDS = 1.0
"""How often it is looked whether the replica is too far behind, and whether its process answers."""

LAG_HANDICAP_SECONDS = (0.05, 0.5)
"""Least and most that a candidate waits longer because its replica is behind."""


class DatabaseNode(Protocol):
    """What a database needs of its node."""

    @property
    def bus(self) -> Bus: ...
    @property
    def names(self) -> Names: ...
    @property
    def node(self) -> str: ...


Report = Callable[..., None]
"""``report(action, reason, level=..., **details)``: one audit entry of the app."""


class AppDatabase:
    """One app's database on this node. The app owns it: :meth:`start`, sections, :meth:`close`.

    *on_change*: whether this node can be a candidate may have changed. *on_lost*: the active section cannot
    go on, with the reason.
    """

    def __init__(
        self,
        app: str,
        config: SQLite,
        node: DatabaseNode,
        *,
        report: Report,
        on_change: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.app, self.config, self.node = app, config, node.node
        self.live = Path(str(config.path))
        self.folder = self.live.parent / f".{self.live.name}-phalanx"
        self.report, self.on_lost, self._on_change = report, on_lost, on_change
        self.bus, self.names = node.bus, node.names
        self.log = WalLog(node.bus, node.names, app)
        self.objects = ObjectStore(node.bus, node.names, app)
        self.replica = ReplicaProcess(self.folder, self._on_process_exit)
        self.snapshots = Snapshots(self.objects, self.log, app, node.node)
        self.readers = Readers(app)
        self.standbys: Callable[[], list[str]] = list
        """The nodes that are candidates now, besides this one; the app knows."""
        self.public, self.active = Database(self), ActiveDatabase(self)
        self.bootstrap = Bootstrap(self)
        self.settlements = Settlements(self)
        self.follower: Follower | None = None
        self.reign: DataReign | None = None
        self.guard: sqlite3.Connection | None = None
        """A reign's last connection: whoever closes the last one removes the WAL, which must not be yet."""
        self._phase, self._reason = Phase.STARTING, ""
        self._turn = asyncio.Lock()
        self._section_has_turn = False
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._log_is_empty: bool | None = None
        self._readable = self.replica.path
        self._failures, self._reported = 0, ""
        self._is_full = False
        """Whether the replica could not apply a record for want of room, and none since."""
        self._told, self._missing = "", ""
        self._release_at = float("inf")
        self._tender: asyncio.Task[None] | None = None

    # --- life

    async def start(self) -> None:
        """Begin to tend it. Returns at once; what goes wrong shows in :attr:`phase` and is tried again."""
        self._tender = asyncio.create_task(self._tend(), name=f"{self.app} database")

    async def close(self) -> None:
        """Stop. The active section has ended before."""
        tender, self._tender = self._tender, None
        if tender is not None:
            tender.cancel()
            await asyncio.gather(tender, return_exceptions=True)
        await self._stop_follower()
        self.readers.revoke("the node has stopped")
        await self.release_guard()
        with contextlib.suppress(DatabaseError, OSError):  # not noted: its WAL has to tell
            await self.replica.vouch()
        await self.replica.close()
        self._set_phase(Phase.STOPPED, "the node has stopped")

    # --- what is so

    @property
    def phase(self) -> Phase:
        """What this node's part of the database is."""
        return self._phase

    @property
    def reason(self) -> str:
        """Why it is not more than that."""
        return self._reason

    def ineligible_because(self, *, acts_on_it: bool = True) -> str:
        """Why this node cannot be a candidate; empty if it can. Whoever *acts_on_it* hears of a change."""
        found = self._ineligible()
        if acts_on_it:
            self._told = found
        return found

    @property
    def missing(self) -> str:
        """What is gone of the app's database in NATS; empty as a rule."""
        return self._missing

    def note_missing(self, problem: str) -> None:
        """The app's log is gone, or is there again (empty)."""
        if problem != self._missing:
            self._missing = problem
            self._on_change()

    def _ineligible(self) -> str:
        if self._phase is Phase.LIVE:
            return ""
        if self._missing:
            return self._missing
        if self.replica.is_silent:
            return "its replica process does not answer"
        if self._phase is Phase.KEPT:
            return ""
        if self._phase is not Phase.FOLLOWING or self.follower is None:
            return f"its database is {self._phase}" + (f": {self._reason}" if self._reason else "")
        lag = self.follower.lag_seconds
        if lag > float(self.config.max_lag):
            return f"its replica is {lag:.0f} s behind (max_lag is {float(self.config.max_lag):g} s)"
        return self._reason

    def handicap_seconds(self) -> float:
        """How much longer this node should wait before it tries to lead."""
        if self._phase is Phase.KEPT:
            return 0.0
        if self._log_is_empty and not self.live.exists():
            return UNKNOWN_DATA_SECONDS
        if self.follower is None or not self.follower.lag_records:
            return 0.0
        least, most = LAG_HANDICAP_SECONDS
        return min(most, least + self.follower.lag_seconds)

    @property
    def position(self) -> Position:
        """How far this node is: what the log has of the live database, or what the replica has applied."""
        if self.reign is not None:
            return self.reign.shipped
        return self.follower.applied if self.follower is not None else Position(0, 0)

    def _set_phase(self, phase: Phase, reason: str = "") -> None:
        if (phase, reason) == (self._phase, self._reason):
            return
        self._phase, self._reason = phase, reason
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change()

    # --- the tender

    async def _tend(self) -> None:
        left_is_reported = False
        while True:
            self._wake.clear()
            again: float | None = None
            async with self._turn:
                try:
                    if not left_is_reported:
                        self.settlements.report_left()
                        left_is_reported = True
                    await self._prepare()
                    if not self._is_full:
                        self._failures, self._reported = 0, ""
                    if self._phase is Phase.KEPT or self._reason:
                        again = KEPT_LOOK_SECONDS
                except Exception as error:
                    # A bug, too: nobody else brings the database back, and the app may be active elsewhere.
                    if not isinstance(error, PhalanxError | OSError):
                        log.exception("app %s: tending the database failed", self.app)
                    self._failures += 1
                    again = RETRY.delay(self._failures)
                    self._fail(error)
            await self._wait(again)

    async def _wait(self, seconds: float | None) -> None:
        """Until there is something to tend; meanwhile it is told when the replica falls too far behind, and a
        process that hangs is ended."""
        deadline = system.now() + seconds if seconds is not None else float("inf")
        while not await wait_at_most(self._wake, min(LOOK_SECONDS, deadline - system.now())):
            if self.replica.is_running and not self._section_has_turn:
                self.replica.look()
            if system.now() >= self._release_at:
                self._release_at = float("inf")
                with contextlib.suppress(DatabaseError):  # it has ended, and with it its hold
                    await self.replica.release_old()
            if self._ineligible() != self._told:
                self._on_change()
            if system.now() >= deadline:
                return

    def _fail(self, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        if reason != self._reported:  # also where something else was tried in between
            self._reported = reason
            self.report("database-unavailable", reason, level=logging.ERROR)
        self._set_phase(Phase.BROKEN, reason)

    async def _prepare(self) -> None:
        """Bring the database to a replica that follows, or find that the live one has to be kept."""
        if not self.replica.is_running:
            await check_owner(self)
            await self._stop_follower()
            await self.replica.start()
        state = await self.replica.state()
        end = await self._end_of_log()
        self._log_is_empty = end.last_record is None
        if state.role == "live":
            self._set_phase(Phase.SETTLING)
            if not await self.settlements.settle(state, end):
                self._set_phase(Phase.KEPT)
                return
            self.readers.revoke("the database was settled")  # a kept one is read at the user's path
            state = await self.replica.state()
            self._release_at = system.now() + LATE_WRITERS_SECONDS
        await self.release_guard()
        if self.follower is not None and self.follower.trouble is None:
            self._set_phase(Phase.FOLLOWING, self._held_back(end))
            return
        trouble = self.follower.trouble if self.follower is not None else None
        await self._stop_follower()
        if trouble and state.state == "ready" and disk.is_full(trouble):
            # Nothing has happened to the replica: it goes on from there, as soon as there is room.
            raise DatabaseError(trouble, f"make room on the disk of {self.folder}")
        end_state = await self.log.state()
        why = trouble or await self.bootstrap.needed_because(state, end_state)
        if why:
            self._set_phase(Phase.BOOTSTRAPPING)
            await self.bootstrap.run(state, end_state, why)
            self.readers.revoke("the replica was made anew")
        await self._start_follower()
        await self._catch_up(end.sequence)
        self._set_phase(Phase.FOLLOWING, self._held_back(end))

    async def _catch_up(self, sequence: int) -> None:
        """Let the replica come near the end of the log: before that its readers would see a distant past."""
        follower = self.follower
        assert follower is not None
        while sequence - follower.applied.sequence > NEAR_ENTRIES:
            self._set_phase(Phase.BOOTSTRAPPING, f"the replica is at {follower.applied} of {sequence}")
            before = follower.applied
            with contextlib.suppress(TimeoutError):
                await follower.wait_for(sequence, LAG_LOOK_SECONDS)
            if follower.applied == before:
                raise DatabaseError(f"the replica does not get on from {before} to {sequence}")

    async def _end_of_log(self) -> LogEnd:
        """The end of the log; also of one that is shorter than it was, once that is reported."""
        try:
            return await self.log.last()
        except LogWentBack as error:
            self.report("log-went-back", str(error), level=logging.CRITICAL)
            # What this node has more than the log is kept by what follows: settling, or a bootstrap.
            self.log.accept_loss()
            return await self.log.last()

    def _held_back(self, end: LogEnd) -> str:
        """Why this node must not lead although its replica follows; empty if it may.

        A file at the user's path that is not Phalanx's, while the platform has a database already; or another
        node that has adopted its own file and has the only copy of it until its first record is in the log.
        """
        if end.last_record is not None:
            if self.live.exists():
                return f"{self.live} exists, but the platform has another database: move it away"
            return ""
        seal = end.last_seal
        if seal is not None and seal.reason == ADOPTS and seal.node != self.node:
            return f"node {seal.node} has the only copy of the database until it has replicated it"
        return ""

    def look(self) -> None:
        """Something outside has changed, such as the leader."""
        if self._phase in (Phase.KEPT, Phase.BROKEN):
            self._wake.set()

    async def _start_follower(self) -> None:
        self.follower = follower = Follower(
            self.bus,
            self.names,
            self.app,
            self.replica,
            self.log,
            node=self.node,
            on_trouble=self._on_trouble,
            on_applied=self._on_applied,
            on_seal=self._on_seal,
            spool=self.folder,
        )
        self._readable = self.replica.path
        await follower.start()

    async def _stop_follower(self) -> None:
        follower, self.follower = self.follower, None
        if follower is not None:
            await follower.stop()

    def _on_trouble(self, reason: str) -> None:
        was_full, self._is_full = self._is_full, disk.is_full(reason)
        if not self._is_full:
            self.report("replica-lost", reason, level=logging.ERROR)
        elif not was_full:
            self.report("replica-disk-full", reason, level=logging.ERROR)
        self._set_phase(Phase.BROKEN, reason)
        self._wake.set()

    def _on_applied(self, position: Position) -> None:
        self._is_full = False
        if self._log_is_empty and position.txid:
            # The platform has a database now: that may hold this node back, or let it go.
            self._log_is_empty = False
            self._wake.set()
        if self.replica.path != self._readable:
            # A record that was too large for the WAL made the replica anew, beside the old one.
            self._readable = self.replica.path
            self.readers.revoke("the replica was made anew")
        if self._told and not self._ineligible():
            self._on_change()  # it has caught up

    def _on_seal(self, seal: Seal) -> None:
        if seal.reason == ADOPTS:
            self._wake.set()

    def _on_process_exit(self, reason: str) -> None:
        if self._phase is not Phase.STOPPED:
            self.report("replica-process-exited", reason, level=logging.ERROR)
            self._wake.set()

    async def release_guard(self) -> None:
        """Close the connection that a reign has left."""
        guard, self.guard = self.guard, None
        if guard is not None:
            await asyncio.to_thread(guard.close)
            close_removed()

    # --- the active section (ports.SectionDatabase)

    async def seal(self, epoch: int) -> None:
        """See ``ports.SectionDatabase``."""
        await self._take_turn()
        if self._phase not in (Phase.FOLLOWING, Phase.KEPT):
            raise DatabaseError(f"the database is {self._phase}: {self._reason}", "see: phalanx db status")
        # Before the log is sealed in vain: another node may have a process that answers.
        await self.replica.hurry(self.replica.state())
        self.reign = DataReign(self, epoch, kept=self._phase is Phase.KEPT)
        try:
            await self.replica.hurry(self.reign.seal())
        except StreamGone as error:
            self.note_missing(str(error))
            raise

    async def promote(self) -> None:
        """See ``ports.SectionDatabase``."""
        reign = self._own_reign()
        await self._stop_follower()
        self.readers.revoke("this node leads now")
        await self.replica.hurry(reign.promote())
        self._set_phase(Phase.LIVE)

    async def start_capture(self, section: SectionContext) -> None:
        """See ``ports.SectionDatabase``."""
        await self._own_reign().start(section)

    async def wait_captured(self) -> None:
        """See ``ports.SectionDatabase``."""
        await self._own_reign().wait_captured()

    async def stop_capture(self, *, graceful: bool) -> str:
        """See ``ports.SectionDatabase``."""
        reign = self.reign
        problem = ""
        if reign is not None:
            if graceful:
                problem = await reign.flush()
            await reign.stop()
            self.guard = reign.take_guard() or self.guard
            self.reign = None
        self.readers.revoke("this node leads no more")
        if self._phase is Phase.LIVE:
            self._set_phase(Phase.SETTLING)
        if self._section_has_turn:
            self._section_has_turn = False
            self._turn.release()
        self._wake.set()
        return problem

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise DatabaseError(
                f"the database is {self._phase} and not free within {TURN_SECONDS:g} s"
            ) from None
        self._section_has_turn = True

    def _own_reign(self) -> DataReign:
        if self.reign is None:
            raise NotActive(self.app)
        return self.reign

    # --- for operators

    def brief(self) -> DatabaseState:
        """What the node's status and metrics say of it."""
        reign, follower = self.reign, self.follower
        return DatabaseState(
            str(self._phase),
            self.position,
            follower.lag_seconds if follower is not None else 0.0,
            reign.spool_bytes if reign is not None else 0,
            reign.problem() if reign is not None else self._reason if self._phase is Phase.BROKEN else "",
        )

    def readable_path(self) -> Path:
        """Where this node's database lies at present. Raises ReplicaUnavailable."""
        if self._phase in (Phase.LIVE, Phase.KEPT):
            return self.live
        if self._phase is Phase.FOLLOWING and self.follower is not None and self.follower.applied.txid:
            return self.replica.path
        raise ReplicaUnavailable(self.app, f"its database is {self._phase} on this node: {self._reason}")

    async def make_snapshot(
        self, *, kind: str = "manual", note: str = "", progress: Progress = no_progress
    ) -> Snapshot:
        """Store a snapshot of this node's database as it is now. Raises DatabaseError, BusError, OSError."""
        source, epoch = self.image_source()
        made = await self.snapshots.create(source, epoch=epoch, kind=kind, note=note, progress=progress)
        self.report(
            "snapshot-made", f"{made.name}, {made.size_bytes} bytes of {made.raw_bytes}", snapshot=made.name
        )
        return made

    def image_source(self) -> tuple[ImageSource, int]:
        """What an image of this node's database is made of, and the epoch under which it is written here."""
        if self.reign is not None and self._phase is Phase.LIVE:
            return ImageSource(self.live, capture=self.folder / "capture" / "ltx" / "0"), self.reign.epoch
        path = self.readable_path()
        return ImageSource(path, journal=path.with_name("journal")), 0

    def say(self, reason: str) -> None:
        """What it is busy with, for those who look."""
        self._reason = reason

    # --- for users

    def connect(self) -> sqlite3.Connection:
        """See :meth:`Database.connect`."""
        return self.readers.connect(self.readable_path())

    async def wait_for(self, position: Position, timeout: float) -> None:
        """See :meth:`Database.wait_for`."""
        deadline = system.now() + timeout
        while True:
            changed = self._changed
            if self._phase is Phase.LIVE:
                return
            follower = self.follower
            left = deadline - system.now()
            if follower is not None and self._phase is Phase.FOLLOWING:
                with contextlib.suppress(TimeoutError):
                    await follower.wait_for(position.sequence, max(0.0, left))
                    return
            if left <= 0 or not await wait_at_most(changed, left):
                raise ReplicaUnavailable(
                    self.app, f"its replica has not reached {position} within {timeout:g} s"
                )


__all__ = ["ActiveDatabase", "AppDatabase", "Database", "Phase"]

"""Makes this node's replica anew: from the newest snapshot, or from the beginning of the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from phalanx import system
from phalanx.data.log import LOST_WRITES, LogState
from phalanx.data.replica_state import ReplicaState
from phalanx.data.snapshots import Snapshot
from phalanx.errors import DatabaseError, DiskFull

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.data")


class Bootstrap:
    """Of one app's database on this node."""

    def __init__(self, database: AppDatabase) -> None:
        self._database = database

    async def needed_because(self, state: ReplicaState, end: LogState) -> str:
        """Why the replica cannot go on from where it is, or had better not; empty if it goes on."""
        if state.state == "broken":
            return state.reason or "the replica is broken"
        if end.last < state.position.sequence:
            return f"the log ends at {end.last}, before {state.position}"
        if end.messages and end.first > state.position.sequence + 1:
            return f"the log begins at {end.first}, after {state.position}"
        if state.state == "empty" and await self._fitting(end):
            return "there is no replica yet"
        return ""

    async def run(self, state: ReplicaState, end: LogState, why: str) -> None:
        """Make it anew. Raises DatabaseError, BusError, OSError; then the old one is as it was."""
        database = self._database
        began = system.now()
        if state.state == "ready" and (end.last < state.position.sequence or LOST_WRITES in why):
            await self._keep_lost_writes(state)
        snapshot = await self._install_newest(await self._fitting(end))
        if snapshot is None:
            if end.messages and end.first > 1:
                raise DatabaseError(
                    f"the log begins at {end.first}, and there is no snapshot of what was before",
                    "make one where the database still is: phalanx snapshot create",
                )
            await database.replica.reset()
            how = "from the beginning of the log"
        else:
            how = f"from {snapshot.name}"
        database.report(
            "replica-bootstrapped",
            f"{how}: {why}",
            duration_seconds=system.now() - began,
            snapshot=snapshot.name if snapshot is not None else "",
        )

    async def _fitting(self, end: LogState) -> list[Snapshot]:
        """The snapshots from which the log goes on, the newest first."""
        found = await self._database.snapshots.list_usable()
        return [one for one in reversed(found) if end.first - 1 <= one.sequence <= end.last]

    async def _install_newest(self, snapshots: list[Snapshot]) -> Snapshot | None:
        """The first of *snapshots* that is sound is in place; None if there are none. Raises as the last
        one that is not."""
        for number, snapshot in enumerate(snapshots, 1):
            try:
                await self._install(snapshot)
            except DiskFull:
                raise
            except DatabaseError as error:
                if number == len(snapshots):
                    raise
                reason = f"{snapshot.name} cannot be used, an older one is tried: {error}"
                self._database.report("snapshot-bad", reason, level=logging.ERROR, snapshot=snapshot.name)
            else:
                return snapshot
        return None

    async def _install(self, snapshot: Snapshot) -> None:
        database = self._database
        image = database.folder / "bootstrap.db"
        image.unlink(missing_ok=True)

        def progress(done: int, total: int) -> None:
            database.say(f"{100 * done // max(1, total)} % of {snapshot.name}")

        try:
            await database.snapshots.unpack(snapshot, image, progress)
            await database.replica.install(image, snapshot.sequence, snapshot.txid)
        finally:
            image.unlink(missing_ok=True)

    async def _keep_lost_writes(self, state: ReplicaState) -> None:
        """NATS has lost acknowledged writes, and this replica has them still: it is kept aside first."""
        database = self._database
        target = database.settlements.free_name(f"log-{state.position.sequence}")
        lost = await database.log.last()
        what = database.settlements.note(
            target,
            epoch=lost.epoch,
            sequence=lost.sequence,
            txid=lost.txid,
            transactions=max(0, state.position.txid - lost.txid),
            exact=False,
            size_bytes=state.page_size * state.commit,
        )
        await database.replica.snapshot(target)
        database.settlements.report(what)

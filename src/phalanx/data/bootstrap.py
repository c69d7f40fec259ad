"""Makes this node's replica anew, from the newest snapshot or from the beginning of the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from phalanx.data.log import LogState
from phalanx.data.replica_state import ReplicaState
from phalanx.errors import DatabaseError

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase

log = logging.getLogger("phalanx.data")


class Bootstrap:
    """Of one app's database on this node."""

    def __init__(self, database: AppDatabase) -> None:
        self._database = database

    def is_needed(self, state: ReplicaState, end: LogState) -> bool:
        """Whether the replica cannot go on from where it is."""
        if state.state == "broken":
            return True
        return end.messages > 0 and end.first > state.position.sequence + 1

    async def run(self) -> None:
        """Make it anew. Raises DatabaseError, BusError."""
        database = self._database
        end = await database.log.state()
        if end.first > 1 and end.messages:
            raise DatabaseError(f"the log begins at {end.first}, and there is no snapshot")
        await database.replica.reset()

"""Snapshots by schedule, while this node leads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase
    from phalanx.data.reign import DataReign


class SnapshotSchedule:
    """Of one reign."""

    def __init__(self, database: AppDatabase, reign: DataReign) -> None:
        self._database, self._reign = database, reign

    async def start(self) -> None:
        """Begin."""

    async def stop(self) -> None:
        """End."""

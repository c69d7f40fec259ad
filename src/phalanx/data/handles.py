"""What users hold of an app's database: ``app.db`` on every node, ``ctx.db`` in an active section."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from phalanx.errors import NotActive
from phalanx.types import Position

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase


class Database:
    """``app.db``: the app's database on this node, whichever role that has."""

    def __init__(self, database: AppDatabase) -> None:
        self._database = database

    @property
    def position(self) -> Position:
        """How far this node is."""
        return self._database.position

    @property
    def phase(self) -> str:
        """``following``, ``live``, or why it is neither yet."""
        return str(self._database.phase)

    def connect(self) -> sqlite3.Connection:
        """A read-only connection to a consistent database: the live replica of a standby, or the live one.

        It sees each transaction entirely or not at all. Once this node's role changes it raises
        StaleConnection: connect again. Raises ReplicaUnavailable while there is none.
        """
        return self._database.connect()

    async def wait_for(self, position: Position, *, timeout: float = 5.0) -> None:
        """Wait until this node's replica has *position*, as ``ctx.db.sync()`` returned it: read your writes.

        Raises ReplicaUnavailable after *timeout* seconds.
        """
        await self._database.wait_for(position, timeout)


class ActiveDatabase:
    """``ctx.db``: the live database of an active section."""

    def __init__(self, database: AppDatabase) -> None:
        self._database = database

    @property
    def path(self) -> str:
        """Where the database lies: an ordinary file, for any driver and any program. It may not exist yet."""
        return str(self._database.live)

    @property
    def position(self) -> Position:
        """What the log has of it so far."""
        return self._database.position

    async def sync(self, *, timeout: float | None = None) -> Position:
        """Barrier: once it returns, everything committed before the call survives the loss of any one node.

        *timeout*: seconds; by default the declared ``sync_timeout``. Raises SyncTimeout when it was not
        confirmed in time (it may still survive), Fenced when another node leads, NotActive after the section.
        """
        reign = self._database.reign
        if reign is None:
            raise NotActive(self._database.app)
        seconds = float(self._database.config.sync_timeout) if timeout is None else timeout
        return await reign.sync(seconds)

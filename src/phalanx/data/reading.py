"""Read-only connections to an app's database on this node: the replica of a standby, or the live one.

The replica is an ordinary SQLite database in WAL mode, which the replica process changes by whole
transactions, so a reader sees each of them entirely or not at all. A connection stays what it is for one
role of the node: once that changes, or the replica was made anew, it is *stale* and refuses every call
instead of showing old data.
"""

from __future__ import annotations

import contextlib
import sqlite3
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from phalanx.errors import ReplicaUnavailable

BUSY_SECONDS = 5.0
"""How long SQLite waits for a lock; readers of a WAL database wait only while its index is rebuilt."""


class StaleConnection(sqlite3.OperationalError):
    """The database behind this connection is not the app's any more: connect again."""


class ReadOnlyCursor(sqlite3.Cursor):
    """A cursor of a connection that can be revoked."""

    def execute(self, *args: Any, **kwargs: Any) -> ReadOnlyCursor:
        """As in sqlite3. Raises StaleConnection."""
        _check(self.connection)
        super().execute(*args, **kwargs)
        return self

    def executemany(self, *args: Any, **kwargs: Any) -> ReadOnlyCursor:
        """As in sqlite3. Raises StaleConnection."""
        _check(self.connection)
        super().executemany(*args, **kwargs)
        return self

    def executescript(self, *args: Any, **kwargs: Any) -> ReadOnlyCursor:
        """As in sqlite3. Raises StaleConnection."""
        _check(self.connection)
        super().executescript(*args, **kwargs)
        return self


def _check(connection: sqlite3.Connection) -> None:
    if isinstance(connection, ReadOnlyConnection) and connection.revoked:
        raise StaleConnection(f"{connection.revoked}: call app.db.connect() again")


class ReadOnlyConnection(sqlite3.Connection):
    """A connection that can be revoked. Statements that run just then still see one consistent state."""

    revoked: str = ""
    """Why it is stale; empty while it is not."""

    def cursor(self, factory: Any = ReadOnlyCursor) -> Any:
        """As in sqlite3. Raises StaleConnection."""
        _check(self)
        return super().cursor(factory)


def page_size(path: Path) -> int:
    """Of the database at *path*, in bytes; 0 where there is none, or that cannot be told. Blocks briefly."""
    try:
        with contextlib.closing(_open_read_only(path, sqlite3.Connection)) as connection:
            (found,) = connection.execute("PRAGMA page_size").fetchone()
            return int(found)
    except sqlite3.Error:
        return 0


def _open_read_only(path: Path, factory: type[sqlite3.Connection]) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        factory=factory,
    )
    try:
        # Opening alone touches nothing: a file that is gone would show only at the first query.
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


class Readers:
    """The connections that were handed out and are still held by somebody."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._open: weakref.WeakSet[ReadOnlyConnection] = weakref.WeakSet()

    def connect(self, path: Path) -> sqlite3.Connection:
        """A read-only connection to the database at *path*. Raises ReplicaUnavailable."""
        try:
            connection = _open_read_only(path, ReadOnlyConnection)
        except sqlite3.Error as error:
            raise ReplicaUnavailable(self._app, f"its database cannot be read now: {error}") from error
        assert isinstance(connection, ReadOnlyConnection)
        self._open.add(connection)
        return connection

    def revoke(self, why: str) -> None:
        """Make every connection stale that was handed out until now."""
        connections: Iterable[ReadOnlyConnection] = list(self._open)
        for connection in connections:
            connection.revoked = why
        self._open.clear()

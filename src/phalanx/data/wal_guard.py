"""A connection of our own to the live database, so that nobody's last connection removes the WAL.

SQLite checkpoints and deletes the WAL when the last connection to a database closes, and restarts it once all
of it has been checkpointed and nobody reads. Either one would hide commits from Litestream while it is down.
So there is this connection while the node is active; and while Litestream is not ready it holds a read
transaction as well, behind which no checkpoint can go.

It is stdlib sqlite3, as user code in this process may have the same file open: POSIX locks belong to a
process, and whoever opens and closes the file by hand drops the locks of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from phalanx.errors import DatabaseError

log = logging.getLogger("phalanx.capture")

BUSY_SECONDS = 2.0
"""How long the guard waits for a lock; each of its transactions reads one page."""

T = TypeVar("T")


class WalGuard:
    """The connection to one live database, in a thread of its own."""

    def __init__(self, live: Path) -> None:
        self._live = live
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="phalanx-wal-guard")

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    @property
    def holds(self) -> bool:
        """Whether the WAL stays as it is: nothing of it is overwritten."""
        return self._connection is not None and self._connection.in_transaction

    async def open(self) -> None:
        """Connect to an existing file. Raises DatabaseError: it is no SQLite database, or cannot be read."""
        await self._call(self._open)

    def _open(self) -> None:
        if self._connection is not None:
            return
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(self._live))}?mode=rw",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=0,
            )
        except sqlite3.Error as error:
            raise DatabaseError(f"{self._live} cannot be opened: {error}", _remedy(self._live)) from None
        try:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        except sqlite3.Error as error:
            connection.close()
            raise _unreadable(self._live, error) from None
        self._connection = connection

    async def hold(self) -> None:
        """Keep the WAL as it is from now on: nothing of it may be overwritten. Raises DatabaseError.

        Nothing to be kept, where the database is not in WAL mode (yet): and a reader would keep Litestream
        from changing that.
        """
        await self._call(self._hold)

    def _hold(self) -> None:
        connection = self._connection
        if connection is None or connection.in_transaction:
            return
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
                connection.execute("BEGIN")
                connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            raise _unreadable(self._live, error) from None

    def hold_soon(self) -> None:
        """The same at once, without waiting for it: each moment counts. Errors come with the next hold()."""
        self._thread.submit(self._hold)

    async def release(self) -> None:
        """Let checkpoints pass again: Litestream looks after the WAL now. The connection stays."""
        await self._call(self._release)

    def _release(self) -> None:
        if self._connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            self._connection.rollback()
            # Also where the database came to WAL mode only now: one read, and this connection counts.
            self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()

    async def overwrite(self) -> None:
        """Commit something that changes nothing: it takes the place of frames that were never committed, and
        whose checksums then no longer follow. Raises DatabaseError, also while another one writes."""
        await self._call(self._overwrite)

    def _overwrite(self) -> None:
        connection = self._connection
        if connection is None:
            return
        holds = connection.in_transaction
        try:
            connection.rollback()
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute(f"PRAGMA user_version = {version}")  # writes its page in any case
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            raise _unreadable(self._live, error) from None
        finally:
            if holds:
                self._hold()

    async def page_size(self) -> int:
        """The database's, in bytes. Raises DatabaseError."""
        return await self._call(self._page_size)

    def _page_size(self) -> int:
        assert self._connection is not None
        try:
            return int(self._connection.execute("PRAGMA page_size").fetchone()[0])
        except sqlite3.Error as error:
            raise _unreadable(self._live, error) from None

    async def page_of(self, table: str) -> int:
        """The number of *table*'s first page, 0 if it cannot be told."""
        return await self._call(lambda: self._page_of(table))

    def _page_of(self, table: str) -> int:
        if self._connection is None:
            return 0
        try:
            row = self._connection.execute(
                "SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND name = ?", (table,)
            ).fetchone()
        except sqlite3.Error:
            return 0
        return int(row[0]) if row else 0

    async def save(self) -> None:
        """Put what is in the WAL that this connection knows into the file, as far as nobody is in the way."""
        await self._call(self._save)

    def _save(self) -> None:
        if self._connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            self._connection.rollback()
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def give(self) -> sqlite3.Connection | None:
        """The connection, which is the caller's from now on (usable in any thread). This guard is over."""
        connection, self._connection = self._connection, None
        self._thread.shutdown(wait=False)
        return connection

    async def close(self) -> None:
        """Close the connection; if it is the last one, SQLite empties and removes the WAL.

        Not so if another file is at the path by now: SQLite looks (pager.c, databaseIsUnmoved).
        """
        await self._call(self._close)
        self._thread.shutdown(wait=False)

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _unreadable(live: Path, error: sqlite3.Error) -> DatabaseError:
    text = str(error)
    if "not a database" in text:
        return DatabaseError(
            f"{live} is no SQLite database, or an encrypted one",
            "declare the path of a plain SQLite 3 database, or move this file away",
        )
    if "locked" in text:
        return DatabaseError(
            f"{live} is locked by another process for itself alone: {text}",
            "end it, or do without PRAGMA locking_mode = EXCLUSIVE",
        )
    return DatabaseError(f"{live} cannot be read: {text}", _remedy(live))


def _remedy(live: Path) -> str:
    if os.access(live, os.R_OK | os.W_OK) and os.access(live.parent, os.W_OK | os.X_OK):
        return "look at it with the sqlite3 program (PRAGMA integrity_check)"
    return "give the node's user the right to read and write the file and its folder"

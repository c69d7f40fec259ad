"""Whether the file at an app's path can be had as a database: looked at once, before a node starts.

Nothing is made, and nothing is changed. Descriptors of the file are opened and closed, which drops the locks
of SQLite in this process: only for a time when nothing here has the database open.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

from phalanx import system
from phalanx.data import file_locks

LOCK_SECONDS = 2.0
"""Who has the file locked for longer does not do it for one commit."""

_POLL_SECONDS = 0.05
_MODE_BYTES = slice(18, 20)
"""Where the header says how the file is written and read; 2 is a WAL (sqlite.org/fileformat2.html)."""
_SHARED_BYTE = 0x40000002
"""The first of those that readers lock for reading, and who has the file alone for writing (os_unix.c)."""
_FOR_OTHERS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
"""It has a journal to be rolled back, or a WAL to be recovered: whoever may write will do so."""


def problem(path: Path, folder: Path) -> tuple[str, str] | None:
    """What is wrong with the database *path*, and the remedy. *folder*: Phalanx's own beside it, or none yet.

    The file may be missing. Takes up to 2 s where it is locked. Raises OSError.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("rb") as file:
        head = file.read(100)
        in_wal_mode = head[_MODE_BYTES] == b"\2\2"
        if (holder := _holder(file.fileno(), in_wal_mode=in_wal_mode)) is not None:
            return holder, "let that program end its transaction (no locking_mode = EXCLUSIVE), or stop it"
    return _unsound(path, folder, in_wal_mode=in_wal_mode)


def _holder(descriptor: int, *, in_wal_mode: bool) -> str | None:
    """Who keeps others from using the file. In WAL mode all who have it open hold a lock for reading; else
    the switch to that mode needs the file for itself."""
    if not system.LINUX:
        return None
    kind = file_locks.SHARED if in_wal_mode else file_locks.EXCLUSIVE
    deadline = time.monotonic() + LOCK_SECONDS
    while holder := file_locks.lock_holder(descriptor, _SHARED_BYTE, kind):
        if time.monotonic() > deadline:
            return f"process {holder} has it locked, and does not let go within {LOCK_SECONDS:g} s"
        time.sleep(_POLL_SECONDS)
    return None


def _unsound(path: Path, folder: Path, *, in_wal_mode: bool) -> tuple[str, str] | None:
    """What SQLite says of it, if it cannot read it."""
    how = "mode=ro"
    if in_wal_mode:
        if not os.path.lexists(f"{path}-wal"):
            how += "&immutable=1"  # else SQLite makes one
        elif os.path.lexists(folder) or not os.path.lexists(f"{path}-shm"):
            # A live one of ours: its index is not to be made anew (data.settlement). Or there is none, and
            # one would be made.
            return None
    connection = None
    try:
        connection = sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, timeout=LOCK_SECONDS)
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            return f"{error}, by another program", "let that program end its transaction, or stop it"
        if code in _FOR_OTHERS:
            return None
        return (
            f"no sound SQLite database: {error}",
            "restore the file from a backup, or name one that is sound or does not exist yet",
        )
    finally:
        if connection is not None:
            connection.close()
    return None

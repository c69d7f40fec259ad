"""The check of a database that is in use sees what SQLite sees: the file together with its WAL."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.data.images import check


@pytest.fixture
def database(tmp_path: Path) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """A database of some pages with an index, and its only connection, which never checkpoints by itself."""
    path = tmp_path / "wiki.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("CREATE TABLE pages (id INTEGER PRIMARY KEY, title TEXT UNIQUE)")
        connection.executemany("INSERT INTO pages (title) VALUES (?)", [(f"{n:040}",) for n in range(2000)])
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield path, connection


def test_checkpoint_under_way(database: tuple[Path, sqlite3.Connection], tmp_path: Path) -> None:
    """In the middle of a checkpoint a file without its WAL is half old, half new."""
    path, connection = database
    connection.execute("UPDATE pages SET title = 'x' || title")
    between = tmp_path / "between.db"
    shutil.copy(f"{path}-wal", f"{between}-wal")
    old = path.read_bytes()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    new = path.read_bytes()
    between.write_bytes(new[: len(new) // 2 // 4096 * 4096] + old[len(new) // 2 // 4096 * 4096 :])
    assert check(between) != "ok"
    assert check(between, in_use=True) == "ok"


def test_damage_in_the_wal(database: tuple[Path, sqlite3.Connection]) -> None:
    """What was committed and not checkpointed is checked, too."""
    path, connection = database
    connection.execute("PRAGMA writable_schema=ON")
    connection.execute("UPDATE sqlite_schema SET rootpage = rootpage + 1 WHERE type = 'index'")
    assert check(path) == "ok"
    assert check(path, in_use=True) != "ok"

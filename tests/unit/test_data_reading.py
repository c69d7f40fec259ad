"""What is read of a live database for its status."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from phalanx.data.reading import page_size


@pytest.mark.parametrize("size", [512, 4096, 65536])
def test_page_size_of_a_database_in_use(tmp_path: Path, size: int) -> None:
    """The one that it has, while its program has it open, and in the middle of a transaction of it."""
    file = tmp_path / "wiki.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as program:
        program.execute(f"PRAGMA page_size = {size}")
        program.execute("PRAGMA journal_mode = WAL")
        program.execute("CREATE TABLE t(x)")
        assert page_size(file) == size
        program.execute("BEGIN IMMEDIATE")
        program.execute("INSERT INTO t VALUES (1)")
        assert page_size(file) == size


def test_page_size_where_there_is_no_database(tmp_path: Path) -> None:
    """No file, or another kind of file: 0, and nothing is made there."""
    assert page_size(tmp_path / "none.db") == 0
    other = tmp_path / "other.db"
    other.write_bytes(b"no database" * 1000)
    assert page_size(other) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.db"]

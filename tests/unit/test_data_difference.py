"""A database that was set aside against the present one: which rows are only in one of them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from phalanx.data.difference import difference
from phalanx.data.status import TableDifference
from phalanx.errors import DatabaseError


def make(path: Path, *statements: str) -> Path:
    """A database in WAL mode that these made."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


COMMON = ("CREATE TABLE page (id INTEGER PRIMARY KEY, title, body)", "INSERT INTO page VALUES (1, 'a', NULL)")


@pytest.fixture
def present(tmp_path: Path) -> Path:
    """The database that the platform went on with."""
    return make(tmp_path / "present.db", *COMMON, "INSERT INTO page VALUES (2, 'new', x'00ff')")


def test_rows_that_were_lost_and_rows_that_are_new(tmp_path: Path, present: Path) -> None:
    """Both sides are counted, and the first rows of each are shown, values as text."""
    diverged = make(
        tmp_path / "d.db", *COMMON, *(f"INSERT INTO page VALUES ({n}, 'lost', 'x')" for n in range(2, 12))
    )
    [table] = difference(diverged, present, rows=2)
    assert table == TableDifference(
        table="page",
        columns=("id", "title", "body"),
        only_diverged=10,
        only_present=1,
        diverged_rows=(("2", "lost", "x"), ("3", "lost", "x")),
        present_rows=(("2", "new", "x'00ff'"),),
    )


def test_equal_databases_differ_in_nothing(tmp_path: Path, present: Path) -> None:
    """Another order of rows and columns is no difference."""
    same = make(
        tmp_path / "d.db",
        "CREATE TABLE page (title, body, id INTEGER PRIMARY KEY)",
        "INSERT INTO page VALUES ('new', x'00ff', 2)",
        "INSERT INTO page VALUES ('a', NULL, 1)",
    )
    assert difference(same, present) == ()


def test_tables_of_one_side_and_other_columns(tmp_path: Path, present: Path) -> None:
    """A table that is in one only is shown with its rows; one with other columns says so."""
    diverged = make(
        tmp_path / "d.db",
        "CREATE TABLE page (id, name)",
        'CREATE TABLE "a ""b" (x)',
        'INSERT INTO "a ""b" VALUES (1.5)',
    )
    make(present, "CREATE TABLE extra (y)")
    odd, extra, page = difference(diverged, present)
    assert (odd.table, odd.only_diverged, odd.diverged_rows) == ('a "b', 1, (("1.5",),))
    assert (extra.table, extra.only_present, "present" in extra.problem) == ("extra", 0, True)
    assert (page.table, page.problem) == ("page", "other columns")


def test_virtual_tables_and_views_are_left_out(tmp_path: Path, present: Path) -> None:
    """What belongs to a full-text index is no data of its own."""
    more = (
        "CREATE VIRTUAL TABLE t USING fts5(x)",
        "INSERT INTO t VALUES ('lost')",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE _litestream_seq (id, seq)",
    )
    diverged = make(tmp_path / "d.db", *COMMON, "INSERT INTO page VALUES (2, 'new', x'00ff')", *more)
    assert difference(diverged, present) == ()


def test_databases_in_use_are_read_as_they_are(tmp_path: Path, present: Path) -> None:
    """Commits that are in the WAL only count; neither file changes."""
    diverged = make(tmp_path / "d.db", *COMMON, "INSERT INTO page VALUES (2, 'new', x'00ff')")
    with closing(sqlite3.connect(present)) as writer:
        writer.execute("INSERT INTO page VALUES (3, 'later', NULL)")
        writer.commit()
        before = diverged.read_bytes(), present.read_bytes()
        [table] = difference(diverged, present)
        assert (table.only_diverged, table.only_present) == (0, 1)
        assert (diverged.read_bytes(), present.read_bytes()) == before


def test_long_values_are_shortened(tmp_path: Path, present: Path) -> None:
    """A row stays a line."""
    diverged = make(
        tmp_path / "d.db", *COMMON, f"INSERT INTO page VALUES (9, '{'x' * 9999}', zeroblob(9999))"
    )
    [table] = difference(diverged, present)
    assert all(len(value or "") <= 100 for value in table.diverged_rows[0])


@pytest.mark.parametrize(("content", "word"), [(None, "does not exist"), (b"x" * 4096, "cannot be compared")])
def test_files_that_cannot_be_compared(
    tmp_path: Path, present: Path, content: bytes | None, word: str
) -> None:
    """One error with the file's name, and nothing is made."""
    file = tmp_path / "d.db"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DatabaseError, match=word):
        difference(file, present)
    assert file.exists() is (content is not None)


def test_comparison_that_takes_too_long_ends(tmp_path: Path, present: Path) -> None:
    """The deadline holds inside of SQLite too."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
    diverged = make(tmp_path / "d.db", *COMMON, f"INSERT INTO page {numbers} SELECT i, i, i FROM n")
    with pytest.raises(DatabaseError, match="longer than 0 s"):
        difference(diverged, present, timeout=0.0)

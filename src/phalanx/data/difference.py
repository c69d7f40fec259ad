"""In which rows a database that was set aside differs from the present one."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote

from phalanx import system
from phalanx.data.status import TableDifference
from phalanx.errors import DatabaseError

VALUE_CHARACTERS = 80
"""What is shown of a value."""

_STEPS = 10_000
"""Instructions of SQLite between looks at the clock."""


def difference(
    diverged: Path, present: Path, *, rows: int = 5, timeout: float = 60.0
) -> tuple[TableDifference, ...]:
    """The tables in which *diverged* and *present* differ, with up to *rows* rows of each side.

    Rows are compared as a whole and as a set; views, virtual tables and what belongs to those are left out,
    and so are the tables that Litestream keeps for itself.
    Reads both databases, in the calling thread. Raises DatabaseError when that fails or takes longer than
    *timeout* seconds.
    """
    for file in (diverged, present):
        if not file.is_file():
            raise DatabaseError(f"{file} does not exist")
    deadline = system.now() + timeout
    with contextlib.closing(sqlite3.connect(_uri(diverged), uri=True)) as connection:
        connection.set_progress_handler(lambda: int(system.now() > deadline), _STEPS)
        try:
            connection.execute("ATTACH ? AS present", (_uri(present),))
            connection.execute("BEGIN")  # both as they are now, until the end
            theirs, ours = _tables(connection, "main"), _tables(connection, "present")
            found = [_table(connection, name, theirs, ours, rows) for name in sorted({*theirs, *ours})]
        except sqlite3.Error as error:
            problem = str(error) if system.now() <= deadline else f"it takes longer than {timeout:g} s"
            raise DatabaseError(f"{diverged} cannot be compared: {problem}") from error
    return tuple(table for table in found if table is not None)


def _uri(file: Path) -> str:
    return f"file:{quote(str(file))}?mode=ro"


def _tables(connection: sqlite3.Connection, schema: str) -> dict[str, tuple[str, ...]]:
    """The columns of each ordinary table."""
    listed = connection.execute(f"PRAGMA {schema}.table_list").fetchall()
    names = [str(row[1]) for row in listed if row[0] == schema and row[2] == "table"]
    return {
        name: tuple(
            str(column[0])
            for column in connection.execute("SELECT name FROM pragma_table_info(?, ?)", (name, schema))
        )
        for name in names
        if not name.startswith(("sqlite_", "_litestream_"))
    }


def _table(
    connection: sqlite3.Connection,
    name: str,
    theirs: dict[str, tuple[str, ...]],
    ours: dict[str, tuple[str, ...]],
    rows: int,
) -> TableDifference | None:
    if name not in theirs or name not in ours:
        schema, columns = ("main", theirs[name]) if name in theirs else ("present", ours[name])
        all_rows = f"SELECT * FROM {schema}.{_quoted(name)}"
        count, shown = _count(connection, all_rows), _rows(connection, all_rows, rows)
        if schema == "main":
            return TableDifference(
                table=name,
                columns=columns,
                only_diverged=count,
                diverged_rows=shown,
                problem="only in the diverged",
            )
        return TableDifference(
            table=name, columns=columns, only_present=count, present_rows=shown, problem="only in the present"
        )
    if set(theirs[name]) != set(ours[name]):
        return TableDifference(table=name, columns=theirs[name], problem="other columns")
    columns = theirs[name]
    listed = ", ".join(_quoted(column) for column in columns)
    diverged, present = (f"SELECT {listed} FROM {schema}.{_quoted(name)}" for schema in ("main", "present"))
    lost, new = f"{diverged} EXCEPT {present}", f"{present} EXCEPT {diverged}"
    only_diverged, only_present = _count(connection, lost), _count(connection, new)
    if not only_diverged and not only_present:
        return None
    return TableDifference(
        table=name,
        columns=columns,
        only_diverged=only_diverged,
        only_present=only_present,
        diverged_rows=_rows(connection, lost, rows),
        present_rows=_rows(connection, new, rows),
    )


def _count(connection: sqlite3.Connection, query: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM ({query})").fetchone()[0])


def _rows(connection: sqlite3.Connection, query: str, most: int) -> tuple[tuple[str | None, ...], ...]:
    found = connection.execute(f"{query} LIMIT ?", (most,)).fetchall()
    return tuple(tuple(_shown(value) for value in row) for row in found)


def _shown(value: object) -> str | None:
    if value is None:
        return None
    text = f"x'{value[: VALUE_CHARACTERS // 2].hex()}'" if isinstance(value, bytes) else str(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[: VALUE_CHARACTERS - 1]}…"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

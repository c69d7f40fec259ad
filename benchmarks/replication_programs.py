"""What writes and reads databases while they are replicated: programs of their own that know no Phalanx.

::

    python replication_programs.py write DATABASE NOTES [--rate N] [--count N] [--pause FILE] [--cells]
    python replication_programs.py read DATABASE NOTES [--anew]
    python replication_programs.py check DATABASE NOTES
    python replication_programs.py serve FOLDER HISTORY

Notes are lines of a number and a moment (CLOCK_BOOTTIME, as ``system.now``): of a commit, or of the first
look that showed it. Nothing but the standard library: a program must be there at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 0.0003
"""Between looks at a database; half of it is in every lag that is measured."""

ANEW_SECONDS = 0.002
"""The same where each look opens the database anew."""

RESOLVE_SECONDS = 0.02
"""Between looks at which file the replica is."""

CELLS = 8
"""Rows that each transaction changes, and that must all say the same; each fills pages of its own."""

CELL_BYTES = 3000
CHECK_EVERY = 20
"""So many looks at the cells, and the whole database is checked."""

TEXT = "x" * 100
SELECT_CELLS = "SELECT place, number, content FROM bench_cells"


def now() -> float:
    """The clock that all processes of a machine share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def replica_of(live: Path) -> Path:
    """The file that a reader on the node whose database is *live* reads at present."""
    folder = live.parent / f".{live.name}-phalanx"
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except FileNotFoundError:
        return live
    if state["role"] != "replica":
        return live
    return folder / f"gen-{state['generation']}" / "replica.db"


def open_writer(database: str) -> sqlite3.Connection:
    """A connection as programs have it that want speed: WAL, synchronous NORMAL."""
    connection = sqlite3.connect(database, isolation_level=None, timeout=10)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS bench (number INTEGER PRIMARY KEY, text TEXT)")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS bench_cells (place INTEGER PRIMARY KEY, number, content BLOB)"
    )
    return connection


def open_reader(database: Path) -> sqlite3.Connection:
    """As ``app.db.connect()`` opens it, in any process."""
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True, isolation_level=None, timeout=1.0)


def cell(number: int, place: int) -> bytes:
    """What row *place* holds after transaction *number*."""
    return hashlib.shake_128(b"%d:%d" % (number, place)).digest(CELL_BYTES)


class Notes:
    """A file of numbers and moments; each is there at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, number: int, at: float, text: str = "") -> None:
        """One line."""
        os.write(self._file, f"{number} {at:.6f} {text}\n".encode())


# --- writing


def write(database: str, notes: Notes, *, rate: float, count: int, pause: str, cells: bool) -> None:
    """Commit small transactions, *rate* a second, and note each; *count* of them, 0: until it is killed.

    Without a rate as many as there can be; then only how many there were at begin and end is noted.
    """
    connection = open_writer(database)
    commit = _commit_cells if cells else _commit_row
    table = "bench_cells" if cells else "bench"
    number: int = connection.execute(f"SELECT coalesce(max(number), 0) FROM {table}").fetchone()[0]
    last, begin, done = number + count, now(), 0
    notes.add(number, begin, "begin")
    while number < last or not count:
        if rate:
            while pause and os.path.exists(pause):
                time.sleep(0.001)
                begin, done = now(), 0
            left = begin + done / rate - now()
            if left > 0:
                time.sleep(left)
        number, done = number + 1, done + 1
        commit(connection, number)
        if rate:
            notes.add(number, now())
    notes.add(number, now(), "end")


def _commit_row(connection: sqlite3.Connection, number: int) -> None:
    connection.execute("INSERT INTO bench VALUES (?, ?)", (number, TEXT))


def _commit_cells(connection: sqlite3.Connection, number: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    rows = [(place, number, cell(number, place)) for place in range(CELLS)]
    connection.executemany("INSERT OR REPLACE INTO bench_cells VALUES (?, ?, ?)", rows)
    connection.execute("COMMIT")


# --- reading


class Watched:
    """The database that is to be read at present: another file once the node has another one."""

    def __init__(self, live: Path) -> None:
        self._live = live
        self._path = Path()
        self._looked = 0.0
        self._connection: sqlite3.Connection | None = None

    def connection(self) -> sqlite3.Connection:
        """The same one as long as the file is the same. Raises sqlite3.Error, OSError, ValueError."""
        if self._connection is None or now() - self._looked > RESOLVE_SECONDS:
            self._looked = now()
            path = replica_of(self._live)
            if self._connection is None or path != self._path:
                self.drop()
                self._path, self._connection = path, open_reader(path)
        return self._connection

    def drop(self) -> None:
        """Open it anew at the next look."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def read(database: Path, notes: Notes, *, anew: bool) -> None:
    """Note each number of a row when it is first seen. *anew*: open the database for each look."""
    watched = Watched(database)
    seen = -1
    while True:
        try:
            number = watched.connection().execute("SELECT max(number) FROM bench").fetchone()[0] or 0
        except (sqlite3.Error, OSError, ValueError):
            number = seen  # not there yet, or under way to another place
            watched.drop()
        if number > seen:
            notes.add(number, now())
            seen = number
        if anew:
            watched.drop()
        time.sleep(ANEW_SECONDS if anew else LOOK_SECONDS)


def check(database: Path, notes: Notes) -> None:
    """Look at the cells all the time: note what is torn (number -1), and every thousandth look."""
    watched = Watched(database)
    looks = 0
    while True:
        try:
            connection = watched.connection()
            rows = connection.execute(SELECT_CELLS).fetchall()
            problem = torn(rows)
            if looks % CHECK_EVERY == 0 and not problem:
                found = connection.execute("PRAGMA integrity_check").fetchall()
                problem = "" if found == [("ok",)] else f"integrity check: {found[:3]}"
        except sqlite3.OperationalError:  # no such table yet, locked, or another file now
            watched.drop()
            time.sleep(LOOK_SECONDS)
            continue
        except sqlite3.DatabaseError as error:
            problem = f"{type(error).__name__}: {error}"
            watched.drop()
        except (OSError, ValueError):
            watched.drop()
            continue
        looks += 1
        if problem:
            notes.add(-1, now(), problem.replace("\n", " "))
        elif looks % 1000 == 0:
            notes.add(looks, now())


def torn(rows: list[tuple[int, int, bytes]]) -> str:
    """What is wrong with the rows of one look at the cells; empty if all are of one transaction."""
    numbers = {number for _, number, _ in rows}
    if not rows:
        return ""
    if len(numbers) > 1 or len(rows) != CELLS:
        return f"{len(rows)} cells of transactions {sorted(numbers)}"
    wrong = [place for place, number, content in rows if content != cell(number, place)]
    return f"cells {wrong} are not those of transaction {numbers.pop()}" if wrong else ""


# --- a backend


def serve(folder: Path, history: str) -> None:
    """Open the database that is this node's, read it, commit, say so; then wait to be ended."""
    node, epoch = os.environ["PHALANX_NODE"], int(os.environ["PHALANX_EPOCH"])
    connection = open_writer(str(folder / node / "wiki.db"))
    number: int = connection.execute("SELECT coalesce(max(number), 0) FROM bench").fetchone()[0]
    _commit_row(connection, number + 1)
    event = {"at": now(), "kind": "serves", "node": node, "epoch": epoch, "data": {"number": number}}
    line = json.dumps(event | {"app": os.environ["PHALANX_APP"]}) + "\n"
    descriptor = os.open(history, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, line.encode())
    while True:
        time.sleep(3600)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "read", "check", "serve"))
    parser.add_argument("database")
    parser.add_argument("notes")
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--pause", default="")
    parser.add_argument("--cells", action="store_true")
    parser.add_argument("--anew", action="store_true")
    given = parser.parse_args()
    path = Path(given.database)
    actions: dict[str, Callable[[], None]] = {
        "write": lambda: write(
            given.database,
            Notes(given.notes),
            rate=given.rate,
            count=given.count,
            pause=given.pause,
            cells=given.cells,
        ),
        "read": lambda: read(path, Notes(given.notes), anew=given.anew),
        "check": lambda: check(path, Notes(given.notes)),
        "serve": lambda: serve(path, given.notes),
    }
    actions[given.what]()


if __name__ == "__main__":
    main()

"""A view of a database at one moment, while SQLite itself goes on writing it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

WRITER = """
import random, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
database.execute("PRAGMA synchronous = OFF")
database.execute(f"PRAGMA wal_autocheckpoint = {sys.argv[2]}")
number = 0
while True:
    number += 1
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE t SET x = ?", (number,))
    if number % 50 == 0:
        database.execute("DELETE FROM filler")
    elif number % 5 == 0:
        database.execute("INSERT INTO filler VALUES (randomblob(?))", (random.randrange(30000),))
    database.execute("ROLLBACK" if number % 7 == 0 else "COMMIT")
    if number % 40 == 0:
        database.execute("PRAGMA wal_checkpoint(%s)" % random.choice(["PASSIVE", "RESTART", "TRUNCATE"]))
"""

VIEWS = """
import random, sqlite3, sys, time
from pathlib import Path
from phalanx.data import pinning
look = pinning._read_index
def slow_look(shm):
    found = look(shm)
    if random.random() < 0.3:  # a commit, or a checkpoint, is much more likely to fall between two looks
        time.sleep(random.random() * 0.005)
    return found
pinning._read_index = slow_look
for number in range(int(sys.argv[3])):
    database = sqlite3.connect(sys.argv[1], timeout=30)
    (newest,) = database.execute("SELECT max(x) FROM t").fetchone()
    database.close()
    with pinning.PinnedDatabase(Path(sys.argv[1])) as view, open(f"{sys.argv[2]}/{number}.db", "wb") as out:
        for first in range(1, view.state.commit + 1, 3):
            out.write(view.read(first, min(3, view.state.commit + 1 - first)))
            time.sleep(random.random() * 0.0004)
    print(newest, flush=True)
"""


@contextmanager
def program(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("checkpoint_pages", [0, 3, 200])
def test_every_view_is_one_transaction_whatever_the_writer_does(
    tmp_path: Path, checkpoint_pages: int
) -> None:
    """Commits, rollbacks, checkpoints, WALs that begin anew and are cut off: in each of 40 views all rows are
    of one transaction, none older than what was there when it began, and SQLite finds nothing wrong."""
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA page_size = 1024")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t(x, y)")
        database.execute("CREATE TABLE filler(y)")
        for _ in range(60):
            database.execute("INSERT INTO t VALUES (0, randomblob(700))")
    with program(WRITER, str(path), str(checkpoint_pages)):
        deadline = time.monotonic() + 30
        while newest(path) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done = subprocess.run(
            [sys.executable, "-c", VIEWS, str(path), str(tmp_path), "40"],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    for number, known in enumerate(map(int, done.stdout.split())):
        uri = f"{(tmp_path / f'{number}.db').as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as image:
            assert image.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            values = [value for (value,) in image.execute("SELECT DISTINCT x FROM t")]
            assert len(values) == 1, (number, values)
            assert values[0] >= known, number
    assert len(done.stdout.split()) == 40


def newest(path: Path) -> int:
    """The last transaction."""
    with closing(sqlite3.connect(path, timeout=30)) as database:
        return database.execute("SELECT max(x) FROM t").fetchone()[0]

"""A database that changes, the records of its changes, and what it was at each position."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from phalanx.data import disk, ltx
from phalanx.data.replica import Replica


class Entry(NamedTuple):
    """One record: its sequence in the log is its transaction's number."""

    txid: int
    data: bytes


def apply(replica: Replica, entry: Entry) -> None:
    """At the next sequence."""
    replica.apply(replica.position.sequence + 1, entry.txid, entry.data)


def reopened(replica: Replica) -> Replica:
    """The same folder, opened anew."""
    folder = replica._folder.path
    replica.close()
    return Replica.open(folder, 100)


class Origin:
    """A real SQLite database, and a record for every call of :meth:`record`.

    Each transaction keeps an invariant, which who sees half of one would see broken: all rows of ``pair``
    have the same ``round``, and ``total`` is the sum of all lengths in ``t``.
    """

    def __init__(self, folder: Path, page_size: int = 4096) -> None:
        self.path = folder / "origin.db"
        self.page_size = page_size
        self.txid = 0
        self.images: dict[int, bytes] = {}
        self._pages: list[bytes] = []
        self.connection = connection = sqlite3.connect(self.path, isolation_level=None)
        connection.execute(f"PRAGMA page_size = {page_size}")
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA synchronous = off")
        connection.executescript(
            """BEGIN;
            CREATE TABLE t (id INTEGER PRIMARY KEY, x BLOB);
            CREATE TABLE pair (id INTEGER PRIMARY KEY, round INTEGER, filler BLOB);
            CREATE TABLE total (bytes INTEGER);
            INSERT INTO total VALUES (0);
            COMMIT;"""
        )
        for _ in range(8):
            connection.execute("INSERT INTO pair (round, filler) VALUES (0, zeroblob(?))", (page_size // 2,))

    def write(self, size: int = 1000, rows: int = 1) -> None:
        """One transaction."""
        self.connection.execute("BEGIN")
        for _ in range(rows):
            self.connection.execute("INSERT INTO t (x) VALUES (randomblob(?))", (size,))
        self.connection.execute("UPDATE pair SET round = round + 1")
        self.connection.execute("UPDATE total SET bytes = bytes + ?", (size * rows,))
        self.connection.execute("COMMIT")

    def vacuum(self) -> None:
        """Nearly all rows go, and the file becomes small."""
        self.connection.execute("BEGIN")
        self.connection.execute("DELETE FROM t WHERE id % 5 > 0")
        self.connection.execute("UPDATE total SET bytes = (SELECT coalesce(sum(length(x)), 0) FROM t)")
        self.connection.execute("COMMIT")
        self.connection.execute("VACUUM")

    def record(self, *, full: bool = False) -> Entry:
        """What has changed since the last one (*full*: all pages)."""
        self.connection.execute("PRAGMA wal_checkpoint(truncate)")
        image = self.path.read_bytes()
        size = self.page_size
        pages = [image[at : at + size] for at in range(0, len(image), size)]
        before, self._pages = self._pages, pages
        self.txid += 1
        self.images[self.txid] = image
        changed = [
            ltx.Page(number, page)
            for number, page in enumerate(pages, 1)
            if full or number > len(before) or before[number - 1] != page
        ]
        header = ltx.Header(page_size=size, commit=len(pages), min_txid=self.txid, max_txid=self.txid)
        return Entry(self.txid, ltx.encode(header, changed))

    def round(self, size: int = 1000, rows: int = 1) -> Entry:
        """A transaction and its record."""
        self.write(size, rows)
        return self.record()

    def fingerprint(self, txid: int) -> str:
        """What a replica has to say at that transaction."""
        return hashlib.sha256(self.images[txid]).hexdigest()

    def close(self) -> None:
        """End its connection."""
        self.connection.close()


_READER = """
import json, sqlite3, sys
from urllib.parse import quote
def connect(path, mode):
    return sqlite3.connect(f"file:{quote(path)}?mode={mode}", uri=True, isolation_level=None, timeout=0)
connection = connect(*sys.argv[1:])
for line in sys.stdin:
    sql, answer = json.loads(line), []
    try:
        if isinstance(sql, str):
            answer = connection.execute(sql).fetchall()
        else:
            connection.close()
            connection = connect(*sql)
    except sqlite3.Error as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Reader:
    """An ordinary connection, read-only as a rule, in a process of its own.

    Not in this one: a replica that is closed here takes the POSIX locks of a connection with it.
    """

    def __init__(self, path: Path, mode: str = "ro") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _READER, str(path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def connect(self, path: Path, mode: str = "ro") -> None:
        """Close the connection, and open another database."""
        self.execute([str(path), mode])

    def execute(self, sql: str | list[str]) -> Any:
        """All rows. Raises sqlite3.OperationalError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(sql) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if isinstance(answer, str):
            raise sqlite3.OperationalError(answer)
        return answer

    def check(self) -> int:
        """The round that it sees. AssertionError if it sees a part of a transaction."""
        begun = self._begin()
        rounds = self.execute("SELECT DISTINCT round FROM pair")
        ((found, total),) = self.execute(
            "SELECT (SELECT coalesce(sum(length(x)), 0) FROM t), (SELECT bytes FROM total)"
        )
        again = self.execute("SELECT DISTINCT round FROM pair")
        if begun:
            self.execute("COMMIT")
        assert len(rounds) == 1
        assert rounds == again
        assert found == total
        return int(rounds[0][0])

    def _begin(self) -> bool:
        try:
            self.execute("BEGIN")
        except sqlite3.OperationalError:  # in a transaction already
            return False
        return True

    def close(self) -> None:
        """Close the connection, as its process ends."""
        self._process.communicate(timeout=10)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.communicate(timeout=10)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_LOOP = """
import select, sqlite3, sys
from urllib.parse import quote
connection = sqlite3.connect(f"file:{quote(sys.argv[1])}?mode=ro", uri=True, isolation_level=None, timeout=10)
count, last = 0, -1
while not select.select([sys.stdin], [], [], 0)[0]:
    connection.execute("BEGIN")
    rounds = connection.execute("SELECT DISTINCT round FROM pair").fetchall()
    found, total = connection.execute(
        "SELECT (SELECT coalesce(sum(length(x)), 0) FROM t), (SELECT bytes FROM total)").fetchone()
    again = connection.execute("SELECT DISTINCT round FROM pair").fetchall()
    connection.execute("COMMIT")
    assert len(rounds) == 1 and rounds == again and found == total, (rounds, again, found, total)
    assert rounds[0][0] >= last, (rounds, last)
    if not count:
        print("reading", flush=True)
    count, last = count + 1, rounds[0][0]
print(count, last)
"""


class LoopingReader:
    """A process that reads the whole database again and again, and ends badly if it ever sees half of a
    transaction, or an older one than before."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LOOP, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "reading\n"

    def end(self) -> tuple[int, int]:
        """How often it has read, and the last round that it saw."""
        output, _ = self._process.communicate("end\n", timeout=30)
        assert self._process.returncode == 0, "the reader has seen what must not be seen"
        count, last = map(int, output.split())
        return count, last


def check_equal(replica: Replica, origin: Origin) -> None:
    """The replica is, byte by byte, what the origin was at its position."""
    txid = replica.position.txid
    assert replica.state == "ready", replica.reason
    assert replica.fingerprint() == origin.fingerprint(txid), f"differs at {replica.position}"
    assert replica.path is not None
    # In this process for once: it is closed before the replica can be.
    with closing(sqlite3.connect(f"file:{replica.path}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


class Killed(BaseException):
    """The process ends here."""


class Steps:
    """Counts the steps on the disk, and ends everything at one of them: nothing is done after it."""

    def __init__(self, die_at: int = 0, die_on: str = "") -> None:
        self.die_at, self.die_on, self.labels = die_at, die_on, list[str]()

    def __call__(self, label: str) -> None:
        self.labels.append(label)
        if self.die_on in self.labels or (self.die_at and len(self.labels) >= self.die_at):
            raise Killed(label)

    def __enter__(self) -> Steps:
        self._before, disk.on_step = disk.on_step, self
        return self

    def __exit__(self, *_: object) -> None:
        disk.on_step = self._before

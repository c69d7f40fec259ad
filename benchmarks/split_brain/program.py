"""The program that is made highly available: HTTP and a SQLite database. It knows nothing of Phalanx.

::

    python program.py DATABASE PORT BARRIER

``GET /`` says who answers (``PHALANX_NODE``, ``PHALANX_EPOCH``), when the answer was begun and done (on the
clock that all processes of the machine share) and the last row; ``POST /rows`` stores the id that is its body
as the next row, and answers once the barrier has confirmed it. The barrier is a socket that the node offers
(:mod:`benchmarks.split_brain.node`). Nothing but the standard library: it must be there at once.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BARRIER_SECONDS = 5.0


def now() -> float:
    """The clock that all processes of a machine share, as ``phalanx.system.now``."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Rows:
    """The numbered rows, in the database that is this node's."""

    def __init__(self, database: str) -> None:
        self._connection = sqlite3.connect(database, isolation_level=None, timeout=5, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, id TEXT UNIQUE, epoch INTEGER)"
        )
        self._lock = threading.Lock()

    def last(self) -> int:
        """The number of the last row, 0 if there is none."""
        with self._lock:
            return int(self._connection.execute("SELECT coalesce(max(number), 0) FROM entries").fetchone()[0])

    def add(self, name: str, epoch: int) -> int:
        """Commit a row; its number. Raises sqlite3.Error, also where the id was stored before."""
        with self._lock:
            cursor = self._connection.execute("INSERT INTO entries (id, epoch) VALUES (?, ?)", (name, epoch))
            return int(cursor.lastrowid or 0)


def confirm(path: str) -> str:
    """Ask for a barrier; empty if it was confirmed, else why not."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(BARRIER_SECONDS + 1)
            asking.connect(path)
            answer = asking.makefile().readline().strip()
    except OSError as error:
        return f"no barrier: {error}"
    return "" if answer == "ok" else answer or "the barrier was withdrawn"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    rows: Rows
    barrier: str
    node, epoch = os.environ.get("PHALANX_NODE", ""), int(os.environ.get("PHALANX_EPOCH", "0"))

    def do_GET(self) -> None:
        """Who answers."""
        began = now()
        self._answer(200, began, last=self.rows.last())

    def do_POST(self) -> None:
        """Store a row."""
        began = now()
        name = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            number = self.rows.add(name, self.epoch)
        except sqlite3.Error as error:
            self._answer(503, began, error=f"{type(error).__name__}: {error}")
            return
        problem = confirm(self.barrier)
        self._answer(503 if problem else 200, began, number=number, error=problem)

    def _answer(self, status: int, began: float, **fields: object) -> None:
        text = {"node": self.node, "epoch": self.epoch, "began": began, "at": now(), **fields}
        body = json.dumps(text).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the history has it."""


class Server(ThreadingHTTPServer):
    """Its threads end with the process."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is none of ours."""


def main() -> None:
    """Serve until killed."""
    database, port, Handler.barrier = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    Handler.rows = Rows(database)
    Server(("0.0.0.0", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

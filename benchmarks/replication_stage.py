"""A stage whose app has a database: where its files are, who writes and reads them, what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from benchmarks import replication_programs as programs
from benchmarks.stage import APP, Stage
from phalanx import system
from phalanx.data.status import DbStatus
from phalanx.errors import BusError
from phalanx.testing.history import History

HOUR = 3600.0
PROGRAMS = Path(programs.__file__)
LOOK_SECONDS = 0.02

ROLES = {
    "phalanx.keeper": "keeper",
    "phalanx.data.replica_process": "replica process",
    "litestream": "Litestream",
    "phalanx.data.images": "image process",
}
"""What a child of a node is, by a part of its command line."""


class DataStage(Stage):
    """Nodes whose app has a database that only the benchmark's own programs write, of which one is active.

    *backend*: run one that says in ``served`` when it has committed.
    """

    def __init__(
        self, *, ttl: float = 5.0, count: int = 2, servers: int = 3, backend: bool = False, **settings: Any
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="phalanx-bench-db-"))
        self.served = History(self.folder / "served")
        serve = (sys.executable, "-I", str(PROGRAMS), "serve", str(self.folder), str(self.served.path))
        settings = {
            "backend": shlex.join(serve) if backend else "",
            "database": str(self.folder / "{node}" / "wiki.db"),
            "commit_seconds": HOUR,
            "sync_every": 0,
            "tick_seconds": HOUR,
            **settings,
        }
        super().__init__(ttl=ttl, count=count, servers=servers, **settings)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything and delete the files."""
        await super().close()
        self.served.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- files

    def live(self, node: str) -> Path:
        """Where the database of *node* lies while it is active."""
        return self.folder / node / "wiki.db"

    def readable(self, node: str) -> Path:
        """Where a reader on *node* finds it now."""
        return programs.replica_of(self.live(node))

    # --- what is so

    async def pair(self) -> tuple[str, str]:
        """Wait until nothing is missing; the active node, and a standby that follows."""
        active = await self.wait_steady()
        standby = next(node.node for node in self.nodes if node.node != active)
        await self.wait_following(standby)
        return active, standby

    async def status(self, node: str) -> DbStatus | None:
        """What *node* says of its database; None while it does not answer."""
        with contextlib.suppress(BusError):
            subject = self.names.database_subject(APP, "status", node)
            return msgspec.json.decode((await self.bus.request(subject, b"", timeout=2)).data, type=DbStatus)
        return None

    async def log_end(self) -> int:
        """The last sequence of the log."""
        info = await self.bus.api(f"STREAM.INFO.{self.names.wal_stream(APP)}", {}, timeout=2)
        return int(info["state"]["last_seq"])

    async def wait_following(self, node: str, timeout: float = 60.0) -> DbStatus:
        """Wait until *node* has applied the log up to its end of now. Raises TimeoutError."""
        end, deadline = await self.log_end(), system.now() + timeout
        while True:
            status = await self.status(node)
            if status is not None and status.role == "following" and status.position.sequence >= end:
                return status
            if system.now() > deadline:
                raise TimeoutError(f"{node} has not followed to {end}: {status}\n{self.last_words()}")
            await asyncio.sleep(LOOK_SECONDS)

    # --- processes

    def processes(self, node: str) -> dict[str, int]:
        """The processes of *node*, by what they are."""
        pid = self.nodes[node].pid
        found = {"node": pid}
        for child in _children(pid):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
                found |= {role: child for part, role in ROLES.items() if part in command}
        return found


def _children(pid: int) -> list[int]:
    """Those of all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def processor_seconds(pid: int) -> float:
    """Time on a processor so far, of all threads, to the microsecond. 0 once it is gone."""
    total = 0
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def resident_bytes(pid: int) -> int:
    """Resident memory; 0 once it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


# --- programs


class Program:
    """A running program of ``replication_programs`` and its notes."""

    def __init__(self, notes: Path, *arguments: str) -> None:
        self._notes = notes
        what, database, *rest = arguments
        command = [sys.executable, "-I", str(PROGRAMS), what, database, str(notes), *rest]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def notes(self) -> list[tuple[int, float, str]]:
        """Its notes so far: number, moment, and a word."""
        if not self._notes.exists():
            return []
        *lines, _ = self._notes.read_text().split("\n")
        return [(int(each[0]), float(each[1]), each[2]) for each in (line.split(" ", 2) for line in lines)]

    async def begun(self, timeout: float = 10.0) -> None:
        """Wait for its first note. Raises TimeoutError, RuntimeError if it has ended without one."""
        deadline = system.now() + timeout
        while not self._notes.exists() or not self._notes.stat().st_size:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}")
            if system.now() > deadline:
                raise TimeoutError(f"{self.process.args} has noted nothing within {timeout:g} s")
            await asyncio.sleep(LOOK_SECONDS)

    async def ended(self, timeout: float) -> None:
        """Wait for its end. Raises RuntimeError if that was not a good one, subprocess.TimeoutExpired."""
        if await asyncio.to_thread(self.process.wait, timeout):
            raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}")

    def stop(self) -> None:
        """SIGKILL it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@contextlib.contextmanager
def program(notes: Path, *arguments: str) -> Generator[Program]:
    """Run a program of ``replication_programs``: what, database, options."""
    running = Program(notes, *arguments)
    try:
        yield running
    finally:
        running.stop()


def lags(written: Program, read: Program) -> list[tuple[int, float]]:
    """Number and lag in ms of every commit that was seen, from its end to the first look that showed it."""
    seen = [(number, at) for number, at, _ in read.notes()]
    found: list[tuple[int, float]] = []
    place = 0
    for number, at, word in written.notes():
        if word:
            continue
        while place < len(seen) and seen[place][0] < number:
            place += 1
        if place == len(seen):
            break
        found.append((number, 1000 * (seen[place][1] - at)))
    return found

"""What a failover takes and loses where the app has a database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path

from benchmarks import replication_programs as programs
from benchmarks.figures import Run
from benchmarks.replication_stage import DataStage, program
from benchmarks.stage import APP
from phalanx import system
from phalanx.observe.audit import AuditEntry, read_audit
from phalanx.testing.history import Event

MEGABYTES = 100
ROWS_PER_MEGABYTE = 500
FILL_SECONDS = 120.0
LOST_TTL = 2.0
RATE = 500.0
LOAD_SECONDS = (1.0, 2.0)
"""Of load before a kill: it falls on any moment."""

SERVE_SECONDS = 30.0
REPORT_SECONDS = 60.0
LOOK_SECONDS = 0.05


# --- how long it takes


async def data(run: Run) -> None:
    """SIGKILL of the active node's process → the backend of the next one has committed, in ms."""
    async with DataStage(backend=True) as stage:
        await _fill(stage, MEGABYTES)
        for _ in range(run.runs):
            active, standby = await stage.pair()
            await asyncio.sleep(0.5)
            size = stage.readable(standby).stat().st_size
            stage.forget()
            began = system.now()
            stage.nodes[active].kill()
            event = await _serves(stage, began)
            took, promoted = 1000 * (event.at - began), stage.since(began, "active")
            hook = f"on_active after {1000 * (promoted[0].at - began):.0f} ms, " if promoted else ""
            run.add(took, f"{took:.0f} ms, {hook}{active} to {event.node}, {size / 1e6:.0f} MB")
            if size < 0.9e6 * MEGABYTES:
                run.problems.append(f"the database had only {size} bytes")
            stage.nodes[active].start()


async def _serves(stage: DataStage, since: float) -> Event:
    deadline = system.now() + SERVE_SECONDS
    while not (found := stage.served.events("serves", since=since)):
        if system.now() > deadline:
            raise TimeoutError(f"no backend serves after {SERVE_SECONDS:g} s\n{stage.last_words()}")
        await asyncio.sleep(0.01)
    return found[0]


async def _fill(stage: DataStage, megabytes: int) -> None:
    active, standby = await stage.pair()
    await asyncio.to_thread(fill, stage.live(active), megabytes)
    deadline = system.now() + FILL_SECONDS
    while await asyncio.to_thread(_rows, stage.readable(standby)) < megabytes * ROWS_PER_MEGABYTE:
        if system.now() > deadline:
            raise TimeoutError(f"{standby} has not got all of it\n{stage.last_words()}")
        await asyncio.sleep(LOOK_SECONDS)
    await stage.wait_following(standby, 120)


def _rows(database: Path) -> int:
    """How much of :func:`fill` is there; 0 while it can't be read."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(programs.open_reader(database)) as connection:
        return connection.execute("SELECT coalesce(max(number), 0) FROM filling").fetchone()[0]
    return 0


def fill(database: Path, megabytes: int) -> None:
    """Write so much (10**6 bytes), half of which compresses, in transactions of 1 MB."""
    row = 1_000_000 // ROWS_PER_MEGABYTE
    with contextlib.closing(programs.open_writer(str(database))) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS filling (number INTEGER PRIMARY KEY, content BLOB)")
        for _ in range(megabytes):
            connection.execute("BEGIN")
            rows = [(random.randbytes(row // 2) + b"a" * (row // 2),) for _ in range(ROWS_PER_MEGABYTE)]
            connection.executemany("INSERT INTO filling (content) VALUES (?)", rows)
            connection.execute("COMMIT")


# --- what is lost


async def lost(run: Run) -> None:
    """SIGKILL of a whole host under load (but not its nats-server) → committed transactions that are lost.

    Each time the old node, when it is back, has to report just that number.
    """
    async with DataStage(ttl=LOST_TTL) as stage:
        reports = 0
        for _ in range(run.runs):
            active, standby = await stage.pair()
            began = system.wall()
            committed = await _kill_under_load(stage, active)
            await stage.nodes.wait_for_active(APP, other_than=active, timeout=SERVE_SECONDS)
            kept = await asyncio.to_thread(_last_row, stage.live(standby))
            missing = committed - kept
            stage.nodes[active].start()
            entry = await _report(stage, active, began)
            told, exact = entry.details.get("transactions", "?"), entry.details.get("exact", "true")
            reports += (told, exact) == (str(missing), "true")
            run.add(missing, f"{missing} of {committed} lost; {active} reports {told}, exact: {exact}")
            if (told, exact) != (str(missing), "true"):
                run.problems.append(f"{missing} were lost, reported were {told} (exact: {exact})")
        run.say(f"{reports} of {run.runs} reports were exact")


async def _kill_under_load(stage: DataStage, active: str) -> int:
    """Let a program write and kill it with its host; the last row that was committed there."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-notes-") as name:
        notes = Path(name) / "committed"
        with program(notes, "write", str(stage.live(active)), "--rate", str(RATE)) as writer:
            await writer.begun()
            await asyncio.sleep(random.uniform(*LOAD_SECONDS))
            processes = stage.processes(active)
            # All stopped first, so that none can act on the end of another; the program goes on longest.
            victims = [processes.pop("Litestream"), processes.pop("node"), *processes.values()]
            victims.append(writer.process.pid)
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            await asyncio.to_thread(stage.nodes[active].wait, 10)
            await asyncio.to_thread(writer.process.wait, 10)
            # A copy is looked at: what opens the database itself may change its WAL.
            copy = Path(name) / "copy.db"
            for suffix in ("", "-wal"):
                live = stage.live(active)
                shutil.copyfile(live.with_name(live.name + suffix), copy.with_name(copy.name + suffix))
            return await asyncio.to_thread(_last_row, copy)


def _last_row(database: Path) -> int:
    with contextlib.closing(programs.open_writer(str(database))) as connection:
        return connection.execute("SELECT coalesce(max(number), 0) FROM bench").fetchone()[0]


async def _report(stage: DataStage, node: str, since: float) -> AuditEntry:
    """What *node* says of the database that it had. Raises TimeoutError."""
    deadline = system.now() + REPORT_SECONDS
    while True:
        for entry in await read_audit(stage.bus, stage.names, since=since, limit=1000):
            if entry.node == node and entry.action in ("database-diverged", "database-returned"):
                return entry
        if system.now() > deadline:
            raise TimeoutError(f"{node} has reported nothing of its database\n{stage.last_words()}")
        await asyncio.sleep(LOOK_SECONDS)

"""A replica process is killed while it applies, again and again, and read by another process meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import tempfile
from pathlib import Path

from benchmarks import replication_programs as programs
from benchmarks.figures import Run
from benchmarks.replication_stage import DataStage, Program, program
from phalanx import system

RATE = 200.0
"""Transactions a second, each of some ten pages."""

LOAD_SECONDS = (0.05, 0.4)
"""Of load before a kill: it falls on any moment."""

RETURN_SECONDS = 30.0
LOOK_SECONDS = 0.02


async def torn(run: Run) -> None:
    """Kill the standby's replica process → replicas that are inconsistent + torn reads, by each kill.

    A replica is consistent if SQLite's integrity check finds nothing, all rows are of one transaction, and
    at the position at which the origin stands still all its pages are those of the origin.
    """
    async with DataStage() as stage:
        active, standby = await stage.pair()
        with tempfile.TemporaryDirectory(prefix="phalanx-bench-notes-") as name:
            pause = Path(name) / "pause"
            with (
                program(Path(name) / "looks", "check", str(stage.live(standby))) as reader,
                program(
                    Path(name) / "committed",
                    "write",
                    str(stage.live(active)),
                    "--cells",
                    *("--rate", str(RATE), "--pause", str(pause)),
                ) as writer,
            ):
                await writer.begun()
                torn_before = 0
                for _ in range(run.runs):
                    await asyncio.sleep(random.uniform(*LOAD_SECONDS))
                    problems = await _kill(stage, active, standby, pause)
                    found = [text for number, _, text in reader.notes() if number < 0]
                    problems += [f"torn read: {text}" for text in found[torn_before:]]
                    torn_before = len(found)
                    run.add(len(problems), "; ".join(problems)[:300] or "consistent")
                _check_programs(run, writer, reader)


def _check_programs(run: Run, writer: Program, reader: Program) -> None:
    looks = max((number for number, _, _ in reader.notes()), default=0)
    commits = sum(1 for *_, word in writer.notes() if not word)
    run.say(f"{commits} transactions; the reader looked {looks} times or more")
    for each in (writer, reader):
        if each.process.poll() is not None:
            run.problems.append(f"{each.process.args} ended with {each.process.returncode}")
    if run.runs >= 20 and not looks:
        run.problems.append("the reader has seen hardly anything")


async def _kill(stage: DataStage, active: str, standby: str, pause: Path) -> list[str]:
    """Kill, look at what the kill has left and at what becomes of it; what is wrong with it."""
    victim = stage.processes(standby)["replica process"]
    before = stage.readable(standby)
    os.kill(victim, signal.SIGKILL)
    problems = [f"after the kill: {each}" for each in await asyncio.to_thread(_look, before)]
    await asyncio.to_thread(pause.touch)
    try:
        await _returned(stage, standby, victim)
        await asyncio.sleep(LOOK_SECONDS)  # a commit that was under way
        await _at_end(stage, active, standby)
        theirs, ours = _pages(stage.live(active)), _pages(stage.readable(standby))
        if theirs != ours:
            problems.append("at equal positions the pages are not those of the origin")
        left = await asyncio.to_thread(_look, stage.readable(standby))
        problems += [f"at the end: {each}" for each in left]
    finally:
        await asyncio.to_thread(pause.unlink)
    return problems


async def _returned(stage: DataStage, standby: str, victim: int) -> None:
    deadline = system.now() + RETURN_SECONDS
    while stage.processes(standby).get("replica process", victim) == victim:
        if system.now() > deadline:
            raise TimeoutError(f"{standby} has no new replica process\n{stage.last_words()}")
        await asyncio.sleep(LOOK_SECONDS)


async def _at_end(stage: DataStage, active: str, standby: str) -> None:
    """All that was captured is shipped and applied: both stand at the same transaction."""
    deadline = system.now() + RETURN_SECONDS
    while True:
        one, other = await stage.status(active), await stage.status(standby)
        # Litestream looks at the WAL within moments of a commit; the transaction says whether it did.
        if one is not None and other is not None and one.captured_txid == one.shipped_txid == other.txid:
            committed = await asyncio.to_thread(_number, stage.live(active))
            applied = await asyncio.to_thread(_number, stage.readable(standby))
            if committed == applied:
                return
        if system.now() > deadline:
            raise TimeoutError(f"{standby} does not follow: {one}, {other}\n{stage.last_words()}")
        await asyncio.sleep(LOOK_SECONDS)


def _number(database: Path) -> int:
    try:
        with contextlib.closing(programs.open_reader(database)) as connection:
            return connection.execute("SELECT coalesce(max(number), 0) FROM bench_cells").fetchone()[0]
    except sqlite3.OperationalError:
        return -1  # another file just now


def _look(database: Path) -> list[str]:
    try:
        with contextlib.closing(programs.open_reader(database)) as connection:
            connection.execute("BEGIN")
            problems = [text for (text,) in connection.execute("PRAGMA integrity_check") if text != "ok"]
            wrong = programs.torn(connection.execute(programs.SELECT_CELLS).fetchall())
    except sqlite3.Error as error:
        return [f"{type(error).__name__}: {error}"]
    return problems + ([wrong] if wrong else [])


def _pages(database: Path) -> bytes:
    with contextlib.closing(programs.open_reader(database)) as connection:
        return connection.serialize()

"""Litestream alone, as its manual says: ``replicate`` into a folder, and ``restore -f`` out of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from benchmarks import replication_programs as programs
from benchmarks.replication_stage import lags, program
from phalanx import system
from phalanx.data.litestream import litestream_binary

READY_SECONDS = 20.0
LOOK_SECONDS = 0.1
SETTLE_SECONDS = 3.0
"""After the start: its first snapshot and compaction are over."""


async def follow_lag(rate: float, seconds: float) -> float:
    """Median lag in ms at *rate* small commits a second, all settings of Litestream by default."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-peer-") as name:
        folder = Path(name)
        (folder / "origin").mkdir()
        (folder / "copy").mkdir()
        origin, copy, replica = folder / "origin" / "wiki.db", folder / "copy" / "wiki.db", folder / "replica"
        programs.open_writer(str(origin)).close()
        notes = folder / "committed", folder / "seen"
        with _litestream(folder, "replicate", str(origin), f"file://{replica}"):
            await _until(lambda: any(replica.glob("ltx/*/*.ltx")), "the replica has no file", folder)
            with _litestream(folder, "restore", "-f", "-o", str(copy), f"file://{replica}"):
                await _until(lambda: _is_readable(copy), "nothing is restored", folder)
                await asyncio.sleep(SETTLE_SECONDS)
                with program(notes[1], "read", str(copy), "--anew") as reader:
                    count = int(rate * seconds)
                    arguments = ("--rate", str(rate), "--count", str(count))
                    with program(notes[0], "write", str(origin), *arguments) as writer:
                        await writer.ended(seconds + 10)
                        await asyncio.sleep(2.0)
                        found = [lag for _, lag in lags(writer, reader)]
    if not found:
        raise RuntimeError("no commit was seen in the database that litestream restore -f writes")
    return statistics.median(found)


@contextlib.contextmanager
def _litestream(folder: Path, *arguments: str) -> Generator[None]:
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder)}
    command: Sequence[str] = (litestream_binary(), *arguments)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder
        )
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


def _is_readable(database: Path) -> bool:
    if not database.exists():
        return False
    connection = programs.open_reader(database)
    try:
        connection.execute("SELECT count(*) FROM bench").fetchone()
    except sqlite3.Error:
        return False
    finally:
        connection.close()
    return True


async def _until(condition: Callable[[], bool], problem: str, folder: Path) -> None:
    deadline = system.now() + READY_SECONDS
    while not condition():
        if system.now() > deadline:
            raise TimeoutError(f"after {READY_SECONDS:g} s {problem}\n{(folder / 'log').read_text()[-2000:]}")
        await asyncio.sleep(LOOK_SECONDS)

"""A second copy's folder that does not answer, such as a mounted share whose server is gone.

What hangs is real: a file that is a FIFO whose reader reads nothing, so that writing to it never returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.e2e.site import Site
from tests.e2e.wal import NAMES, connected, make_log
from tests.waiting import until

from phalanx import system
from phalanx.config import SQLite
from phalanx.data import copy_folder, schedule
from phalanx.data.copy_folder import CopyFolder
from phalanx.data.database import AppDatabase
from phalanx.data.ltx import file_name
from phalanx.data.schedule import SnapshotSchedule
from phalanx.data.second_copy import BASES, RECORDS, Copied
from phalanx.errors import DatabaseError
from phalanx.testing.nats import NatsServer

FILE = Copied(BASES, 1, 7)


class Fifo:
    """A file that takes what a pipe has room for, and no more until it is drained."""

    def __init__(self, folder: Path, file: Copied) -> None:
        self.target = folder / "ltx" / str(file.level) / file_name(file.min_txid, file.max_txid)
        self.path = self.target.with_name(f"{self.target.name}.tmp")
        self.path.parent.mkdir(parents=True)
        os.mkfifo(self.path)
        self.reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def is_full(self) -> bool:
        """Whether a write to it hangs now."""
        writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(writer, bytes(1))
        except BlockingIOError:
            return True
        finally:
            os.close(writer)
        return False

    def drain(self) -> None:
        """It goes on."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 1 << 20)

    def close(self) -> None:
        os.close(self.reader)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the copy goes."""
    return tmp_path / "copy"


async def large(*sizes: int) -> AsyncIterator[bytes]:
    """More than what a pipe or a buffer has room for."""
    for size in sizes or (2 << 20, 2 << 20):
        yield bytes(size)


async def ended(task: asyncio.Task[Any]) -> float:
    """Cancel it; how long its end took, in seconds."""
    began = system.now()
    task.cancel()
    await asyncio.wait({task}, timeout=20)
    assert task.cancelled()
    return system.now() - began


async def test_write_that_hangs_is_left_behind_and_leaves_nothing_when_it_returns(folder: Path) -> None:
    """Who is cancelled goes on at once; the thread ends, and its file goes, once the folder answers again."""
    fifo, copy, threads = Fifo(folder, FILE), CopyFolder(folder), threading.active_count()
    writing = asyncio.create_task(copy.write(FILE, large(), 1.0))
    await until(fifo.is_full)
    assert await ended(writing) < 10
    assert copy.hanging_seconds > 0
    with pytest.raises(DatabaseError, match="does not answer") as raised:
        await copy.list_files(BASES)
    assert "copy_to" in raised.value.remedy
    assert fifo.path.exists()

    def gone() -> bool:
        fifo.drain()
        return not fifo.path.exists()

    await until(gone)
    await until(lambda: threading.active_count() <= threads)
    assert not fifo.target.exists()
    assert await copy.list_files(BASES) == []
    await copy.write(FILE, large(1000), 1.0)
    assert await copy.list_files(BASES) == [Copied(BASES, 1, 7, 1000)]
    fifo.close()


async def test_folder_that_does_not_answer_is_an_error_after_the_deadline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever, and each further call fails at once."""
    monkeypatch.setattr(copy_folder, "CALL_SECONDS", 0.3)
    fifo, copy = Fifo(folder, FILE), CopyFolder(folder)
    with pytest.raises(DatabaseError, match="does not answer"):
        await copy.write(FILE, large(), 1.0)
    with pytest.raises(DatabaseError, match="does not answer"):
        await copy.read_note()
    fifo.close()


async def test_file_whose_sync_was_left_behind_is_not_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node may lead by then, and write to the same share."""
    goes_on, real = threading.Event(), os.fsync

    def hanging(descriptor: int) -> None:
        goes_on.wait(20)
        real(descriptor)

    copy = CopyFolder(folder)
    await copy.write_note(b"first")
    monkeypatch.setattr(os, "fsync", hanging)
    target = folder / "ltx" / "9" / file_name(1, 7)
    temporary = target.with_name(f"{target.name}.tmp")
    for work in (copy.write(FILE, large(1000), 1.0), copy.write_note(b"second")):
        task = asyncio.create_task(work)
        await until(lambda: copy.hanging_seconds > 0.05)
        assert await ended(task) < 10
        goes_on.set()
        await until(lambda: copy.hanging_seconds == 0)
        goes_on.clear()
    await until(lambda: not temporary.exists())
    assert not target.exists()
    assert (folder / "phalanx.json").read_bytes() == b"first"


async def test_stand_down_does_not_wait_for_a_copy_that_hangs(
    folder: Path, tmp_path: Path, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a record: the schedule ends at once, and the audit log has it."""
    monkeypatch.setattr(schedule, "HANGS_SECONDS", 0.1)
    fifo = Fifo(folder, Copied(RECORDS, 1, 1))
    reports: list[tuple[str, str]] = []

    def report(action: str, reason: str, **_: object) -> None:
        reports.append((action, reason))

    async with connected(nats_server.url()) as bus:
        site = Site(tmp_path, bus, await make_log(bus), 4096)
        await site.begin(7)
        await site.commit(rows=30, size=60_000)
        database = SimpleNamespace(
            app="wiki",
            config=SQLite(str(site.live), copy_to=str(folder)),
            snapshots=site.snapshots,
            log=site.log,
            names=NAMES,
            position=site.positions[-1],
            report=report,
        )
        running = SnapshotSchedule(cast(AppDatabase, database))
        await running.start()
        await until(fifo.is_full)
        copying = running._folder
        assert isinstance(copying, copy_folder.CopyFolder)
        await until(lambda: copying.hanging_seconds > 0.2)
        began = system.now()
        await running.stop()
        assert system.now() - began < 10
        assert [action for action, _ in reports] == ["snapshot-left"]
        assert str(folder) in reports[0][1]
        site.close()
    fifo.close()

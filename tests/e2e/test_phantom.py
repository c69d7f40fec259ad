"""G3: what a program was killed within committing is never taken for committed, and hides nothing that is."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.test_capture import Bench, rebuild

from phalanx import system
from phalanx.data import checkpoints, ltx
from phalanx.data.committed import Committed, Verdict
from phalanx.data.handover import wal_info
from phalanx.data.sqlite_wal import (
    INDEX_HEADER_BYTES,
    decode_index_header,
    encode_frame,
    frame_offset,
)
from phalanx.data.wal_index import Mark, WalIndex

PAGE = 4096

# It commits with an fsync each time, so that a kill hits it between its frames and the index as a rule.
COMMITTER = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
db.execute("PRAGMA synchronous = FULL")
print("ready", flush=True)
while True:
    db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(30000),))
"""


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        await made.dispose()


def rows_in(files: list[tuple[int, Path]], folder: Path) -> set[object]:
    """What the captured *files* hold."""
    copy = folder / "rebuilt.db"
    copy.write_bytes(rebuild(files))
    db = sqlite3.connect(f"file:{copy}?mode=ro&immutable=1", uri=True)
    try:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {x for (x,) in db.execute("SELECT x FROM t")}
    finally:
        db.close()


def leave_phantom(live: Path, frames: int) -> None:
    """Write what a program leaves that is killed between its last frame and the index: wal.c sets that last.

    The transaction has *frames* new pages behind the end of the database.
    """
    with live.with_name("a.db-shm").open("rb") as index:  # in no process that has it open
        header = decode_index_header(index.read(INDEX_HEADER_BYTES))
    assert header is not None
    s0, s1 = header.checksum
    data = b""
    for number in range(1, frames + 1):
        page = random.randbytes(PAGE)
        commit = header.commit + frames if number == frames else 0
        head, s0, s1 = encode_frame(
            header.commit + number, page, commit, header.salts, s0, s1, header.big_endian
        )
        data += head + page
    with live.with_name("a.db-wal").open("r+b") as wal:
        wal.seek(frame_offset(header.frames + 1, PAGE))
        wal.write(data)


def leave_phantom_elsewhere(live: Path, frames: int) -> None:
    """The same in a process of its own: closing the index in this one would drop its locks."""
    code = f"from tests.e2e.test_phantom import *; leave_phantom(Path({str(live)!r}), {frames})"
    subprocess.run((sys.executable, "-c", code), check=True, cwd=Path(__file__).parents[2])


async def test_g3_commits_after_a_program_died_within_its_own_are_captured(
    bench: Bench, tmp_path: Path
) -> None:
    """Litestream stands behind the end of what is committed: no barrier may go by that."""
    db = bench.connect()
    db.executemany("INSERT INTO t (x) VALUES (?)", [(f"before {n}",) for n in range(20)])
    capture = bench.capture()
    await capture.start(0)
    await capture.sync(5)
    leave_phantom_elsewhere(bench.live, 40)
    deadline = system.now() + 10
    while "withdrawn" not in bench.kinds():
        await capture.sync(5)
        assert system.now() < deadline
    for number in range(8):
        db.execute("INSERT INTO t (x) VALUES (?)", (f"after {number}",))
        await capture.sync(5)
        assert f"after {number}" in rows_in(capture.files(0), tmp_path)
    assert "gap" not in bench.kinds()
    await bench.stop(capture)
    bench.assert_rebuilds(capture.files(0))


def kill_within_commit(live: Path) -> None:
    """SIGKILL a program while all frames of its transaction are in the WAL, and the index has none."""
    program = subprocess.Popen(
        (sys.executable, "-c", COMMITTER, str(live)), stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    program.stdout.readline()
    index, deadline = WalIndex(live), time.monotonic() + 20
    while True:
        assert time.monotonic() < deadline
        program.send_signal(signal.SIGSTOP)
        os.waitpid(program.pid, os.WUNTRACED)
        mark = index.look()
        assert mark is not None
        if index.is_being_written() and ends_transaction(live, mark):
            break
        program.send_signal(signal.SIGCONT)
    program.kill()
    program.communicate()


def ends_transaction(live: Path, mark: Mark) -> bool:
    """Whether one of the frames after *mark* ends a transaction."""
    with live.with_name("a.db-wal").open("rb") as wal:
        for frame in range(mark.frames + 1, mark.frames + 20):
            wal.seek(frame_offset(frame, PAGE))
            _, commit, *salts = struct.unpack(">4I", wal.read(16).ljust(16, b"\0"))
            if salts == [mark.salt1, mark.salt2] and commit:
                return True
    return False


async def test_g3_programs_killed_while_they_commit_again_and_again(bench: Bench, tmp_path: Path) -> None:
    """What another program commits right after the kill is in the files once a barrier says so."""
    db = bench.connect()
    db.execute("INSERT INTO t (x) VALUES ('first')")
    capture = bench.capture()
    await capture.start(0)
    for number in range(60):
        await asyncio.to_thread(kill_within_commit, bench.live)
        db.execute("INSERT INTO t (x) VALUES (?)", (f"after {number}",))
        await capture.sync(10)
        assert f"after {number}" in rows_in(capture.files(0), tmp_path)
        # Litestream may be quicker, or slower, than all of that: then nothing had to be withdrawn.
        if number >= 5 and "withdrawn" in bench.kinds():
            break
    assert "withdrawn" in bench.kinds()
    await bench.stop(capture)
    bench.assert_rebuilds(capture.files(0))


async def test_g8_a_phantom_at_the_end_of_a_wal_that_litestream_moves_into_the_database(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sync reads the phantom and begins the WAL anew: nothing shows it but the database itself."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 0)
    db = bench.connect()
    db.execute("INSERT INTO t (x) VALUES ('first')")
    capture = bench.capture()
    await capture.start(0)
    await capture.sync(5)
    assert capture.pid is not None
    os.kill(capture.pid, signal.SIGSTOP)
    db.execute("INSERT INTO t (x) VALUES (?)", (os.urandom(8_000_000),))
    await asyncio.to_thread(kill_within_commit, bench.live)
    os.kill(capture.pid, signal.SIGCONT)
    await capture.sync(10)
    db.execute("INSERT INTO t (x) VALUES ('last')")
    await capture.sync(10)
    assert rows_in(capture.files(0), tmp_path) == {x for (x,) in db.execute("SELECT x FROM t")}
    await bench.stop(capture)
    bench.assert_rebuilds(capture.files(0))


def test_judge(bench: Bench) -> None:
    """A file is committed once the index has its end, in doubt while somebody writes, else a phantom."""
    db = bench.connect()
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute("INSERT INTO t (x) VALUES ('one')")
    index = Committed(bench.live)
    before = index.mark()
    assert before is not None
    db.execute("INSERT INTO t (x) VALUES (?)", ("two" * 4000,))
    now = index.mark()
    assert now is not None
    assert now.frames > before.frames
    wal = bench.live.with_name("a.db-wal").read_bytes()

    def captured(first: int, last: int, change: bytes = b"") -> Path:
        """A file with the frames from *first* to *last*, the last page of them with *change* at its end."""
        pages: dict[int, bytes] = {}
        commit = number = 0
        for frame in range(first, last + 1):
            at = frame_offset(frame, PAGE)
            number, commit = (int.from_bytes(wal[at + n : at + n + 4], "big") for n in (0, 4))
            pages[number] = wal[at + 24 : at + 24 + PAGE]
        pages[number] = pages[number][: PAGE - len(change)] + change
        header = ltx.Header(
            page_size=PAGE,
            commit=max(commit, 2),
            min_txid=2,
            max_txid=2,
            flags=ltx.NO_CHECKSUM,
            wal_offset=frame_offset(first, PAGE),
            wal_size=(last - first + 1) * (PAGE + 24),
            wal_salt1=now.salt1,
            wal_salt2=now.salt2,
        )
        path = bench.folder / "one.ltx"
        path.write_bytes(ltx.encode(header, [ltx.Page(n, pages[n]) for n in sorted(pages)]))
        return path

    assert index.judge(captured(before.frames + 1, now.frames), before) is Verdict.COMMITTED
    assert index.judge(captured(before.frames + 1, now.frames), None) is Verdict.COMMITTED
    assert index.judge(captured(before.frames + 1, now.frames, b"other"), before) is Verdict.PHANTOM
    assert index.judge(captured(before.frames + 1, now.frames, b"other"), now) is Verdict.COMMITTED, "known"
    leave_phantom_elsewhere(bench.live, 2)
    wal = bench.live.with_name("a.db-wal").read_bytes()
    assert index.judge(captured(now.frames + 1, now.frames + 2), now) is Verdict.PHANTOM
    db.execute("BEGIN IMMEDIATE")
    assert index.judge(captured(now.frames + 1, now.frames + 2), now) is Verdict.IN_DOUBT
    db.execute("ROLLBACK")
    assert index.judge(captured(now.frames + 1, now.frames + 2), now) is Verdict.PHANTOM


def test_phantom_counts_once_nobody_has_the_database_open(bench: Bench) -> None:
    """Until then the next writer overwrites it; then SQLite makes the index anew from all that is there."""
    db = bench.connect()
    db.execute("PRAGMA wal_autocheckpoint = 0")
    mark = WalIndex(bench.live).look()
    assert mark is not None
    leave_phantom_elsewhere(bench.live, 2)
    found = wal_info(bench.live, mark.salt1, mark.salt2, frame_offset(mark.frames + 1, PAGE))
    assert (found.frames, found.later_commits) == (mark.frames, 0)
    copy = bench.folder / "copy" / "a.db"
    copy.parent.mkdir()
    for suffix in ("", "-wal", "-shm"):
        shutil.copy(f"{bench.live}{suffix}", f"{copy}{suffix}")
    found = wal_info(copy, mark.salt1, mark.salt2, frame_offset(mark.frames + 1, PAGE))
    assert (found.frames, found.later_commits) == (mark.frames + 2, 1)

"""A database that nobody could use is found before a node starts, and the look changes nothing.

Who has it locked is a real program, in a process of its own.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from phalanx import system
from phalanx.data import file_check

PROGRAM = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2].split(";"):
    db.execute(statement).fetchall()
print("ready", flush=True)
sys.stdin.readline()
os._exit(0)
"""
READS = "BEGIN; SELECT * FROM t"
WRITES = "BEGIN IMMEDIATE; INSERT INTO t VALUES (1)"
HAS_IT_ALONE = "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE"
HAS_THE_WAL_ALONE = "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; INSERT INTO t VALUES (1)"
IN_WAL_MODE = "PRAGMA journal_mode = WAL; INSERT INTO t VALUES (1)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with some pages, in the mode that a new one has."""
    path = tmp_path / "wiki.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (randomblob(20000))")
        connection.commit()
    return path


@contextmanager
def program(path: Path, statements: str) -> Generator[subprocess.Popen[str]]:
    """It has the database open, has executed that, and waits. Then it ends without a word."""
    process = subprocess.Popen(
        (sys.executable, "-c", PROGRAM, str(path), statements),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.communicate("\n", timeout=20)


def problem(path: Path) -> str:
    """What is wrong, empty if nothing; files are made neither here nor there, nor changed."""
    before = contents(path.parent)
    found = file_check.problem(path, path.with_name(f".{path.name}-phalanx"))
    assert contents(path.parent) == before
    assert found is None or found[1]
    return found[0] if found is not None else ""


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but the index of a WAL, which readers write to."""
    return {each.name: b"" if each.name.endswith("-shm") else each.read_bytes() for each in folder.iterdir()}


@pytest.mark.skipif(not system.LINUX, reason="who has a lock is told by Linux")
@pytest.mark.parametrize("statements", [READS, WRITES, HAS_IT_ALONE, HAS_THE_WAL_ALONE])
def test_file_that_another_program_does_not_let_go_of(file: Path, statements: str) -> None:
    """It could not be switched to WAL mode, or not be opened at all: the program's number is said."""
    with program(file, statements) as other:
        assert f"process {other.pid} has it locked" in problem(file)
    assert problem(file) == ""


def test_lock_for_a_moment_is_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may be in the middle of a commit."""
    with program(file, HAS_IT_ALONE) as other:
        sleep = file_check.time.sleep

        def lets_go(seconds: float) -> None:
            other.kill()
            sleep(seconds)

        monkeypatch.setattr(file_check.time, "sleep", lets_go)
        assert problem(file) == ""


@pytest.mark.parametrize("statements", [IN_WAL_MODE, f"{IN_WAL_MODE}; {READS}", f"{IN_WAL_MODE}; {WRITES}"])
def test_program_that_uses_a_database_in_wal_mode_is_welcome(file: Path, statements: str) -> None:
    """It goes on under capture; so does one that was killed, and has left a WAL."""
    with program(file, statements):
        assert problem(file) == ""
    assert file.with_name("wiki.db-wal").stat().st_size
    assert problem(file) == ""
    file.with_name("wiki.db-shm").unlink()
    assert problem(file) == ""


def test_program_that_was_killed_within_a_commit_has_left_a_journal(file: Path) -> None:
    """Whoever may write rolls it back: that is no reason to refuse the file."""
    with program(file, f"PRAGMA cache_size = 2; {WRITES}; INSERT INTO t VALUES (randomblob(900000))"):
        pass
    assert file.with_name("wiki.db-journal").stat().st_size
    assert problem(file) == ""


def test_content_that_is_no_database(file: Path) -> None:
    """Behind the first bytes, which look well: noise, or nothing; or the schema is damaged."""
    sound = file.read_bytes()
    for content in (sound[:16] + os.urandom(8192), sound[:16] + b"x", sound[:100] + bytes(len(sound) - 100)):
        file.write_bytes(content)
        assert "no sound SQLite database" in problem(file)
    file.write_bytes(b"")
    assert problem(file) == ""


def test_live_database_of_an_earlier_node_keeps_the_index_of_its_wal(file: Path) -> None:
    """What was committed is told by it, and would not be by one that is made anew from the WAL."""
    with program(file, IN_WAL_MODE):
        pass
    file.with_name(".wiki.db-phalanx").mkdir()
    index = file.with_name("wiki.db-shm")
    before = index.read_bytes()
    assert file_check.problem(file, file.with_name(".wiki.db-phalanx")) is None
    assert index.read_bytes() == before

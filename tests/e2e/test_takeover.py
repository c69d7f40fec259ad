"""A takeover: what writes starts beside Litestream, and nothing of what it commits escapes (G3)."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from phalanx import ActiveContext, App, Backoff, Platform, Process, Role, SQLite, system
from phalanx.data import litestream
from phalanx.testing.nats import NatsServer

SLOW_SECONDS = 1.0

WRITER = """
import os, sqlite3, time
db = sqlite3.connect(os.environ["PHALANX_DATABASE"], isolation_level=None, timeout=5)
db.execute("PRAGMA journal_mode = WAL")
db.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, writer TEXT)")
while True:
    db.execute("INSERT INTO rows (writer) VALUES (?)", (f"{os.environ['PHALANX_NODE']} {os.getuid()}",))
    time.sleep(0.01)
"""


@pytest.fixture
def litestreams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what Litestream does on node n2 before it starts: lines of a shell script."""
    program = tmp_path / "litestream"
    real = litestream.litestream_binary()

    def set_up(script: str) -> None:
        program.write_text(f'#!/bin/sh\ncase "$*" in */n2/*)\n{script}\n;; esac\nexec "{real}" "$@"\n')
        program.chmod(0o755)

    set_up("")
    monkeypatch.setattr(litestream, "litestream_binary", lambda: str(program))
    return set_up


@asynccontextmanager
async def node(
    nats: NatsServer,
    folder: Path,
    name: str,
    on_active: Callable[[ActiveContext], Any] | None,
    apps: dict[str, App],
    **app: Any,
) -> AsyncIterator[App]:
    """One node in this process, whose app has a database; also in *apps*."""
    place = folder / name
    place.mkdir(exist_ok=True)
    platform = Platform(
        "test",
        node=name,
        nats=nats.urls,
        data_dir=str(folder / f"data-{name}"),
        http={"enabled": False},
        timings={"ttl": 2},
    )
    declared = apps[name] = platform.app(
        "wiki", database=SQLite(str(place / "wiki.db"), sync="server"), **app
    )
    if on_active is not None:
        declared.on_active(on_active)
    async with platform:
        yield declared


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for *condition*."""
    deadline = system.now() + 15
    while not condition():
        assert system.now() < deadline, what
        await asyncio.sleep(0.005)


async def is_candidate(app: App, leading: App) -> None:
    """Until the node that leads knows that *app* could take over there."""
    await until(
        lambda: any(each.eligible and each.session.node == app.node for each in leading.candidates()),
        f"{app.node} is no candidate",
    )


@contextmanager
def writing(path: str) -> Generator[sqlite3.Connection]:
    """A connection as programs have it."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=5)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, writer TEXT)")
        yield connection


def commit(connection: sqlite3.Connection, writer: str) -> None:
    """One row."""
    connection.execute("INSERT INTO rows (writer) VALUES (?)", (writer,))


def writers(path: str | Path) -> list[str]:
    """Who has written the rows of the database at *path*, in order."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [writer for (writer,) in connection.execute("SELECT writer FROM rows ORDER BY number")]


async def test_g3_litestream_starts_late_what_is_committed_meanwhile_is_in_the_log(
    nats_server: NatsServer,
    tmp_path: Path,
    litestreams: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Hooks run while it starts; the program's own checkpoints take nothing away; db.sync() waits for it."""
    litestreams(f"sleep {SLOW_SECONDS}")
    began, synced, roles = list[float](), list[float](), list[Role]()
    apps = dict[str, App]()

    async def on_active(ctx: ActiveContext) -> None:
        began.append(system.now())
        with writing(ctx.db.path) as connection:
            for _ in range(20):
                commit(connection, ctx.node)
                connection.execute("PRAGMA busy_timeout = 10")
                connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
            roles.append(apps[ctx.node].role)
            await ctx.db.sync()
            synced.append(system.now())

    async with node(nats_server, tmp_path, "n1", on_active, apps) as first:
        await first.wait_for_role(Role.ACTIVE, timeout=15)
        async with node(nats_server, tmp_path, "n2", on_active, apps) as second:
            await is_candidate(second, first)
            began.clear()
            synced.clear()
            await first.step_down("a test", to="n2")
            await second.wait_for_role(Role.ACTIVE, timeout=15)
            assert synced[0] - began[0] > SLOW_SECONDS / 2
            assert roles[-1] is Role.ACTIVATING
            await first.wait_for_role(Role.STANDBY, timeout=15)
            assert not list((tmp_path / "n1").glob("*.diverged*"))
            await first.db.wait_for(second.db.position)
            with closing(first.db.connect()) as replica:
                found = [each for (each,) in replica.execute("SELECT writer FROM rows ORDER BY number")]
            assert found == ["n1"] * 20 + ["n2"] * 20
    assert "capture gap" not in caplog.text


async def test_g3_litestream_cannot_start_the_section_ends_and_what_was_committed_is_counted(
    nats_server: NatsServer, tmp_path: Path, litestreams: Callable[[str], None]
) -> None:
    """It never was active. The node before it leads again, and what the program wrote is kept aside."""
    sections = list[str]()

    async def on_active(ctx: ActiveContext) -> None:
        sections.append(ctx.node)
        with writing(ctx.db.path) as connection:
            commit(connection, ctx.node)
            commit(connection, ctx.node)

    retry = Backoff(first=30.0)
    async with node(nats_server, tmp_path, "n1", on_active, {}) as first:
        await first.wait_for_role(Role.ACTIVE, timeout=15)
        async with node(nats_server, tmp_path, "n2", on_active, {}, retry=retry) as second:
            await is_candidate(second, first)
            litestreams("sleep 0.3\nexit 3")
            await first.step_down("a test", to="n2")
            await until(lambda: len(sections) == 3, "n1 does not lead again")
            assert sections == ["n1", "n2", "n1"]
            await first.wait_for_role(Role.ACTIVE, timeout=15)
            assert second.database is not None
            settlements = second.database.settlements
            await until(settlements.diverged, "n2 has not settled")
            (what,) = settlements.diverged()
            assert (what.transactions, what.exact) == (2, True)
            assert writers(what.file) == ["n1", "n1", "n2", "n2"]
            assert writers(tmp_path / "n1" / "wiki.db") == ["n1"] * 4


# --- whose the files are


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="phalanx-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


SYSTEM_PYTHON = "/usr/bin/python3"
NOBODY = 65534

is_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists(),
    reason="only root can run a program as another user",
)


@is_root
async def test_program_of_another_user_writes_on_each_node_after_each_takeover(
    nats_server: NatsServer, open_folder: Path
) -> None:
    """The node is root, the folder and the program are not: the files that it is given are its own."""
    program = Process([SYSTEM_PYTHON, "-c", WRITER], user="nobody", env={"PATH": "/usr/bin:/bin"})
    for name in ("n1", "n2"):
        (open_folder / name).mkdir(mode=0o750)
        os.chown(open_folder / name, NOBODY, NOBODY)
    apps = dict[str, App]()

    def rows(writer: App) -> int:
        path = open_folder / writer.node / "wiki.db"
        try:
            return writers(path).count(f"{writer.node} {NOBODY}")
        except sqlite3.OperationalError:
            return 0

    async with (
        node(nats_server, open_folder, "n1", None, apps, backend=program) as first,
        node(nats_server, open_folder, "n2", None, apps, backend=program) as second,
    ):
        await until(lambda: first.is_active or second.is_active, "nobody is active")
        active, standby = (first, second) if first.is_active else (second, first)
        for _ in range(3):
            await until(lambda app=active: rows(app) > 3, f"{active.node} writes nothing")
            await is_candidate(standby, active)
            await active.step_down("a test", to=standby.node)
            active, standby = standby, active
            before = rows(active)
            await until(
                lambda app=active, n=before: rows(app) > n + 3, f"nothing is written on {active.node}"
            )
            for suffix in ("", "-wal", "-shm"):
                status = (open_folder / active.node / f"wiki.db{suffix}").stat()
                assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)

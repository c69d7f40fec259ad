"""``phalanx snapshot list``, ``verify``, ``delete`` and ``restore``: they need NATS alone, no node."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.cli import CLI, Cli
from tests.e2e.site import Site
from tests.e2e.wal import APP, NAMES, connected, make_log
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.client import PlatformClient
from phalanx.client_db import Verification
from phalanx.config import NatsOptions
from phalanx.data.status import DbVerified
from phalanx.testing.nats import NatsServer
from phalanx.types import Position

FIRST = 10


class Snapshotted(Cli):
    """An app with a log and two snapshots, at the 1st and 3rd of 4 commits, each of ten rows."""

    def __init__(self, url: str, folder: Path, bus: NatsBus, site: Site) -> None:
        super().__init__(url, folder)
        self.bus, self.site = bus, site
        self.names: list[str] = []
        self.times: list[float] = []

    async def make(self) -> None:
        """Commit and take snapshots."""
        for number in range(4):
            await self.site.commit(rows=FIRST)
            self.times.append(time.time())
            await asyncio.sleep(0.01)
            if number in (0, 2):
                made = await self.site.snapshots.create(self.site.source, epoch=7, kind="manual", note="test")
                self.names.append(made.name)

    def rows(self, name: str) -> int:
        """How many rows the restored database has."""
        with closing(sqlite3.connect(self.folder / name)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    """A connection."""
    async with connected(nats_server.url()) as bus:
        yield bus


@pytest.fixture
async def app(nats_server: NatsServer, bus: NatsBus, tmp_path: Path) -> AsyncIterator[Snapshotted]:
    """A platform that is down, with one app and its snapshots."""
    bucket = NAMES.platform_bucket
    await create_stream(bus, bucket_config(NAMES, bucket, None, history=4, replicas=1))
    await bus.write(NAMES.key_subject(bucket, NAMES.app_key(APP)), b"{}")
    await bus.write(NAMES.key_subject(bucket, NAMES.database_key(APP)), b"{}")
    (tmp_path / "site").mkdir()
    (tmp_path / "here").mkdir()
    site = Site(tmp_path / "site", bus, await make_log(bus), 4096)
    try:
        await site.begin(7)
        made = Snapshotted(nats_server.url(), tmp_path / "here", bus, site)
        await made.make()
        yield made
    finally:
        site.close()


async def test_snapshot_list_shows_what_there_is(app: Snapshotted) -> None:
    """Name, age of the data, position, sizes: oldest first."""
    shown = await app.json("snapshot", "list", APP)
    assert [one["name"] for one in shown["snapshots"]] == app.names
    newest = shown["snapshots"][1]
    assert newest["position"] == {"sequence": app.site.positions[2].sequence, "txid": 3}
    assert newest["raw_bytes"] > newest["size_bytes"] > 0
    text, _ = await app.call("snapshot", "list", APP)
    assert [line.split()[0] for line in text.splitlines()] == ["NAME", *app.names]
    assert "manual: test" in text


async def test_snapshot_verify_finds_the_damaged_one(app: Snapshotted) -> None:
    """Each is restored and checked; a damaged one is exit code 1 and does not hide the others."""
    assert (await app.json("snapshot", "verify", APP))["ok"]
    info = await app.site.snapshots.objects.info(app.names[0])
    assert info is not None
    bucket = NAMES.snapshots_bucket(APP)
    await app.bus.api(
        f"STREAM.PURGE.{NAMES.object_stream(bucket)}", {"filter": NAMES.object_chunks(bucket, info.nuid)}
    )
    await app.bus.write(NAMES.object_chunks(bucket, info.nuid), b"x" * info.size)
    shown = await app.json("snapshot", "verify", APP, code=1)
    assert [one["ok"] for one in shown["snapshots"]] == [False, True]
    assert shown["snapshots"][0]["problem"]
    text, _ = await app.call("snapshot", "verify", APP, app.names[1])
    assert text == f"{app.names[1]}: ok\n"
    assert "no such snapshot" in await app.refused("snapshot", "verify", APP, "snapshot-1")


async def test_node_alone_with_its_position_is_compared_with_the_log(
    app: Snapshotted, nats_server: NatsServer
) -> None:
    """Right and wrong fingerprints, and a position that is not to be had, as `db verify` sees them."""
    position = app.site.positions[1]
    right = hashlib.sha256(app.site.expected(position.txid)).hexdigest()
    options = NatsOptions(urls=(nats_server.url(),))
    async with PlatformClient("prod", options) as client:

        async def judge(sequence: int, fingerprint: str) -> Verification:
            answer = DbVerified(node="n1", ok=True, position=Position(sequence, 2), fingerprint=fingerprint)
            return await client.databases._judge(APP, ["n1"], [answer])  # pyright: ignore

        good = await judge(position.sequence, right)
        assert (good.ok, good.compared, good.notes) == (True, ("n1",), ())
        bad = await judge(position.sequence, "00" * 32)
        assert "differs from what snapshots and log give" in bad.problems[0]
        old = await judge(1, right)
        assert (old.ok, old.compared) == (True, ())
        assert "before the oldest snapshot" in old.notes[0]


async def test_snapshot_delete_keeps_the_last(app: Snapshotted) -> None:
    """One can go, the last one never; an unknown name is bad input."""
    assert "no such snapshot" in await app.refused("snapshot", "delete", APP, "snapshot-1")
    await app.call("snapshot", "delete", APP, app.names[0])
    assert [one["name"] for one in (await app.json("snapshot", "list", APP))["snapshots"]] == app.names[1:]
    assert "last snapshot" in await app.refused("snapshot", "delete", APP, app.names[1], code=1)


async def test_restore_of_every_kind_of_state_into_a_file(app: Snapshotted) -> None:
    """By position (as shown, too), by time, by name, and the newest; with no node running."""
    positions = app.site.positions
    iso = (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(app.times[1])) + f".{int(app.times[1] % 1 * 1000):03}Z"
    )
    for number, (words, rows) in enumerate(
        (
            (("--position", str(positions[1].sequence)), 2 * FIRST),
            (("--position", str(positions[0])), FIRST),
            (("--at", iso), 2 * FIRST),
            ((app.names[1],), 3 * FIRST),
            ((), 4 * FIRST),
        )
    ):
        file = f"{number}.db"
        shown = await app.json("snapshot", "restore", APP, *words, "--to", file)
        assert app.rows(file) == rows, words
        assert shown["file"] == str(app.folder / file)
    assert (await app.json("snapshot", "restore", APP, "--to", "last.db"))["position"]["txid"] == 4
    text, _ = await app.call("snapshot", "restore", APP, app.names[0], "--to", "text.db")
    assert f"has the state at {positions[0]}" in text


BAD = [
    (("--position", "0", "--to", "x"), "--position"),
    (("--position", "x", "--to", "x"), "--position"),
    (("--position", "999999", "--to", "x"), "ends at"),
    (("--position", "1", "--to", "x"), "before the oldest snapshot"),
    (("--at", "soon", "--to", "x"), "--at"),
    (("--at", "7d", "--to", "x"), "before the oldest snapshot"),
    (("--at", "2999-01-01", "--to", "x"), "future"),
    (("snapshot-1", "--to", "x"), "snapshot-1"),
    (("--at", "1s", "--position", "5", "--to", "x"), "--at is given too"),
    ((), "--to"),
    (("--in-place",), "which state"),
    (("--in-place", "--to", "x", "--at", "1s"), "--in-place is given too"),
    (("--to", "taken.db"), "not overwritten"),
    (("--to", "."), "a folder"),
    (("--to", "no/x.db"), "there is no folder"),
    (("--in-place", "--at", "7d", "--yes"), "before the oldest snapshot"),
    (("--in-place", "--position", "3"), "--yes"),
    (("--in-place", "--position", "3", "--yes", "--wait", "0"), "--wait"),
]


async def test_restore_bad_input_changes_nothing(app: Snapshotted) -> None:
    """Each is one line with exit code 2; no file appears, the one that was there stays."""
    (app.folder / "taken.db").write_bytes(b"precious")
    for words, expected in BAD:
        error = await app.refused("snapshot", "restore", APP, *words)
        assert expected in error, (words, error)
    assert os.listdir(app.folder) == ["taken.db"]
    assert (app.folder / "taken.db").read_bytes() == b"precious"


async def test_restore_interrupted_leaves_no_file(app: Snapshotted) -> None:
    """Ctrl-C in the middle: exit code 130, and neither half a database nor a folder is left."""
    await app.site.commit(rows=3000, size=4000)
    await app.site.snapshots.create(app.site.source, epoch=7)
    process = await asyncio.create_subprocess_exec(
        *CLI, "snapshot", "restore", APP, "--to", "x.db", env=app.environment, cwd=app.folder
    )
    await until(lambda: os.listdir(app.folder))
    process.send_signal(2)
    async with asyncio.timeout(20):
        assert await process.wait() == 130
    assert os.listdir(app.folder) == []


async def test_restore_in_place_asks_on_a_terminal(app: Snapshotted) -> None:
    """It says what is lost, and any answer but yes changes nothing."""
    words = " ".join(
        [*CLI, "snapshot", "restore", APP, "--position", str(app.site.positions[0].sequence), "--in-place"]
    )
    process = await asyncio.create_subprocess_exec(
        "script",
        "-qec",
        words,
        "/dev/null",
        env=app.environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        said, _ = await process.communicate(b"n\n")
    assert process.returncode == 1, said
    assert b"is undone" in said
    assert b"nothing was changed" in said

"""``phalanx db`` and ``phalanx snapshot`` against a real NATS server and real nodes.

What nodes say of their databases is said here by a stand-in on the same subjects, so that every answer can be
had, bad ones too; the nodes themselves are real ``phalanx run`` processes.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.e2e.cli import CLI, Cli

from phalanx import system
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.data.status import (
    RESTORE_FAILED,
    RESTORE_KEY,
    RESTORED,
    DbDifference,
    DbStatus,
    DbVerified,
    DiffRequest,
    DivergedFile,
    RestoreRequest,
    SnapshotProgress,
    SnapshotRequest,
    TableDifference,
)
from phalanx.errors import DatabaseError
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry
from phalanx.ports import Message
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import Nodes
from phalanx.types import Position

NAMES = Names("prod")

TOML = """
[platform]
name = "prod"
[timings]
ttl = "2s"
[apps.wiki]
pattern = "active-passive"
[apps.shop]
pattern = "active-passive"
"""

STATUS = {
    "n1": DbStatus(
        app="wiki",
        node="n1",
        role="live",
        position=Position(812, 790),
        known_end=812,
        size_bytes=10 << 20,
        epoch=7,
        captured_txid=793,
        shipped_txid=790,
        spool_bytes=4096,
        snapshot="s-1",
    ),
    "n2": DbStatus(
        app="wiki",
        node="n2",
        role="following",
        position=Position(810, 788),
        known_end=812,
        lag_records=2,
        lag_seconds=0.012,
        lag_bytes=8192,
        size_bytes=10 << 20,
        epoch=7,
        diverged=1,
    ),
}
DIVERGED = DivergedFile(
    app="wiki",
    node="n2",
    epoch=5,
    sequence=700,
    txid=680,
    transactions=3,
    exact=False,
    size_bytes=9 << 20,
    time=1_700_000_000.0,
    file="/srv/wiki.db.diverged-5",
)


class Platform(Cli):
    """Two nodes, and the command line to look at them; ``bus`` is the stand-in's connection."""

    def __init__(self, server: NatsServer, nodes: Nodes, bus: NatsBus, folder: Path) -> None:
        super().__init__(server.url(), folder)
        self.server, self.nodes, self.bus = server, nodes, bus


class StandIn:
    """Answers for nodes as long as it is open."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus, self._stack = bus, AsyncExitStack()

    async def __aenter__(self) -> StandIn:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def answer(
        self, action: str, *answers: Any, node: str | None = None, to: Callable[[bytes], None] | None = None
    ) -> None:
        """Whoever asks for *action* gets *answers*; *to* is told what was asked."""

        async def on_message(message: Message) -> None:
            if to is not None:
                to(message.data)
            for answer in answers:
                await self._bus.publish(message.reply, msgspec.json.encode(answer))

        subscription = await self._bus.subscribe(NAMES.database_subject("wiki", action, node), on_message)
        self._stack.push_async_callback(subscription.unsubscribe)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[NatsServer, Nodes, Path]]:
    """Two nodes of one platform."""
    with tempfile.TemporaryDirectory() as folder, NatsServer() as server:
        toml = Path(folder, "prod.toml")
        toml.write_text(TOML)
        with Nodes([*CLI, "run", str(toml)], server.urls, count=2) as nodes:
            yield server, nodes, Path(folder)


@pytest.fixture
async def platform(running: tuple[NatsServer, Nodes, Path]) -> AsyncIterator[Platform]:
    """The shared platform; wiki has the streams of a database, and the note that it has one."""
    server, nodes, folder = running
    nodes.start()
    for app in ("wiki", "shop"):
        await nodes.wait_for_active(app)
        await nodes.wait_for_standbys(app, 1)
    bus = await NatsBus.connect(NatsOptions(urls=(server.url(),)), name="stand-in", timeout=5)
    try:
        for make in (provision.wal_config, provision.objects_config):
            await provision.create_stream(bus, make(NAMES, "wiki", replicas=1))
        key = NAMES.key_subject(NAMES.platform_bucket, NAMES.database_key("wiki"))
        await bus.write(key, b"{}")
        yield Platform(server, nodes, bus, folder)
    finally:
        await bus.close()


@pytest.fixture
async def nodes(platform: Platform) -> AsyncIterator[StandIn]:
    """Who answers for the nodes."""
    async with StandIn(platform.bus) as stand_in:
        yield stand_in


# --- db status


async def test_db_status_shows_where_each_node_is(platform: Platform, nodes: StandIn) -> None:
    """Role, position, how far behind in records, time and bytes; what waits, and what was set aside."""
    await nodes.answer("status", *STATUS.values())
    shown = await platform.json("db", "status")
    assert [view["app"] for view in shown["databases"]] == ["wiki"], "an app without a database is not listed"
    found = {node["node"]: msgspec.convert(node, DbStatus) for node in shown["databases"][0]["nodes"]}
    assert found == STATUS
    text, _ = await platform.call("db", "status", "wiki")
    lines = text.splitlines()
    assert lines[0] == "wiki: log ends at 812, newest snapshot s-1"
    assert lines[2].split()[:4] == ["n1", "live", "812/790", "-"]
    assert "4 KiB wait for the log" in lines[2]
    assert lines[3].split()[:3] == ["n2", "following", "810/788"]
    assert "2 records, 12 ms, 8 KiB" in lines[3]
    assert "phalanx db diverged wiki" in lines[3]


async def test_db_status_names_nodes_that_do_not_answer(platform: Platform, nodes: StandIn) -> None:
    """A node that lives and is silent about its database is shown as silent."""
    await nodes.answer("status", STATUS["n1"])
    [view] = (await platform.json("db", "status", "wiki"))["databases"]
    assert view["silent"] == ["n2"]
    text, _ = await platform.call("db", "status", "wiki")
    assert text.splitlines()[-1].split()[:2] == ["n2", "silent"]


@pytest.mark.parametrize(
    "words",
    [
        ("db", "status"),
        ("db", "verify"),
        ("db", "diverged"),
        ("snapshot", "create"),
        ("snapshot", "list"),
        ("snapshot", "verify"),
        ("snapshot", "delete", "x"),
        ("snapshot", "restore", "--to", "x.db"),
    ],
)
async def test_apps_that_have_no_database_are_bad_input(platform: Platform, words: tuple[str, ...]) -> None:
    """An app without a database, and one that the platform does not have: one line, exit code 2."""
    group, action, *rest = words
    assert "has no database" in await platform.refused(group, action, "shop", *rest)
    assert "no such app" in await platform.refused(group, action, "nope", *rest)


# --- db verify


async def test_db_verify_compares_at_equal_positions(platform: Platform, nodes: StandIn) -> None:
    """The same fingerprint at the same position on all nodes is fine, exit code 0."""
    same = [DbVerified(node=n, ok=True, position=Position(9, 8), fingerprint="ab" * 32) for n in ("n1", "n2")]
    await nodes.answer("verify", *same)
    found = await platform.json("db", "verify", "wiki")
    assert (found["ok"], found["compared"], found["problems"]) == (True, ["n1", "n2"], [])
    text, _ = await platform.call("db", "verify", "wiki")
    assert text.splitlines()[-1] == "as it should be: n1, n2"


BAD = [
    ("different databases", (True, 9, "aa", ""), (True, 9, "bb", "")),
    ("n2: *** in database main ***", (True, 9, "aa", ""), (False, 9, "aa", "*** in database main ***")),
    ("n2: its database is damaged", (True, 9, "aa", ""), (False, 9, "aa", "")),
    ("n1 is not compared", (True, 9, "aa", ""), (True, 8, "aa", "")),
    ("n2: no replica yet", (True, 9, "aa", ""), (False, 0, "", "no replica yet")),
]


@pytest.mark.parametrize(("problem", "one", "other"), BAD)
async def test_db_verify_finds_what_is_wrong(
    platform: Platform, nodes: StandIn, problem: str, one: Any, other: Any
) -> None:
    """Differences, damage, and what could not be compared: exit code 1."""
    answers = [
        DbVerified(node=node, ok=ok, position=Position(sequence, 5), fingerprint=fingerprint, problem=said)
        for node, (ok, sequence, fingerprint, said) in (("n1", one), ("n2", other))
    ]
    await nodes.answer("verify", *answers)
    found = await platform.json("db", "verify", "wiki", code=1)
    assert not found["ok"]
    assert any(problem in each for each in found["problems"]), found["problems"]


async def test_db_verify_tries_again_while_there_are_writes(platform: Platform, nodes: StandIn) -> None:
    """Nodes that were looked at in different positions are looked at again."""
    sequence = 0

    async def on_message(message: Message) -> None:
        nonlocal sequence
        sequence += 1
        for node, position in (("n1", sequence), ("n2", max(2, sequence))):
            answer = DbVerified(node=node, ok=True, position=Position(position, 1), fingerprint="aa")
            await platform.bus.publish(message.reply, msgspec.json.encode(answer))

    subscription = await platform.bus.subscribe(NAMES.database_subject("wiki", "verify"), on_message)
    try:
        assert (await platform.json("db", "verify", "wiki"))["compared"] == ["n1", "n2"]
    finally:
        await subscription.unsubscribe()
    assert sequence == 2


async def test_db_verify_misses_a_silent_node(platform: Platform, nodes: StandIn) -> None:
    """A node that does not answer in time is a problem."""
    await nodes.answer("verify", DbVerified(node="n1", ok=True, position=Position(1, 1), fingerprint="aa"))
    found = await platform.json("db", "verify", "wiki", "--wait", "0.5", code=1)
    assert found["problems"] == ["node n2 does not answer"]
    assert "--wait" in await platform.refused("db", "verify", "wiki", "--wait", "0")


# --- db diverged


async def test_db_diverged_lists_what_was_set_aside(platform: Platform, nodes: StandIn) -> None:
    """Where it lies, of which epoch, how many transactions the log lacks."""
    await nodes.answer("diverged", [DIVERGED], [])
    shown = await platform.json("db", "diverged", "wiki")
    assert msgspec.convert(shown["files"], list[DivergedFile]) == [DIVERGED]
    text, _ = await platform.call("db", "diverged", "wiki")
    assert "unknown, at least 3" in text
    assert DIVERGED.file in text
    assert (await platform.json("db", "diverged", "wiki", "--node", "n2"))["files"] == shown["files"]


async def test_db_diverged_shows_the_difference(platform: Platform, nodes: StandIn) -> None:
    """With --diff the rows of each table that are only on one side; one that fails says why."""
    asked: list[DiffRequest] = []
    table = TableDifference(
        table="page", columns=("id", "t"), only_diverged=3, only_present=1, diverged_rows=(("7", None),)
    )
    answer = DbDifference(node="n2", file=DIVERGED.file, tables=(table,))
    await nodes.answer("diverged", [DIVERGED], [])
    await nodes.answer(
        "diff", answer, node="n2", to=lambda data: asked.append(msgspec.json.decode(data, type=DiffRequest))
    )
    text, _ = await platform.call("db", "diverged", "wiki", "--diff", "--rows", "1")
    assert asked == [DiffRequest(DIVERGED.file, 1)]
    assert "page: 3 rows only here, 1 only in the present database" in text
    assert ["only", "here", "7", "NULL"] in [line.split() for line in text.splitlines()]


async def test_db_diverged_bad_input_and_failures(platform: Platform, nodes: StandIn) -> None:
    """A node that is not there, a number of rows that is none; a comparison that fails is exit code 1."""
    await nodes.answer("diverged", [DIVERGED], [])
    await nodes.answer("status", *STATUS.values())
    await nodes.answer("diff", DbDifference(node="n2", file=DIVERGED.file, error="gone"), node="n2")
    assert "--node" in await platform.refused("db", "diverged", "wiki", "--node", "n9")
    assert "--rows" in await platform.refused("db", "diverged", "wiki", "--rows", "-1")
    assert (await platform.json("db", "diverged", "wiki", "--node", "n1"))["files"] == []
    shown = await platform.json("db", "diverged", "wiki", "--diff", code=1)
    assert "gone" in shown["differences"][0]["error"]


# --- snapshot create


async def test_snapshot_create_asks_a_standby_and_reports_progress(
    platform: Platform, nodes: StandIn
) -> None:
    """The standby makes it; each step is told, the name at the end."""
    asked: list[SnapshotRequest] = []
    steps = [SnapshotProgress(done_bytes=n, total_bytes=3) for n in range(3)]
    await nodes.answer("status", *STATUS.values())
    await nodes.answer(
        "snapshot",
        *steps,
        SnapshotProgress(done_bytes=3, total_bytes=3, name="s-2"),
        node="n2",
        to=lambda data: asked.append(msgspec.json.decode(data, type=SnapshotRequest)),
    )
    shown = await platform.json("snapshot", "create", "wiki")
    assert shown == {"app": "wiki", "name": "s-2"}
    assert "@" in asked[0].by
    told: list[int] = []
    async with PlatformClient("prod", NatsOptions(urls=(platform.server.url(),))) as client:
        made = await client.databases.create_snapshot(
            "wiki", on_progress=lambda step: told.append(step.done_bytes)
        )
    assert (made, told) == ("s-2", [0, 1, 2, 3])


async def test_snapshot_create_fails_with_the_reason(
    platform: Platform, nodes: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's own error; a node that is silent, from the start or in the middle; nobody who can."""
    await nodes.answer("snapshot", SnapshotProgress(error="no space left"), node="n1")
    assert "no space left" in await platform.refused("snapshot", "create", "wiki", "--node", "n1", code=1)
    assert "does not answer" in await platform.refused("snapshot", "create", "wiki", "--node", "n9", code=1)
    broken = [msgspec.structs.replace(status, role="broken") for status in STATUS.values()]
    await nodes.answer("status", *broken)
    assert "no node can" in await platform.refused("snapshot", "create", "wiki", code=1)
    await nodes.answer("snapshot", SnapshotProgress(done_bytes=1), node="n2")
    monkeypatch.setattr("phalanx.client_db.SILENT_SECONDS", 0.3)
    async with PlatformClient("prod", NatsOptions(urls=(platform.server.url(),))) as client:
        with pytest.raises(DatabaseError, match="stopped to answer"):
            await client.databases.create_snapshot("wiki", "n2")


async def test_snapshot_that_takes_long_is_waited_for_while_it_goes_on(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only silence is given up: every step that is told begins the wait anew."""
    monkeypatch.setattr("phalanx.client_db.SILENT_SECONDS", 0.5)

    async def on_message(message: Message) -> None:
        for number in range(6):
            await asyncio.sleep(0.2)
            step = SnapshotProgress(done_bytes=number, name="s-3" if number == 5 else "")
            await platform.bus.publish(message.reply, msgspec.json.encode(step))

    subscription = await platform.bus.subscribe(NAMES.database_subject("wiki", "snapshot", "n2"), on_message)
    try:
        async with PlatformClient("prod", NatsOptions(urls=(platform.server.url(),))) as client:
            assert await client.databases.create_snapshot("wiki", "n2") == "s-3"
    finally:
        await subscription.unsubscribe()


# --- restore in place


class Restorer:
    """What an activation does with a wish to restore, as the nodes' stand-in."""

    def __init__(self, bus: NatsBus, action: str, reason: str) -> None:
        self._bus, self._action, self._reason = bus, action, reason
        self.asked: list[RestoreRequest] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Restorer:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        bucket = NAMES.app_bucket("wiki")
        subject = NAMES.key_subject(bucket, RESTORE_KEY)
        while True:
            record = await self._bus.read(NAMES.bucket_stream(bucket), subject)
            if record is not None and not record.removed:
                self.asked.append(msgspec.json.decode(record.data, type=RestoreRequest))
                await self._bus.write(subject, headers={"KV-Operation": "DEL"})
                entry = AuditEntry(
                    id="x1",
                    time=0.0,
                    node="n1",
                    category="app",
                    action=self._action,
                    app="wiki",
                    reason=self._reason,
                )
                await self._bus.publish(NAMES.audit_subject("app", self._action), msgspec.json.encode(entry))
            await asyncio.sleep(0.02)


async def restore(platform: Platform, request: RestoreRequest, timeout: float = 20.0) -> Any:
    """A restore in place by the client."""
    async with PlatformClient("prod", NatsOptions(urls=(platform.server.url(),))) as client:
        return await client.databases.restore_in_place("wiki", request, timeout=timeout)


async def test_restore_in_place_waits_until_the_app_is_active_again(platform: Platform) -> None:
    """The wish is a key that the next activation takes away; the active node steps down for it."""
    before = platform.nodes.actives("wiki")[0]
    async with Restorer(platform.bus, RESTORED, "back at 500/480") as restorer:
        done = await restore(platform, RestoreRequest(position=500))
    assert restorer.asked[0].position == 500
    assert "@" in restorer.asked[0].by
    assert (done.app, done.reason) == ("wiki", "back at 500/480")
    assert done.node != before
    assert done.node == platform.nodes.actives("wiki")[0]


async def test_restore_in_place_that_fails_says_why(platform: Platform) -> None:
    """What the node says of it in the audit log is the error."""
    async with Restorer(platform.bus, RESTORE_FAILED, "snapshot s-1 is damaged"):
        with pytest.raises(DatabaseError, match="s-1 is damaged"):
            await restore(platform, RestoreRequest(snapshot="s-1"))


async def test_restore_in_place_that_nobody_does_is_called_off(platform: Platform) -> None:
    """After the deadline the key is gone: it does not strike at some later failover."""
    with pytest.raises(DatabaseError, match="called off"):
        await restore(platform, RestoreRequest(position=1), timeout=3)
    bucket = NAMES.app_bucket("wiki")
    key = await platform.bus.read(NAMES.bucket_stream(bucket), NAMES.key_subject(bucket, RESTORE_KEY))
    assert key is not None
    assert key.removed


async def test_restore_in_place_whose_client_is_killed_is_over_by_itself(platform: Platform) -> None:
    """Nobody has called it off: the key has a time of its own."""
    bucket = NAMES.app_bucket("wiki")
    subject = NAMES.key_subject(bucket, RESTORE_KEY)
    async with PlatformClient("prod", NatsOptions(urls=(platform.server.url(),))) as client:
        await client.databases._ask_for_restore("wiki", RestoreRequest(position=1), 2.0)
        deadline = system.now() + 20
        while not ((key := await platform.bus.read(NAMES.bucket_stream(bucket), subject)) and key.removed):
            assert system.now() < deadline
            await asyncio.sleep(0.05)


async def test_second_restore_in_place_at_a_time_is_refused(platform: Platform) -> None:
    """One at a time; the first one's key stays."""
    bucket = NAMES.app_bucket("wiki")
    subject = NAMES.key_subject(bucket, RESTORE_KEY)
    revision = await platform.bus.write(subject, b"{}")
    try:
        with pytest.raises(DatabaseError, match="under way"):
            await restore(platform, RestoreRequest(position=1))
        key = await platform.bus.read(NAMES.bucket_stream(bucket), subject)
        assert key is not None
        assert key.revision == revision
    finally:
        await platform.bus.write(subject, headers={"KV-Operation": "DEL"})


# --- phalanx dev


async def test_dev_refuses_one_file_for_all_nodes(platform: Platform) -> None:
    """An absolute path would be the same for all nodes: one line, and nothing is left."""
    folder = platform.folder / "dev"
    folder.mkdir()
    toml = folder / "dev.toml"
    toml.write_text(f'{TOML}\n[apps.mail]\npattern = "active-passive"\ndatabase = "{folder}/mail.db"\n')
    error = await platform.refused("dev", str(toml), "--data-dir", str(folder / "data"))
    assert "apps.mail.database.path" in error
    assert "relative" in error
    assert os.listdir(folder) == ["dev.toml"]

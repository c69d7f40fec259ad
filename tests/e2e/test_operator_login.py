"""The operator's login of ``phalanx nats permissions``: every command works, and no more than that does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from tests.e2e.cli import Cli

from phalanx.bus import permissions
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import Stage, stage

USERS = ("test-node", "test-viewer", "test-app-wiki", "test-operator")
API = "$JS.API"
FORBIDDEN = (
    "$KV.test_wiki.election.leader",
    "$KV.test_wiki.election.candidate.n1",
    "$KV.test_wiki.kv.x",
    "$KV.test_platform.identity",
    "$KV.test_platform.sessions",
    "$KV.test_platform.app.wiki",
    "$KV.test_platform.database.wiki",
    "test._.session.1.n1.abc",
    "test.wiki.wal.ltx",
    "test.wiki.wal.seal",
    "test.wiki.wal.claim",
    "test.wiki.fence.events",
    "test.wiki.dead.mailer.user.created",
    "$JS.ACK.test_wiki_events.mailer.1.1.1.0.0",
    f"{API}.CONSUMER.CREATE.test_wiki_events.mailer",
    f"{API}.CONSUMER.DELETE.test_wiki_events.mailer",
    f"{API}.STREAM.MSG.DELETE.test_wiki_events",
    f"{API}.STREAM.PURGE.test_wiki_events",
    f"{API}.STREAM.PURGE.test_dead",
    "test.wiki.db.confirm",
    "$O.test_wiki_snapshots.C.abc",
    *(
        f"{API}.STREAM.{what}.{stream}"
        for what in ("CREATE", "UPDATE", "DELETE", "MSG.DELETE", "SNAPSHOT", "RESTORE")
        for stream in ("KV_test_wiki", "KV_test_platform", "test_audit", "test_wiki_wal", "test_new")
    ),
    *(f"{API}.STREAM.PURGE.{stream}" for stream in ("KV_test_wiki", "test_wiki_wal", "test_sessions_1")),
    f"{API}.STREAM.LEADER.STEPDOWN.KV_test_wiki",
    f"{API}.CONSUMER.CREATE.KV_test_wiki",
    f"{API}.CONSUMER.DURABLE.CREATE.KV_test_wiki.x",
)
"""What nodes decide, and what only they store."""


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server with the configuration that is printed."""
    conf = permissions.render("test", ["wiki"], passwords={user: f"pw-{user}" for user in USERS})
    with NatsServer(extra=conf, system_user=False) as server:
        yield server


def url_of(server: NatsServer, user: str) -> str:
    """Where that user logs in."""
    return server.url().replace("://", f"://{user}:pw-{user}@")


@pytest.fixture
def running(tmp_path: Path, server: NatsServer) -> Iterator[Stage]:
    """Two nodes with a database each."""
    for node in ("n1", "n2"):
        (tmp_path / node).mkdir()
    database, urls = str(tmp_path / "{node}" / "wiki.db"), [url_of(server, "test-node")]
    with stage(tmp_path, server, count=2, urls=urls, database=database) as running:
        yield running


@pytest.fixture
def phalanx(tmp_path: Path, server: NatsServer) -> Cli:
    """The command line with the operator's login."""
    (tmp_path / "here").mkdir()
    return Cli(url_of(server, "test-operator"), tmp_path / "here", "test")


@pytest.mark.timeout(300)
async def test_operator_looks_pauses_and_plans(phalanx: Cli, running: Stage) -> None:
    """Whatever shows something; a pause and its end; a switchover that is planned and called off."""
    await running.settled()
    for look in (
        ("health",),
        ("why", "wiki"),
        ("db", "status"),
        ("db", "diverged", "wiki"),
        ("failover", "show"),
    ):
        await phalanx.call(*look)
    assert {node["node"] for node in (await phalanx.json("status"))["nodes"]} == {"n1", "n2"}
    await phalanx.call("pause", "wiki", "--reason", "a look")
    assert "paused" in (await phalanx.call("status"))[0]
    await phalanx.call("resume", "wiki")
    await phalanx.call("switchover", "wiki", "--at", "2099-01-01T00:00")
    await phalanx.call("switchover", "wiki", "--cancel")
    assert "resumed" in (await phalanx.call("audit"))[0]


@pytest.mark.timeout(300)
async def test_operator_makes_restores_and_deletes_snapshots(phalanx: Cli, running: Stage) -> None:
    """By the nodes, and by NATS alone; also in place, which the next active node does."""
    await running.settled()
    await phalanx.call("snapshot", "create", "wiki")
    await phalanx.call("snapshot", "create", "wiki")
    [first, *_, last] = (await phalanx.json("snapshot", "list", "wiki"))["snapshots"]
    await phalanx.call("snapshot", "verify", "wiki")
    await phalanx.call("snapshot", "restore", "wiki", "--to", "now.db")
    await phalanx.call("db", "verify", "wiki")
    await phalanx.call("snapshot", "restore", "wiki", "--position", str(last["txid"]), "--in-place", "--yes")
    await phalanx.call("snapshot", "delete", "wiki", first["name"])


@pytest.mark.timeout(300)
async def test_operator_moves_apps_fences_and_forgets(phalanx: Cli, running: Stage) -> None:
    """Planned and by force; a node that is off is confirmed, and taken off the list."""
    for move in (("switchover", "wiki"), ("stepdown", "wiki"), ("failover", "wiki", "--yes")):
        await running.nodes.wait_for_active("wiki")
        async with asyncio.timeout(60):
            # A node is a standby a moment before its offer to lead is in NATS.
            while "nobody could take over" in (outcome := await phalanx.run(*move))[2]:  # noqa: ASYNC110
                await asyncio.sleep(0.25)
        assert outcome[0] == 0, (move, outcome)
    active = await running.nodes.wait_for_active("wiki")
    await running.nodes.wait_for_standbys("wiki", 1)
    other = "n1" if active == "n2" else "n2"
    running.nodes[other].stop()
    for _ in range(60):  # of at least half a second each
        nodes = (await phalanx.json("status"))["nodes"]
        if not next(node["live"] for node in nodes if node["node"] == other):
            break
        await asyncio.sleep(0.25)
    await phalanx.call("fence", other, "--confirm-off")
    await phalanx.call("forget", other)
    assert [node["node"] for node in (await phalanx.json("status"))["nodes"]] == [active]
    assert "fence-confirmed" in (await phalanx.call("audit"))[0]


# --- what is refused


class Operator:
    """A plain client with the operator's login, who keeps what the server refuses."""

    def __init__(self, client: Client, refused: list[str]) -> None:
        self.client, self.refused = client, refused

    async def is_refused(self, subject: str) -> bool:
        """Whether the server says that this may not be sent."""
        self.refused.clear()
        try:
            answer = await self.client.request(subject, b"{}", timeout=0.3)
        except NatsError:
            return any("permissions violation for publish" in each.lower() for each in self.refused)
        raise AssertionError(f"{subject} is answered: {answer.data!r}")


@pytest.fixture
async def node(server: NatsServer) -> AsyncIterator[Client]:
    """A node's client, who has made an app's bucket and the platform's, and the audit log."""
    client = await nats.connect(url_of(server, "test-node"))
    for name, subjects in (
        ("KV_test_wiki", "$KV.test_wiki.>"),
        ("KV_test_platform", "$KV.test_platform.>"),
        ("test_audit", "test._.audit.>"),
    ):
        await ask(client, f"{API}.STREAM.CREATE.{name}", name=name, subjects=[subjects], allow_direct=True)
    yield client
    await client.close()


@pytest.fixture
async def operator(server: NatsServer, node: Client) -> AsyncIterator[Operator]:
    """The operator's client, beside the node's."""
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    client = await nats.connect(url_of(server, "test-operator"), error_cb=note)
    yield Operator(client, refused)
    await client.close()


async def ask(client: Client, subject: str, **request: Any) -> dict[str, Any]:
    """A request that must succeed."""
    answer = json.loads((await client.request(subject, json.dumps(request).encode())).data)
    assert "error" not in answer, answer
    return answer


async def test_what_nodes_decide_is_refused_to_the_operator_by_the_server(operator: Operator) -> None:
    """Leader keys, candidacies, sessions, logs, streams: each request is refused, and says so."""
    for subject in FORBIDDEN:
        assert await operator.is_refused(subject), subject


async def test_answers_to_the_operator_cannot_be_sent_where_he_may_not_write(
    operator: Operator, node: Client
) -> None:
    """As reply subject the server checks none: yet nothing is stored, and nothing done to a stream."""
    await ask(operator.client, "$KV.test_platform.pause.wiki")
    places = (
        "$KV.test_wiki.election.leader",
        "$KV.test_platform.identity",
        f"{API}.STREAM.DELETE.test_audit",
    )
    requests = (
        f"{API}.INFO",
        f"{API}.DIRECT.GET.KV_test_platform.$KV.test_platform.pause.wiki",
        "$KV.test_platform.pause.wiki",
        "test._.audit.a.b",
    )
    for place in places:
        for request in requests:
            await operator.client.publish(request, b"{}", reply=place)
    await ask(operator.client, f"{API}.INFO")  # all before it has been dealt with
    streams = (await ask(node, f"{API}.STREAM.NAMES"))["streams"]
    assert set(streams) == {"KV_test_wiki", "KV_test_platform", "test_audit"}
    assert (await ask(node, f"{API}.STREAM.INFO.KV_test_wiki"))["state"]["messages"] == 0
    found = await ask(node, f"{API}.STREAM.INFO.KV_test_platform", subjects_filter=">")
    assert set(found["state"]["subjects"]) == {"$KV.test_platform.pause.wiki"}

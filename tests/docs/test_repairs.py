"""What docs/operations.md says about databases whose log is gone is done here, on real nodes."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

from tests.docs.pages import ROOT
from tests.e2e.test_database import database_stage

from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.data.entries import SealKind
from phalanx.data.log import WalLog
from phalanx.data.reign import ADOPTS
from phalanx.names import Names
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import Nodes
from phalanx.testing.stage import since_now

NAMES = Names("test")


async def connect(nats: NatsServer) -> NatsBus:
    """A connection of our own."""
    return await NatsBus.connect(NatsOptions(urls=(nats.url(),)))


async def step_5(bus: NatsBus) -> None:
    """The commands under "Beginning a log anew", by the API that the `nats` command uses."""
    section = (ROOT / "docs" / "operations.md").read_text().partition("### Beginning a log anew\n")[2]
    commands = re.findall(
        r"^ *\$ nats (.*)$", section.partition("\n#")[0].replace("prod", "test"), re.MULTILINE
    )
    assert len(commands) == 3
    for command in commands:
        if found := re.fullmatch(r"stream rm (\S+)", command):
            await bus.api(f"STREAM.DELETE.{found[1]}", {})
        else:
            found = re.fullmatch(r"stream purge (\S+) --subject '(\S+)'", command)
            assert found, command
            await bus.api(f"STREAM.PURGE.{found[1]}", {"filter": found[2]})


def stop_all(nodes: Nodes, last: str) -> None:
    """Stop all nodes, that one at last, so that it has been active."""
    for node in [name for name in ("n1", "n2") if name != last] + [last]:
        nodes[node].terminate()
        nodes[node].wait(20)


async def test_log_is_begun_anew_with_the_database_of_one_node(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """The streams are gone, so nobody starts; after the steps all rows are there, and go on on two nodes."""
    bus = await connect(nats_server)
    with database_stage(tmp_path, nats_server, count=2, sync_every=5) as running:
        chosen = await running.settled()
        await running.wait_for("confirmed", 0.0)
        stop_all(running.nodes, chosen)
        written = [e.data["number"] for e in running.history.events("committed")]
        await step_5(bus)
        for node in ("n1", "n2"):
            folder = tmp_path / node
            (folder / ".wiki.db-phalanx").rename(folder / "old")
        [replica] = (tmp_path / chosen / "old").glob("gen-*/replica.db")
        with (
            contextlib.closing(sqlite3.connect(replica)) as source,
            contextlib.closing(sqlite3.connect(tmp_path / chosen / "wiki.db")) as target,
        ):
            source.backup(target)
        since = since_now()
        running.nodes[chosen].start()
        opened = await running.wait_for("opened", since, node=chosen)
        assert opened.data["number"] == max(written)
        running.nodes["n2" if chosen == "n1" else "n1"].start()
        await running.nodes.wait_for_standbys("wiki", 1)
        await running.wait_for("confirmed", opened.at)
        running.check()
    await bus.close()


async def test_only_copy_of_a_node_that_never_returns_is_given_up(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Nobody leads while another node has the only copy; after the step they begin without it."""
    bus = await connect(nats_server)
    for config in (
        provision.wal_config(NAMES, "wiki", replicas=1),
        provision.objects_config(NAMES, "wiki", replicas=1),
    ):
        await provision.create_stream(bus, config)
    await WalLog(bus, NAMES, "wiki").seal(1, "lost", SealKind.OPEN, ADOPTS)
    with database_stage(tmp_path, nats_server, count=2) as running:
        for node in ("n1", "n2"):
            await running.nodes.wait_until(
                lambda node=node: "node lost has the only copy" in str(running.nodes[node].status()),
                20,
                "nobody says who has it",
            )
        assert not running.nodes.actives("wiki")
        stop_all(running.nodes, "n2")
        await step_5(bus)
        for node in ("n1", "n2"):
            running.nodes[node].start()
        await running.wait_for("confirmed", 0.0)
        running.check()
    await bus.close()

"""Rings of real processes that are killed, frozen and cut off: G6, checked over what they write down."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from tests.waiting import until

from phalanx import system
from phalanx.testing.history import Event, History
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import Nodes
from phalanx.testing.ring_program import RING_PROGRAM, RingSettings, ring_violations


class Ring:
    """Nodes of one ring, and who owns what by their history."""

    def __init__(self, nodes: Nodes, history: History, partitions: int) -> None:
        self.nodes, self.history, self.partitions = nodes, history, partitions

    def counts(self) -> dict[str, int]:
        """How many partitions each node was the last to own."""
        owners = {event.data["partition"]: event.node for event in self.history.events("owned")}
        return {node: list(owners.values()).count(node) for node in sorted(set(owners.values()))}

    def violations(self) -> list[str]:
        """What contradicts G6 so far."""
        return ring_violations(self.history.events())


@contextmanager
def ring(url: str, tmp_path: Path, count: int, *, ttl: float = 2.0, **settings: object) -> Iterator[Ring]:
    """So many nodes, which share 32 partitions."""
    history = History(tmp_path / "history")
    made = RingSettings(history=str(history.path), ttl=ttl, partitions=32, **settings)  # type: ignore[arg-type]
    env = {"PHALANX_TEST": msgspec.json.encode(made).decode()}
    with Nodes(RING_PROGRAM, (url,), count=count, env=env) as nodes:
        yield Ring(nodes, history, 32)
    history.close()


@pytest.fixture
def nats_server_of_own() -> Iterator[NatsServer]:
    """One that the test may kill."""
    with NatsServer() as server:
        yield server


async def test_g6_killed_node_loses_its_partitions_at_once_and_a_returning_one_gets_its_share(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A crash is no timeout: the keeper ends the session, and the others take over long before the TTL."""
    with ring(nats_server.url(), tmp_path, 3, ttl=20.0) as made:
        await until(lambda: sorted(made.counts().values()) == [10, 11, 11])
        killed_at = system.now()
        made.nodes["n2"].kill()
        await until(lambda: made.counts() == {"n1": 16, "n3": 16})
        last = max(event.at for event in made.history.events("owned", since=killed_at))
        assert last - killed_at < 10.0
        made.nodes["n2"].start()
        await until(lambda: sorted(made.counts().values()) == [10, 11, 11])
        assert made.violations() == []


async def test_g6_frozen_node_is_killed_by_its_keeper_before_another_owns_its_partitions(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """As with an active section: what stands still past its deadline is killed, then taken over."""
    with ring(nats_server.url(), tmp_path, 2) as made:
        await until(lambda: made.counts() == {"n1": 16, "n2": 16})
        made.nodes["n1"].freeze()
        await until(lambda: made.counts() == {"n2": 32})
        assert not made.nodes["n1"].is_running
        assert made.violations() == []


async def test_g6_frozen_host_cannot_go_on_after_its_session(nats_server: NatsServer, tmp_path: Path) -> None:
    """Node and keeper frozen, and thawed when others own its partitions: it dies before it does anything."""
    with ring(nats_server.url(), tmp_path, 2) as made:
        await until(lambda: made.counts() == {"n1": 16, "n2": 16})
        made.nodes["n1"].freeze(keeper=True)
        await until(lambda: made.counts() == {"n2": 32})
        thawed_at = system.now()
        made.nodes["n1"].thaw(keeper=True)
        await until(lambda: not made.nodes["n1"].is_running)
        after = [e.kind for e in made.history.events(since=thawed_at) if e.node == "n1"]
        assert after == []
        assert made.violations() == []


async def test_g9_nats_is_away_longer_than_the_session_and_all_is_owned_again_under_new_epochs(
    nats_server_of_own: NatsServer, tmp_path: Path
) -> None:
    """Cut off, every node ends what it owns in time; with NATS back all is owned under new sessions."""
    server = nats_server_of_own
    with ring(server.url(), tmp_path, 2) as made:
        await until(lambda: made.counts() == {"n1": 16, "n2": 16})
        cut_at = system.now()
        server.kill()
        await until(lambda: len(made.history.events("release", since=cut_at)) == 32)
        server.start()
        back_at = system.now()

        def owned() -> set[int]:
            return {event.data["partition"] for event in made.history.events("owned", since=back_at)}

        await until(lambda: len(owned()) == 32)
        assert made.violations() == []


async def test_g10_sigterm_releases_every_partition_before_the_process_ends(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """on_release runs for each, and the other owns it afterwards."""
    with ring(nats_server.url(), tmp_path, 2) as made:
        await until(lambda: made.counts() == {"n1": 16, "n2": 16})
        asked_at = system.now()
        made.nodes["n1"].terminate()
        assert made.nodes["n1"].wait(30) == 0
        released = {e.data["partition"] for e in made.history.events("release", since=asked_at)}
        assert len(released) == 16
        await until(lambda: made.counts() == {"n2": 32})
        assert made.violations() == []


async def test_partitions_of_a_vanished_host_are_owned_only_after_it_was_fenced(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Node and keeper stand still: the fence command runs before anybody takes what they had."""
    marker = tmp_path / "fenced"
    clock = "import os, pathlib, time; time.sleep(1); now = str(time.clock_gettime(time.CLOCK_BOOTTIME))"
    script = f"{clock}; new = pathlib.Path({str(marker)!r}); new.with_suffix('.new').write_text(now)"
    command = [sys.executable, "-c", f"{script}; os.rename(new.with_suffix('.new'), new)"]
    with ring(nats_server.url(), tmp_path, 2, fence={"command": command}) as made:
        await until(lambda: made.counts() == {"n1": 16, "n2": 16})
        frozen_at = system.now()
        made.nodes["n1"].freeze(keeper=True)
        await until(marker.exists)
        assert [
            e for e in made.history.events("own", since=frozen_at) if e.at < float(marker.read_text())
        ] == []
        await until(lambda: made.counts() == {"n2": 32})
        assert "fence-done" in made.nodes["n2"].log()
        assert made.violations() == []


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        (Event(3, "answer", "n1", "r", 5, {"partition": 1}), "answer while it is owned by n2"),
        (Event(3, "own", "n3", "r", 6, {"partition": 1}), "begins after epoch 7"),
        (Event(3, "release", "n1", "r", 5, {"partition": 1}), "release while it is owned by n2"),
    ],
)
def test_checker_finds_a_second_owner(last: Event, problem: str) -> None:
    """What it must notice, it does."""
    events = [
        Event(1, "own", "n1", "r", 5, {"partition": 1}),
        Event(2, "own", "n2", "r", 7, {"partition": 1}),
    ]
    assert ring_violations(events) == []
    assert problem in ring_violations([*events, last])[0]

"""Pools in whole platforms: real nodes on a real server, killed and frozen for real."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.pool_node import APP

from phalanx import Any as AnyInstance
from phalanx import ConfigError, Leader, NatsOptions, Node, NoInstance, Platform, Pool, WrongRoute
from phalanx.client import PlatformClient
from phalanx.testing.history import History, sections
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.nodes import NodeProcess, Nodes
from phalanx.testing.stage import since_now

COMMAND = (sys.executable, "-m", "tests.e2e.pool_node")
ROOT = Path(__file__).parents[2]


class PoolStage:
    """The nodes of one pool, what they have written down, and which of them is ill."""

    def __init__(self, nodes: Nodes, url: str, history: History, ill: Path) -> None:
        self.nodes, self._url, self.history, self._ill = nodes, url, history, ill

    def actives(self) -> set[str]:
        """The nodes that say that they are active."""
        return set(self.nodes.actives(APP))

    async def wait_for(self, count: int, timeout: float = 30.0) -> set[str]:
        """Wait until *count* nodes are active; their names."""
        found: set[str] = set()

        def reached() -> bool:
            found.clear()
            found.update(self.actives())
            return len(found) == count

        await self.nodes.wait_until(reached, timeout, f"not {count} nodes are active")
        return found

    async def settled(self, count: int) -> set[str]:
        """All nodes take part, and *count* of them are active."""
        await self.nodes.wait_until(
            lambda: all(pool_of(node) is not None for node in self.nodes), 30, "not all nodes are there"
        )
        active = await self.wait_for(count)
        await self.nodes.wait_for_standbys(APP, len(self.nodes) - count)
        return active

    def make_ill(self, node: str) -> None:
        """Its check fails from now on; empty: nobody's does."""
        self._ill.write_text(node)

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[PlatformClient]:
        """A client of the platform."""
        async with PlatformClient("test", NatsOptions(urls=(self._url,))) as client:
            yield client

    def most_at_once(self, since: float = 0.0) -> int:
        """The most instances that were active at one moment, by their own word."""
        spans = [s for s in sections(self.history.events()) if s.end >= since]
        changes = sorted([(s.begin, 1) for s in spans] + [(s.end, -1) for s in spans])
        most = now = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        return most


def pool_of(node: NodeProcess) -> dict[str, Any] | None:
    """What *node* says of its part in the pool; None if it does not answer."""
    apps = node.status().get("apps", ()) if node.is_running else ()
    return next((app for app in apps if app["name"] == APP), None)


@contextmanager
def pool(
    tmp_path: Path, nats: NatsServer | NatsCluster, replicas: str, *, count: int = 3, backend: str = ""
) -> Generator[PoolStage]:
    """*count* nodes with a pool of *replicas*."""
    history, ill = History(tmp_path / "history"), tmp_path / "ill"
    env = {
        "POOL_HISTORY": str(history.path),
        "POOL_REPLICAS": replicas,
        "POOL_ILL": str(ill),
        "POOL_BACKEND": backend,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    }
    url = nats.url() if isinstance(nats, NatsServer) else nats.url(0)
    try:
        with Nodes(COMMAND, [url], count=count, env=env) as nodes:
            yield PoolStage(nodes, url, history, ill)
    finally:
        history.close()


async def test_g4_active_one_of_two_of_three_is_killed_and_the_third_becomes_active(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGKILL: its seat moves at once, the other goes on, and never more than two are active."""
    with pool(tmp_path, nats_server, "2") as s:
        active = sorted(await s.settled(2))
        spare = next(node.node for node in s.nodes if node.node not in active)
        killed = since_now()
        s.nodes[active[0]].kill()
        found = await s.wait_for(2)
        assert found == {active[1], spare}
        began = s.history.events("active", since=killed)
        assert [e.node for e in began] == [spare]
        assert began[0].at - killed < 5.0  # some ms; what is not at once is the TTL's 2.1 s and more
        s.nodes[active[0]].start()  # it comes back, and stands by
        await s.nodes.wait_for_standbys(APP, 1)
        assert s.actives() == {active[1], spare}
        assert s.most_at_once() == 2


async def test_pool_of_all_is_active_on_every_node_and_on_each_that_comes_back(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """One that stops gracefully or is killed leaves the others alone."""
    with pool(tmp_path, nats_server, "all") as s:
        await s.settled(3)
        s.nodes["n2"].terminate()
        assert s.nodes["n2"].wait(30) == 0
        assert await s.wait_for(2) == {"n1", "n3"}
        s.nodes["n3"].kill()
        assert await s.wait_for(1) == {"n1"}
        s.nodes.start()
        await s.wait_for(3)
        assert len({e.epoch for e in s.history.events("active")}) == 5
        assert [e.epoch for e in s.history.events("active") if e.node == "n1"] == [
            e.epoch for e in s.history.events("active")[:3] if e.node == "n1"
        ]


async def test_g10_active_one_that_stops_gives_its_seat_to_another(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGTERM: the next one begins after it has ended, and well before its session could expire."""
    with pool(tmp_path, nats_server, "1", count=2) as s:
        [active] = await s.settled(1)
        asked = since_now()
        s.nodes[active].terminate()
        [after] = await s.nodes.wait_until(
            lambda: found if (found := s.actives() - {active}) else None, 30, "nobody follows"
        )
        assert s.nodes[active].wait(30) == 0
        ended = s.history.events("passive", since=asked)
        began = s.history.events("active", since=asked)
        assert [e.node for e in ended] == [active]
        assert [e.node for e in began] == [after]
        assert began[0].at > ended[0].at
        assert began[0].epoch > ended[0].epoch
        assert s.most_at_once() == 1


async def test_pool_is_scaled_by_one_call_and_the_word_outlives_all_nodes(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Up, down, and back to what is declared; with too few nodes all are active."""
    with pool(tmp_path, nats_server, "1") as s:
        [first] = await s.settled(1)
        async with s.client() as client:
            done = await client.scale(APP, 2)
            assert (done.before, done.replicas) == (1, 2)
            assert first in await s.wait_for(2)
            # By their own word once each has written its next tick: they are active 5 ms before that.
            await s.nodes.wait_until(lambda: s.most_at_once() == 2, 30, "two were never active at once")
            await client.scale(APP, 5)
            await s.wait_for(3)
            down = since_now()
            await client.scale(APP, 2)
            await s.wait_for(2)
            assert [e.kind for e in s.history.events("active", "passive", since=down)] == ["passive"]
            for node in s.nodes:
                node.kill()
            s.nodes.start()
            await s.settled(2)
            said = pool_of(s.nodes["n1"])
            assert said is not None
            assert said["pool"]["replicas"] == 2
            assert said["pool"]["declared"] == 1
            assert said["pool"]["scaled_by"]
            done = await client.scale(APP, reset=True)
            assert done.is_reset
            await s.wait_for(1)
            scaled = [e for e in await client.audit(limit=1000) if e.action == "scaled"]
            assert [e.details["replicas"] for e in scaled] == ["2", "5", "2", "as declared"]


async def test_unhealthy_instance_is_replaced_and_comes_back_as_a_standby(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Its check fails: it steps aside, and its seat goes to a node that is well."""
    with pool(tmp_path, nats_server, "2") as s:
        active = sorted(await s.settled(2))
        spare = next(node.node for node in s.nodes if node.node not in active)
        s.make_ill(active[0])
        await s.nodes.wait_until(lambda: s.actives() == {active[1], spare}, 30, "it is not replaced")
        s.make_ill("")
        await s.nodes.wait_for_standbys(APP, 1)
        assert s.actives() == {active[1], spare}
        assert s.most_at_once() == 2


async def test_calls_reach_only_instances_that_are_ready_and_none_is_lost_meanwhile(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A steady stream through illness, scaling, a graceful stop: every call is answered, by an active one."""
    with pool(tmp_path, nats_server, "2") as s:
        active = sorted(await s.settled(2))
        async with s.client() as client:
            api = client.api(APP)
            answers: list[str] = []
            done = asyncio.Event()

            async def call() -> None:
                while not done.is_set():
                    answers.append(await api.call("who", timeout=20.0))

            async with asyncio.TaskGroup() as calling:
                for _ in range(4):
                    calling.create_task(call())
                await s.nodes.wait_until(lambda: set(answers) == set(active), 30, "one of them gets no calls")
                s.make_ill(active[0])
                await s.nodes.wait_until(lambda: active[0] not in s.actives(), 30, "it stays active")
                await s.wait_for(2)
                await client.scale(APP, 1)
                await s.wait_for(1)
                s.make_ill("")
                await client.scale(APP, 2)
                after = await s.wait_for(2)
                s.nodes[sorted(after)[0]].terminate()
                s.nodes[sorted(after)[0]].wait(30)
                await s.wait_for(2)
                done.set()
        spans = sections(s.history.events())
        for answered in s.history.events("call"):
            assert any(
                span.node == answered.node and span.begin <= answered.at <= span.end + 0.1 for span in spans
            )
        assert len(answers) > 50


async def test_routes_of_a_pool_are_any_instance_and_a_node_that_is_active(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Nobody leads; a node that stands by says so; where no instance is ready the deadline tells."""
    with pool(tmp_path, nats_server, "1", count=2) as s:
        [active] = await s.settled(1)
        standby = next(node.node for node in s.nodes if node.node != active)
        async with s.client() as client:
            api = client.api(APP)
            assert await api.call("who", timeout=20.0) == active
            assert await api.call("who", to=AnyInstance, timeout=20.0) == active
            assert await api.call("who", to=Node(active), timeout=20.0) == active
            with pytest.raises(WrongRoute, match="is a pool, which has no leader"):
                await api.call("who", to=Leader, timeout=20.0)
            with pytest.raises(WrongRoute, match=f"node {standby} is no active instance"):
                await api.call("who", to=Node(standby), timeout=20.0)
            await client.scale(APP, 0)
            await s.wait_for(0)
            with pytest.raises(NoInstance):
                await api.call("who", timeout=1.0)


async def test_g9_nats_is_lost_and_every_instance_ends_in_time(tmp_path: Path) -> None:
    """Each by itself; all are active again when it returns."""
    with NatsServer() as nats, pool(tmp_path, nats, "2") as s:
        await s.settled(2)
        stopped = since_now()
        nats.kill(0)
        await s.wait_for(0)
        last = max(e.at for e in s.history.events("tick", "passive"))
        assert last - stopped < 2.0 * 0.95 + 0.1
        nats.start(0)
        await s.wait_for(2)
        assert s.most_at_once() == 2


async def test_g1_frozen_instance_is_killed_by_its_keeper_before_another_begins(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGSTOP: never more than two are active, also when it is continued."""
    with pool(tmp_path, nats_server, "2") as s:
        active = sorted(await s.settled(2))
        frozen = since_now()
        s.nodes[active[0]].freeze()
        await s.nodes.wait_until(
            lambda: s.history.events("active", since=frozen), 30, "nobody takes its place"
        )
        s.nodes[active[0]].thaw()
        assert s.nodes[active[0]].wait(30) == -9
        await s.wait_for(2)
        assert [e for e in s.history.events("tick", since=frozen) if e.node == active[0]] == []
        assert s.most_at_once() == 2


async def test_programs_of_a_pool_run_on_its_active_nodes_and_are_restarted_in_place(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A backend that ends is started again under the same epoch; one of a killed node ends with it."""
    with pool(tmp_path, nats_server, "2", backend="sleep 1000") as s:
        active = sorted(await s.settled(2))
        spare = next(node.node for node in s.nodes if node.node not in active)
        said = pool_of(s.nodes[active[0]])
        assert said is not None
        pid = int(said["program"]["what"].removeprefix("process "))
        os.kill(pid, signal.SIGKILL)
        await s.nodes.wait_until(lambda: _restarts(s.nodes[active[0]]) == 1, 30, "it is not restarted")
        again = pool_of(s.nodes[active[0]])
        assert again is not None
        assert again["epoch"] == said["epoch"]
        s.nodes[active[0]].kill()
        assert await s.wait_for(2) == {active[1], spare}
        assert s.most_at_once() == 2


def _restarts(node: NodeProcess) -> int:
    said = pool_of(node)
    return said["program"]["restarts"] if said is not None and said["program"] is not None else -1


async def test_in_a_pause_nothing_of_a_pool_changes_hands(nats_server: NatsServer, tmp_path: Path) -> None:
    """Scaled, and ill: both count when it is resumed."""
    with pool(tmp_path, nats_server, "1", count=2) as s:
        [active] = await s.settled(1)
        async with s.client() as client:
            await client.pause(APP, reason="maintenance")
            await client.scale(APP, 2)
            s.make_ill(active)
            await s.nodes.wait_until(
                lambda: (pool_of(s.nodes[active]) or {}).get("health") == "unhealthy", 30, "it is well"
            )
            await asyncio.sleep(0.5)
            assert s.actives() == {active}
            s.make_ill("")
            await client.resume(APP)
            await s.wait_for(2)


async def test_pool_with_what_only_one_can_have_is_refused() -> None:
    """A database, an address: each with what to do instead."""
    platform: Any = Platform("test", node="n1", nats="nats://127.0.0.1:4222", data_dir="/nonexistent/x")
    for options, remedy in (
        ({"database": "x.db"}, "ActivePassive"),
        ({"vip": "10.0.0.9/24"}, "load balancer"),
    ):
        with pytest.raises(ConfigError, match="several active instances") as caught:
            platform.app("workers", Pool(replicas=2), **options)
        assert remedy in caught.value.remedy
    with pytest.raises(ConfigError, match="out of range"):
        platform.app("workers", Pool(replicas=2000))

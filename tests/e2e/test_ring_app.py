"""Ring apps in whole platforms: declared, owned, handed over, ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any as Value

import msgspec
import pytest
from tests.e2e.cli import Cli
from tests.waiting import until

from phalanx import (
    Any,
    CallContext,
    ConfigError,
    FunctionCheck,
    Key,
    Leader,
    Node,
    PartitionContext,
    Platform,
    PrepareContext,
    Ring,
    RingApp,
    Role,
    UnknownMethod,
    WrongRoute,
    partition_of,
)
from phalanx.testing.nats import NatsServer


class Seen(msgspec.Struct, frozen=True):
    """Who has answered a call, for which partition, under which epoch."""

    node: str
    partition: int
    epoch: int


class Shares:
    """Who has which partition, over all nodes of a test: two at once are noted as a clash."""

    def __init__(self) -> None:
        self.owners: dict[int, str] = {}
        self.epochs: dict[int, int] = {}
        self.clashes: list[str] = []

    def declare(self, app: RingApp, node: str) -> None:
        """Give *app* hooks that keep this up to date."""

        @app.on_own
        async def own(partition: int, ctx: PartitionContext) -> None:  # pyright: ignore[reportUnusedFunction]
            if partition in self.owners:
                self.clashes.append(f"{node} owns {partition}, which {self.owners[partition]} has")
            if ctx.epoch <= self.epochs.get(partition, 0):
                self.clashes.append(f"{node} owns {partition} under epoch {ctx.epoch} again")
            self.owners[partition], self.epochs[partition] = node, ctx.epoch

        @app.on_release
        async def release(partition: int, ctx: PartitionContext) -> None:  # pyright: ignore[reportUnusedFunction]
            del self.owners[partition]

        @app.handle("where", idempotent=True)
        async def where(key: str, ctx: CallContext) -> Seen:  # pyright: ignore[reportUnusedFunction]
            assert ctx.partition is not None
            await ctx.kv.put("last", key)
            return Seen(ctx.node, ctx.partition, ctx.epoch)

        @app.handle("who", anywhere=True)
        async def who(ctx: CallContext) -> str:  # pyright: ignore[reportUnusedFunction]
            return ctx.node

    def counts(self) -> dict[str, int]:
        """How many each node has."""
        found: dict[str, int] = {}
        for node in self.owners.values():
            found[node] = found.get(node, 0) + 1
        return found


def platform_of(url: str, tmp_path: Path, node: str, **options: Value) -> Platform:
    """One node of the platform "test"."""
    return Platform(
        "test",
        node=node,
        nats=url,
        data_dir=str(tmp_path / node),
        http={"enabled": False},
        timings={"ttl": 3.0},
        **options,
    )


@asynccontextmanager
async def ring_node(
    url: str,
    tmp_path: Path,
    node: str,
    shares: Shares,
    partitions: int = 16,
    app_options: dict[str, Value] | None = None,
    **options: Value,
) -> AsyncIterator[RingApp]:
    """One node with the ring "sessions", in this process."""
    platform = platform_of(url, tmp_path, node)
    app = platform.app(
        "sessions", Ring(partitions=partitions, settle="100ms", **options), **(app_options or {})
    )
    shares.declare(app, node)
    async with platform:
        yield app


async def test_g6_two_nodes_share_a_ring_and_one_that_stops_gives_all_back(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Balanced; on a graceful stop every partition is released first, and then owned by the other."""
    shares, url = Shares(), nats_server.url()
    async with ring_node(url, tmp_path, "n1", shares) as one:
        await until(lambda: shares.counts() == {"n1": 16})
        await until(lambda: one.partitions == tuple(range(16)))
        async with ring_node(url, tmp_path, "n2", shares) as two:
            await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
            await until(lambda: {*one.partitions, *two.partitions} == set(range(16)))
            key = next(str(n) for n in range(100) if two.partition_of(str(n)) in two.partitions)
            await until(lambda: one.owner_of(key) == "n2")
        await until(lambda: shares.counts() == {"n1": 16})
    assert shares.owners == {}
    assert shares.clashes == []


async def test_node_with_another_number_of_partitions_does_not_start(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A ConfigError that says which number it must be, before anything of it begins."""
    shares, url = Shares(), nats_server.url()
    async with ring_node(url, tmp_path, "n1", shares, partitions=8):
        await until(lambda: shares.counts() == {"n1": 8})
        with pytest.raises(ConfigError, match="has 8 partitions") as caught:
            async with ring_node(url, tmp_path, "n2", shares, partitions=16):
                pass
        assert caught.value.key == "apps.sessions.pattern.partitions"
        assert shares.counts() == {"n1": 8}
        await asyncio.sleep(0)


async def test_call_to_a_key_is_answered_by_its_owner_under_the_partitions_epoch(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """From a node, from a client, with the partition and a fenced KV in the handler's context."""
    shares, url = Shares(), nats_server.url()
    async with (
        ring_node(url, tmp_path, "n1", shares) as one,
        ring_node(url, tmp_path, "n2", shares),
        Platform.client("test", url) as client,
    ):
        await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
        api = client.api("sessions")
        for number in range(40):
            key = f"customer-{number}"
            partition = partition_of(key, 16)
            seen = await api.call("where", key, returns=Seen, to=Key(key), timeout=20)
            assert seen == Seen(shares.owners[partition], partition, shares.epochs[partition])
            assert one.owner_of(key) == seen.node
        assert one.kv is not None
        entry = await one.kv.get("last", str)
        assert entry is not None
        assert entry.value == "customer-39"


async def test_call_to_a_key_waits_while_its_partition_changes_hands(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """None fails while a node comes and goes, and each is answered under the newest epoch."""
    shares, url = Shares(), nats_server.url()
    async with ring_node(url, tmp_path, "n1", shares), Platform.client("test", url) as client:
        api, answers, stopped = client.api("sessions"), list[Seen](), asyncio.Event()

        async def call(key: str) -> None:
            while not stopped.is_set():
                answers.append(await api.call("where", key, returns=Seen, to=Key(key), timeout=20))

        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(call(f"customer-{number}"))
            for _ in range(3):
                async with ring_node(url, tmp_path, "n2", shares):
                    await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
                await until(lambda: shares.counts() == {"n1": 16})
            stopped.set()
        assert {seen.node for seen in answers} == {"n1", "n2"}
        newest: dict[int, int] = {}
        for seen in answers:
            assert seen.epoch >= newest.get(seen.partition, 0)
            newest[seen.partition] = seen.epoch
        assert shares.clashes == []


async def test_call_by_another_route_than_the_apps_is_refused_with_the_right_one(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A ring has no leader, other apps have no owners of keys, and only methods declared so run anywhere."""
    shares, url = Shares(), nats_server.url()
    platform = platform_of(url, tmp_path, "n0")
    wiki = platform.app("wiki")

    @wiki.handle("read")
    async def read(ctx: CallContext) -> str:  # pyright: ignore[reportUnusedFunction]
        return ctx.node

    async with platform, ring_node(url, tmp_path, "n1", shares), Platform.client("test", url) as client:
        await until(lambda: shares.counts() == {"n1": 16})
        sessions = client.api("sessions")
        for route in ({}, {"to": Leader}):
            with pytest.raises(WrongRoute, match="to=Key"):
                await sessions.call("where", "a", timeout=20, **route)
        for route in (Any, Node("n1")):
            with pytest.raises(WrongRoute, match="to=Key"):
                await sessions.call("where", "a", to=route, timeout=20)
            assert await sessions.call("who", to=route, timeout=20) == "n1"
        with pytest.raises(WrongRoute, match="is no ring"):
            await client.api("wiki").call("read", to=Key("a"), timeout=20)
        with pytest.raises(UnknownMethod):
            await sessions.call("nonsense", to=Key("a"), timeout=20)
        with pytest.raises(ConfigError, match="text or bytes"):
            Key(7)  # type: ignore[arg-type]


async def test_operator_sees_a_ring_and_is_refused_what_it_cannot_do(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """ring show, status, health, why and call --to key: know it; nothing of it can be handed over."""
    shares, url = Shares(), nats_server.url()
    cli = Cli(url, tmp_path, "test")
    wiki = platform_of(url, tmp_path, "n0")
    wiki.app("wiki")
    async with wiki, ring_node(url, tmp_path, "n1", shares), ring_node(url, tmp_path, "n2", shares, weight=3):
        await until(lambda: shares.counts() == {"n1": 4, "n2": 12})
        await until(lambda: wiki.apps["wiki"].is_active)
        found = await cli.json("ring", "show", "sessions")
        nodes = {each["node"]: each for each in found["nodes"]}
        assert [nodes[n]["owned"] for n in ("n1", "n2")] == [4, 12]
        assert [nodes[n]["share"] for n in ("n1", "n2")] == [4.0, 12.0]
        assert (found["moving"], found["unowned"], found["warnings"]) == (0, 0, [])
        shown, _ = await cli.call("ring", "show", "sessions", "--key", "customer-42")
        assert f"partition {partition_of('customer-42', 16)}" in shown
        status = await cli.json("status")
        rows = {
            each["node"]: each["ring"]["owned"]
            for app in status["apps"]
            for each in app["nodes"]
            if each["ring"]
        }
        assert rows == {"n1": 4, "n2": 12}
        assert "12 of 16 partitions" in (await cli.call("status"))[0]
        assert (await cli.json("health"))["reasons"] == []
        assert "n2 owns 12" in (await cli.call("why", "sessions"))[0]
        answer, _ = await cli.call("call", "sessions", "where", '"a"', "--to", "key:a")
        assert json.loads(answer)["node"] == shares.owners[partition_of("a", 16)]
        for command in (["stepdown"], ["switchover"], ["failover", "--yes"]):
            assert "it is a ring" in await cli.refused(*command, "sessions")
        assert "no ring" in await cli.refused("ring", "show", "wiki")
        assert "no such app" in await cli.refused("ring", "show", "nobody")


async def test_paused_ring_changes_no_hands(nats_server: NatsServer, tmp_path: Path) -> None:
    """A node that comes is given nothing until the pause is over."""
    shares, url = Shares(), nats_server.url()
    async with ring_node(url, tmp_path, "n1", shares) as one, Platform.client("test", url) as client:
        await until(lambda: shares.counts() == {"n1": 16})
        await client.pause("sessions")
        await until(lambda: one.is_paused)
        async with ring_node(url, tmp_path, "n2", shares) as two:
            await until(lambda: two.is_paused and two.role is Role.STANDBY)
            await asyncio.sleep(1.0)  # ten times what it takes without the pause: nothing is to happen
            assert shares.counts() == {"n1": 16}
            await client.resume("sessions")
            await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
        assert shares.clashes == []


async def test_node_whose_checks_fail_gives_its_partitions_away_and_gets_them_back(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Ill it is planned out at once; well again it is planned in."""
    shares, url, well = Shares(), nats_server.url(), [True]
    checks = [FunctionCheck(lambda: well[0], name="well", interval="50ms", failures=1)]
    async with (
        ring_node(url, tmp_path, "n1", shares),
        ring_node(url, tmp_path, "n2", shares, app_options={"checks": checks}) as two,
    ):
        await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
        well[0] = False
        await until(lambda: shares.counts() == {"n1": 16})
        assert "unhealthy" in two.status().reason
        well[0] = True
        await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
        assert shares.clashes == []


async def test_next_owner_prepares_before_the_present_one_releases(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Each partition that changes hands in order: prepare there, then release here, then own there; a prepare
    that fails is reported and holds nothing up."""
    shares, url, lines = Shares(), nats_server.url(), list[tuple[str, str, int]]()
    platforms = {node: platform_of(url, tmp_path, node) for node in ("n1", "n2")}
    for node, platform in platforms.items():
        app = platform.app("sessions", Ring(partitions=8, settle="100ms"))

        @app.on_prepare
        async def prepare(partition: int, ctx: PrepareContext, node: str = node) -> None:
            lines.append(("prepare", node, partition))
            if partition % 2:
                raise RuntimeError("cannot")

        @app.on_own
        async def own(partition: int, ctx: PartitionContext, node: str = node) -> None:
            lines.append(("own", node, partition))
            shares.owners[partition] = node

        @app.on_release
        async def release(partition: int, ctx: PartitionContext, node: str = node) -> None:
            lines.append(("release", node, partition))
            shares.owners.pop(partition, None)

    async with platforms["n1"]:
        await until(lambda: shares.counts() == {"n1": 8})
        async with platforms["n2"]:
            await until(lambda: shares.counts() == {"n1": 4, "n2": 4})
            moved = [partition for partition, node in shares.owners.items() if node == "n2"]
            lines_there = [line for line in lines if line[2] in moved]
            for partition in moved:
                mine = [line[:2] for line in lines_there if line[2] == partition]
                assert mine == [("own", "n1"), ("prepare", "n2"), ("release", "n1"), ("own", "n2")]
            lines.clear()
        await until(lambda: shares.counts() == {"n1": 8})
        for partition in moved:  # a node that stops is waited for, too
            mine = [line[:2] for line in lines if line[2] == partition]
            assert mine == [("prepare", "n1"), ("release", "n2"), ("own", "n1")]

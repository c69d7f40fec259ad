"""Ring apps in whole platforms: declared, owned, handed over, ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from phalanx import ConfigError, PartitionContext, Platform, Ring, RingApp
from phalanx.testing.nats import NatsServer


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

    def counts(self) -> dict[str, int]:
        """How many each node has."""
        found: dict[str, int] = {}
        for node in self.owners.values():
            found[node] = found.get(node, 0) + 1
        return found


def platform_of(url: str, tmp_path: Path, node: str, **options: Any) -> Platform:
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
    url: str, tmp_path: Path, node: str, shares: Shares, partitions: int = 16, **options: Any
) -> AsyncIterator[RingApp]:
    """One node with the ring "sessions", in this process."""
    platform = platform_of(url, tmp_path, node)
    app = platform.app("sessions", Ring(partitions=partitions, settle="100ms", **options))
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
        assert one.partitions == tuple(range(16))
        async with ring_node(url, tmp_path, "n2", shares) as two:
            await until(lambda: shares.counts() == {"n1": 8, "n2": 8})
            assert set(one.partitions) | set(two.partitions) == set(range(16))
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

"""A ring on a real server: nodes with real registers, in this process, that share its partitions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.e2e.sessions import NAMES, TimedHeartbeat, connected, registered
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.coord.register import Register
from phalanx.coord.ring import RingPartitions
from phalanx.errors import ConfigError, WrongRevision
from phalanx.ports import Fence
from phalanx.testing.nats import NatsServer

BUCKET = NAMES.app_bucket("sessions")


class Node:
    """One node: what it owns, and what all of them together have seen of each partition."""

    def __init__(
        self, bus: NatsBus, session: TimedHeartbeat, register: Register, owners: dict[int, Any]
    ) -> None:
        self.bus, self.session, self.register, self.owners = bus, session, register, owners
        self.fences: dict[int, Fence] = {}
        self.clashes: list[str] = []
        self.ring: RingPartitions
        self.task: asyncio.Task[None]
        self.tasks: set[asyncio.Task[None]] = set()
        self.end_takes = 0.0

    def begin(self, partition: int, fence: Fence) -> None:
        """G6: nobody else owns it."""
        if partition in self.owners:
            self.clashes.append(f"{self.session.id} begins with {partition}, {self.owners[partition]} has it")
        self.owners[partition] = self.session.id
        self.fences[partition] = fence

    def end(self, partition: int, reason: str, hard: bool) -> None:
        """What runs of it takes its time to end."""
        task = asyncio.create_task(self._end(partition))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _end(self, partition: int) -> None:
        await asyncio.sleep(self.end_takes)
        if self.fences.pop(partition, None) is not None:
            del self.owners[partition]
            self.ring.ended(partition)

    async def die(self) -> None:
        """The process is killed: nothing of it runs any more, then its keeper ends its session."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        for partition in self.fences:
            del self.owners[partition]
        self.fences.clear()
        await self.session.end()


@asynccontextmanager
async def node(
    name: str, url: str, owners: dict[int, Any], *, partitions: int = 256, weight: int = 1
) -> AsyncGenerator[Node]:
    """One node that takes part; at the end it gives back what it has."""
    async with connected(name, (url,)) as bus:
        await create_stream(bus, bucket_config(NAMES, BUCKET, "sessions", history=1, replicas=1))
        session = TimedHeartbeat(bus, name)
        async with registered(bus, session) as register:
            made = Node(bus, session, register, owners)
            made.ring = RingPartitions(
                bus,
                NAMES,
                "sessions",
                session,
                register,
                partitions,
                on_begin=made.begin,
                on_end=made.end,
                settle_seconds=0.2,
            )
            made.ring.offer(ready=True, weight=weight)
            made.task = asyncio.create_task(made.ring.run())
            try:
                yield made
            finally:
                made.task.cancel()
                await asyncio.gather(made.task, *made.tasks, return_exceptions=True)


def counts(owners: dict[int, Any]) -> dict[str, int]:
    """How many partitions each node owns."""
    return dict(Counter(session.node for session in owners.values()))


async def test_g6_three_nodes_share_256_partitions_and_a_killed_ones_are_all_owned_again(
    nats_server: NatsServer,
) -> None:
    """Balanced; only what has lost its owner moves; the newcomer gets its share, release then own."""
    owners: dict[int, Any] = {}
    url = nats_server.url()
    async with node("a", url, owners) as a, node("b", url, owners) as b, node("c", url, owners) as c:
        await until(lambda: counts(owners) == {"a": 86, "b": 85, "c": 85})
        before = {partition: session.node for partition, session in owners.items()}
        await c.die()
        await until(lambda: counts(owners) == {"a": 128, "b": 128})
        kept = [p for p, node in before.items() if node != "c"]
        assert all(owners[p].node == before[p] for p in kept)
        a.end_takes = b.end_takes = 0.05
        async with node("d", url, owners) as d:
            await until(lambda: counts(owners) == {"a": 86, "b": 85, "d": 85})
            assert [a.clashes, b.clashes, c.clashes, d.clashes] == [[]] * 4
            every = {p: fence.revision for each in (a, b, d) for p, fence in each.fences.items()}
            await until(lambda: {p: d.ring.owner(p)[0] for p in range(256)} == every)


async def test_g6_write_under_an_epoch_that_is_over_is_refused_by_the_server(nats_server: NatsServer) -> None:
    """The owner's writes are fenced by its partition's key; once another owns it they are refused."""
    owners: dict[int, Any] = {}
    url, subject = nats_server.url(), NAMES.key_subject(BUCKET, "kv.count")
    async with node("a", url, owners, partitions=4) as a:
        await until(lambda: len(a.fences) == 4)
        fence = a.fences[2]
        await a.bus.write(subject, b"1", fence=fence)
        await a.die()
        async with node("b", url, owners, partitions=4) as b:
            await until(lambda: len(b.fences) == 4)
            assert b.fences[2].revision > fence.revision
            with pytest.raises(WrongRevision):
                await a.bus.write(subject, b"2", fence=fence)
            await b.bus.write(subject, b"3", fence=b.fences[2])


async def test_node_that_leaves_a_ring_gives_all_back_and_the_other_takes_it(nats_server: NatsServer) -> None:
    """Gracefully, at once: nobody waits for its session to expire."""
    owners: dict[int, Any] = {}
    url = nats_server.url()
    async with node("a", url, owners, partitions=32) as a, node("b", url, owners, partitions=32) as b:
        await until(lambda: counts(owners) == {"a": 16, "b": 16})
        a.end_takes = 0.02
        assert await a.ring.leave(30.0)
        assert a.ring.held == []
        assert a.session.is_valid
        await until(lambda: counts(owners) == {"b": 32})
        assert a.clashes == b.clashes == []


async def test_weight_of_a_ring_node_can_change_while_it_runs(nats_server: NatsServer) -> None:
    """Three times the weight, three times the partitions."""
    owners: dict[int, Any] = {}
    url = nats_server.url()
    async with node("a", url, owners, partitions=32) as a, node("b", url, owners, partitions=32):
        await until(lambda: counts(owners) == {"a": 16, "b": 16})
        a.ring.offer(ready=True, weight=3)
        await until(lambda: counts(owners) == {"a": 24, "b": 8})
        a.ring.offer(ready=False, reason="ill")
        await until(lambda: counts(owners) == {"b": 32})


async def test_other_number_of_partitions_on_a_live_ring_is_refused(nats_server: NatsServer) -> None:
    """Data lies by the number of partitions: the node that declares another one says which it must be."""
    owners: dict[int, Any] = {}
    url = nats_server.url()
    async with node("a", url, owners, partitions=8):
        await until(lambda: counts(owners) == {"a": 8})
        async with node("b", url, owners, partitions=16) as b:
            with pytest.raises(ConfigError, match="has 8 partitions"):
                async with asyncio.timeout(30):
                    await b.task

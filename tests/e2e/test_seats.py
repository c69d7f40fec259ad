"""The seats of a pool on a real server: nodes with real registers, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
import pytest
from tests.e2e.sessions import NAMES, TimedHeartbeat, connected, registered
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.coord.election import Reign
from phalanx.coord.seats import Seats
from phalanx.decide.pool import PoolScale
from phalanx.decide.ring_ownership import PartitionBody
from phalanx.errors import ConfigError, WrongRevision
from phalanx.names import POOL_SCALE_KEY
from phalanx.testing.nats import NatsServer
from phalanx.types import SessionId

APP = "workers"
BUCKET = NAMES.app_bucket(APP)


class Node:
    """One node, and what all of them together see: who is active, and the most that ever were."""

    def __init__(
        self, bus: NatsBus, session: TimedHeartbeat, active: set[SessionId], most: list[int]
    ) -> None:
        self.bus, self.session, self.active, self.most = bus, session, active, most
        self.seats: Seats
        self.reign: Reign | None = None
        self.task: asyncio.Task[None]
        self.working: asyncio.Task[None]

    async def work(self) -> None:
        """One section after the other."""
        while True:
            reign = self.reign = await self.seats.next_reign()
            self.active.add(self.session.id)
            self.most.append(len(self.active))
            await reign.ending.wait()
            await asyncio.sleep(0.02)
            self.active.discard(self.session.id)
            self.reign = None
            await self.seats.release(reign, reign.reason)

    async def die(self) -> None:
        """The process is killed: nothing of it runs any more, then its keeper ends its session."""
        await self.stop()
        self.active.discard(self.session.id)
        await self.session.end()

    async def stop(self) -> None:
        """Let go of its tasks."""
        for task in (self.working, self.task):
            task.cancel()
        await asyncio.gather(self.working, self.task, return_exceptions=True)


class Pool:
    """The nodes of one pool."""

    def __init__(self, url: str, replicas: int | None) -> None:
        self._url, self._replicas = url, replicas
        self.active: set[SessionId] = set()
        self.most: list[int] = [0]
        self.paused = False

    @asynccontextmanager
    async def node(self, name: str) -> AsyncGenerator[Node]:
        """One that takes part."""
        async with connected(name, (self._url,)) as bus:
            await create_stream(bus, bucket_config(NAMES, BUCKET, APP, history=1, replicas=1))
            session = TimedHeartbeat(bus, name)
            async with registered(bus, session) as register:
                made = Node(bus, session, self.active, self.most)
                made.seats = Seats(
                    bus, NAMES, APP, session, register, replicas=self._replicas, paused=lambda: self.paused
                )
                made.seats.set_candidacy(True)
                made.task = asyncio.create_task(made.seats.run())
                made.working = asyncio.create_task(made.work())
                try:
                    yield made
                finally:
                    await made.stop()

    @asynccontextmanager
    async def nodes(self, names: str) -> AsyncGenerator[list[Node]]:
        """Several, which all take part."""
        async with contextlib.AsyncExitStack() as stack:
            made = [await stack.enter_async_context(self.node(name)) for name in names]
            await until(lambda: all(len(node.seats.candidates) >= len(names) for node in made))
            yield made

    def names(self) -> set[str]:
        """Who is active."""
        return {session.node for session in self.active}


async def scale(bus: NatsBus, replicas: int | None) -> None:
    """An operator's word."""
    data = msgspec.json.encode(PoolScale(replicas, "test"))
    await bus.write(NAMES.key_subject(BUCKET, POOL_SCALE_KEY), data)


async def test_g4_two_of_three_are_active_and_the_place_of_a_killed_one_is_taken_at_once(
    nats_server: NatsServer,
) -> None:
    """The third becomes active; never more than two are, and what was active stays."""
    pool = Pool(nats_server.url(), 2)
    async with pool.nodes("abc") as nodes:
        await until(lambda: len(pool.active) == 2)
        victim = next(node for node in nodes if node.reign is not None)
        others = [node for node in nodes if node is not victim]
        stayed = next(node for node in others if node.reign is not None)
        epoch = stayed.reign.epoch if stayed.reign is not None else 0
        await victim.die()
        await until(lambda: pool.names() == {node.session.id.node for node in others})
        assert stayed.reign is not None
        assert stayed.reign.epoch == epoch
        assert max(pool.most) == 2
        await until(lambda: len(others[0].seats.seated()) == 2)
        epochs = sorted(epoch for _, epoch in others[0].seats.seated().values())
        assert epochs == sorted(int(node.reign.epoch) for node in others if node.reign is not None)


async def test_pool_is_scaled_up_and_down_while_it_runs(nats_server: NatsServer) -> None:
    """More nodes become active, then fewer; a number that nobody can reach makes all of them active."""
    pool = Pool(nats_server.url(), 1)
    async with pool.nodes("abc") as nodes:
        await until(lambda: len(pool.active) == 1)
        first = pool.names()
        await scale(nodes[0].bus, 2)
        await until(lambda: len(pool.active) == 2)
        assert first < pool.names()
        await scale(nodes[0].bus, 8)
        await until(lambda: len(pool.active) == 3)
        await scale(nodes[0].bus, 1)
        await until(lambda: pool.names() == first)
        await scale(nodes[0].bus, 0)
        await until(lambda: not pool.active)
        await scale(nodes[0].bus, None)
        await until(lambda: len(pool.active) == 3)


async def test_instance_that_steps_aside_is_replaced_by_another_node(nats_server: NatsServer) -> None:
    """Its seat is given back, and whoever is fit takes it."""
    pool = Pool(nats_server.url(), 1)
    async with pool.nodes("ab") as nodes:
        await until(lambda: len(pool.active) == 1)
        ill, other = sorted(nodes, key=lambda node: node.reign is None)
        assert ill.reign is not None
        assert ill.seats.successor() == other.session.id.node
        ill.seats.set_candidacy(False, "ill")
        ill.reign.end("ill")
        await until(lambda: pool.names() == {other.session.id.node})
        assert max(pool.most) == 1


async def test_in_a_pause_no_seat_is_taken_or_given_back(nats_server: NatsServer) -> None:
    """Scaled meanwhile: it counts once the pause is over."""
    pool = Pool(nats_server.url(), 1)
    async with pool.nodes("abc") as nodes:
        await until(lambda: len(pool.active) == 1)
        pool.paused = True
        await scale(nodes[0].bus, 3)
        await until(lambda: all(node.seats.replicas == 3 for node in nodes))
        await asyncio.sleep(0.3)
        assert len(pool.active) == 1
        pool.paused = False
        for node in nodes:
            node.seats.on_resumed()
        await until(lambda: len(pool.active) == 3)


async def test_g2_write_of_an_instance_that_was_replaced_is_refused_by_the_server(
    nats_server: NatsServer,
) -> None:
    """Its writes are fenced by its seat; once another node has that they are refused."""
    pool = Pool(nats_server.url(), 1)
    subject = NAMES.key_subject(BUCKET, "kv.count")
    async with pool.nodes("ab") as nodes:
        await until(lambda: len(pool.active) == 1)
        old, new = sorted(nodes, key=lambda node: node.reign is None)
        assert old.reign is not None
        fence = old.reign.fence
        await old.bus.write(subject, b"1", fence=fence)
        await old.die()
        await until(lambda: new.reign is not None)
        assert new.reign is not None
        assert new.reign.epoch > fence.revision
        with pytest.raises(WrongRevision):
            await old.bus.write(subject, b"2", fence=fence)
        await new.bus.write(subject, b"3", fence=new.reign.fence)


async def test_pool_names_no_successor_by_an_operators_word(nats_server: NatsServer) -> None:
    """There is nobody to hand over to: the next one takes the seat by itself."""
    pool = Pool(nats_server.url(), 1)
    async with pool.nodes("a") as nodes:
        with pytest.raises(ConfigError, match="is a pool"):
            nodes[0].seats.check_successor("b")


async def test_seat_of_a_session_that_was_taken_up_is_given_back_by_a_node_that_is_not_fit(
    nats_server: NatsServer,
) -> None:
    """Nothing of it runs, its ``on_start`` has failed, say: it begins nothing, and another node is active."""
    pool = Pool(nats_server.url(), 1)
    async with connected("a", (nats_server.url(),)) as bus:
        await create_stream(bus, bucket_config(NAMES, BUCKET, APP, history=1, replicas=1))
        session = TimedHeartbeat(bus, "a")
        session.is_taken_up = True
        subject = NAMES.key_subject(BUCKET, NAMES.seat_key(0))
        await bus.write(subject, msgspec.json.encode(PartitionBody(session.id)))
        async with registered(bus, session) as register:
            seats = Seats(bus, NAMES, APP, session, register, replicas=1)
            seats.set_candidacy(False, "on_start has failed")
            running = asyncio.create_task(seats.run())
            reign = asyncio.create_task(seats.next_reign())
            try:
                async with pool.node("b") as other:
                    await until(lambda: reign.done() or other.reign is not None)
                    assert not reign.done()
                    assert pool.names() == {"b"}
            finally:
                for task in (running, reign):
                    task.cancel()
                await asyncio.gather(running, reign, return_exceptions=True)

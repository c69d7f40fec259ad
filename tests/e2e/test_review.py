"""What a hostile review found; each test failed before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from phalanx import NatsOptions, Platform, Role
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import stream_info
from phalanx.names import Names
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.stage import since_now, stage

NAMES = Names("test")


async def connected(nats: NatsCluster) -> NatsBus:
    return await NatsBus.connect(NatsOptions(urls=tuple(nats.urls)), name="test", ping_interval=1.0)


async def server_of(nats: NatsCluster, stream: str) -> int:
    bus = await connected(nats)
    info = await stream_info(bus, stream)
    await bus.close()
    assert info is not None
    return nats.index(info["cluster"]["leader"])


@pytest.mark.parametrize("number", [1, 3])
async def test_node_starts_and_takes_over_while_a_nats_server_is_down(tmp_path: Path, number: int) -> None:
    """The server of a session stream is dead: restarted nodes become standbys, and judge a dead host."""
    with NatsCluster(3) as nats, stage(tmp_path, nats, count=2) as s:
        active = await s.settled()
        standby = next(node.node for node in s.nodes if node.node != active)
        nats.kill(await server_of(nats, NAMES.session_stream(number)))
        s.nodes[standby].kill()
        s.nodes[standby].start()
        await s.nodes.wait_for_standbys("wiki", 1)
        killed = since_now()
        s.nodes[active].kill_both()
        began = await s.next_active(killed, timeout=20)
        assert began.node == standby
        # The app's stream may have been led by the server that died: then its election is under way still.
        assert began.at - killed < 12
        s.check()


async def test_new_session_and_sigterm_while_a_nats_server_is_down(tmp_path: Path) -> None:
    """A session stream is down and the keeper is killed: a new session; SIGTERM ends the node."""
    with NatsCluster(3) as nats, stage(tmp_path, nats, count=2) as s:
        active = await s.settled()
        nats.kill(await server_of(nats, NAMES.session_stream(1)))
        before = s.nodes[active].status()["session"]
        s.nodes[active].kill_keeper()

        def renewed() -> bool:
            status = s.nodes[active].status()
            return bool(status) and status["ready"] and status["session"] not in ("", before)

        await s.nodes.wait_until(renewed, 20, "no new session")
        s.nodes[active].terminate()
        assert s.nodes[active].wait(15) == 0
        s.check()


async def test_lock_of_a_node_that_stops_is_given_up_before_another_has_it(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A user's lock outside of any section: not held any more when the next node gets it."""

    def platform(name: str) -> Platform:
        made = Platform(
            "test",
            node=name,
            nats=nats_server.urls,
            data_dir=str(tmp_path / name),
            http={"enabled": False},
            timings={"ttl": 5},
        )
        made.app("wiki")
        return made

    first, second = platform("n1"), platform("n2")
    await first.start()
    async with second:
        await second.wait_for_role("wiki", Role.STANDBY)
        held = await first.apps["wiki"].locks.acquire("x", timeout=5)
        stopping = asyncio.create_task(first.stop())
        taken = await second.apps["wiki"].locks.acquire("x", timeout=10)
        assert not held.is_held
        assert held.lost.is_set()
        assert taken.token > held.token
        await stopping
        await taken.release()


async def test_keeper_that_was_paused_does_not_kill_its_node(nats_server: NatsServer, tmp_path: Path) -> None:
    """The keeper stood still for longer than the stall limit, within the TTL: its node is not to blame."""
    with stage(tmp_path, nats_server, count=1, ttl=12.0, timings={"stall_limit": 0.5}) as s:
        await s.settled()
        node = s.nodes["n1"]
        keeper = node.keeper_pid
        epoch = s.history.events("active")[-1].epoch
        frozen = since_now()
        node.freeze_keeper()
        await s.wait_for("tick", frozen + 1.5, epoch=epoch)
        node.thaw_keeper()
        thawed = since_now()
        await s.wait_for("tick", thawed + 1.5, epoch=epoch)
        assert node.keeper_pid == keeper
        assert len(s.history.events("active")) == 1


async def test_dead_node_is_no_successor_after_its_tombstones_are_gone(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The tombstone of a crashed node has lapsed: a hand-over still does not name it."""
    with stage(tmp_path, nats_server, count=2, ttl=1.0) as s:
        active = await s.settled()
        dead = next(node.node for node in s.nodes if node.node != active)
        session = s.nodes[dead].status()["session"]
        s.nodes[dead].kill()
        await s.nodes.wait_until(
            lambda: f"session {session} is over" in s.nodes[active].log(), 10, "not seen over"
        )
        bus = await connected(nats_server)
        stream = NAMES.session_stream(1)
        subject = f"{NAMES.session_subjects(stream).removesuffix('>')}{session}"
        # As the end of its TTL does it: the tombstone vanishes, and a marker says so.
        await bus.write(subject, headers={"KV-Operation": "DEL"})
        await bus.api(f"STREAM.PURGE.{stream}", {"filter": subject})
        await bus.close()
        s.nodes[active].terminate()
        assert s.nodes[active].wait(10) == 0
        assert "to no other eligible node" in s.nodes[active].log()


async def test_bus_survives_a_reopening_that_fails_in_an_unexpected_way(nats_server: NatsServer) -> None:
    """The CA file is missing while a client is replaced: tried again; subscriptions come along once."""
    bus = await connected(nats_server)
    got: list[bytes] = []
    await bus.subscribe("s", lambda m: got.append(m.data))
    right = bus._link._options
    bus._link._options = NatsOptions(urls=right.urls, tls_ca="/nonexistent.pem")
    bus._link._start_reopening("a test")
    async with asyncio.timeout(10):
        while bus.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        late = await bus.subscribe("t", lambda m: got.append(m.data))
        await asyncio.sleep(0.3)  # at least one try fails
        bus._link._options = right
        while not bus.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while got != [b"1", b"2"]:
            got.clear()
            await bus.publish("s", b"1")
            await bus.publish("t", b"2")
            await asyncio.sleep(0.1)
    await late.unsubscribe()
    await bus.close()

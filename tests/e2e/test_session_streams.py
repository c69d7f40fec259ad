"""Session streams: where they are put, and how one is replaced while everything runs."""

from __future__ import annotations

from pathlib import Path

from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import stream_info
from phalanx.config import NatsOptions
from phalanx.coord.membership import PlatformState
from phalanx.decide.session import StreamList
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.testing.nats import NatsCluster
from phalanx.testing.stage import since_now, stage


async def _placement(nats: NatsCluster) -> tuple[StreamList, dict[str, str]]:
    """The list in use, and on which server each stream of it is."""
    names = Names("test")
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats.urls)), name="test", ping_interval=1.0)
    try:
        found = await PlatformState(bus, names).read(names.SESSIONS_KEY, StreamList)
        assert found is not None
        servers: dict[str, str] = {}
        for stream in found[0].all_streams:
            info = await stream_info(bus, stream)
            # None: it was replaced and deleted between the two requests.
            servers[stream] = str((info or {}).get("cluster", {}).get("leader", ""))
        return found[0], servers
    finally:
        await bus.close()


async def test_three_session_streams_on_three_servers(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """Three nodes that start at once make three streams, each on another server."""
    with stage(tmp_path, nats_cluster) as s:
        await s.settled()
        streams, servers = await _placement(nats_cluster)
        assert len(streams.streams) == 3
        assert len(set(servers.values())) == 3


async def test_lost_server_is_replaced_and_the_next_loss_deposes_nobody(tmp_path: Path) -> None:
    """A server is replaced for good by a new one: its session stream moves there, without any failover."""
    with (
        NatsCluster(3) as nats,
        stage(tmp_path, nats, node_env={"PHALANX_REPAIR_AFTER": "2"}) as s,
    ):
        active = await s.settled()
        before, servers = await _placement(nats)
        epoch = s.history.events("active")[-1].epoch
        lost = next(stream for stream, server in servers.items() if server == nats.name(0))
        replacement = nats.replace(0)

        async def is_replaced() -> bool:
            try:
                streams, _ = await _placement(nats)
            except BusError:
                return False  # the bucket's new leader is being elected, too
            return not streams.is_joint and lost not in streams.streams

        for _ in range(60):
            changed = since_now()
            if await is_replaced():
                break
            await s.wait_for("tick", changed + 0.5, epoch=epoch)
        streams, servers = await _placement(nats)
        assert streams.generation == before.generation + 2
        assert set(servers.values()) == {replacement, nats.name(1), nats.name(2)}
        # The new list carries the sessions: the loss of another server deposes nobody.
        killed = since_now()
        nats.kill(1)
        await s.wait_for("tick", killed + 6.0, node=active, epoch=epoch)
        assert {e.epoch for e in s.history.events("active")} == {epoch}
        s.check()

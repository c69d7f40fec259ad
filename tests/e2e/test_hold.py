"""Apps that go on without NATS, as all who could take them over have promised that they do not."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phalanx.testing.faults import TcpProxy
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.stage import Stage, since_now, stage

TTL = 2.0
WITHOUT_NATS_SECONDS = 3.2 * TTL


def addresses(count: int) -> list[str]:
    """Places on loopback where nobody listens (UDP)."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return found


@contextmanager
def holding(tmp_path: Path, nats: NatsCluster | NatsServer, **settings: Any) -> Generator[Stage]:
    """Three nodes whose app holds."""
    with stage(
        tmp_path, nats, on_nats_loss="hold", ttl=TTL, direct=addresses(3), tick_seconds=0.02, **settings
    ) as s:
        yield s


async def lead_from_n1(s: Stage) -> None:
    """Have n1 lead, with everybody on its member list."""
    while await ready(s) != "n1":
        active = await s.settled()
        now = since_now()
        s.nodes[active].kill()
        await s.next_active(now)
        s.nodes[active].start()


async def ready(s: Stage) -> str:
    """Wait until the active node has everybody on its member list; the active one."""
    active = await s.settled()

    def listed() -> bool:
        apps = s.nodes[active].status().get("apps", [])
        return any(app["hold"] == "would go on without NATS" for app in apps)

    await s.nodes.wait_until(listed, 20.0, "not all are listed")
    return active


async def test_nats_is_wholly_gone_for_three_ttls_and_the_active_one_goes_on(tmp_path: Path) -> None:
    """The same section of the same epoch; when NATS returns it is handed over in order."""
    with NatsCluster(3) as nats, holding(tmp_path, nats) as s:
        active = await ready(s)
        epoch = s.history.events("active")[-1].epoch
        gone = since_now()
        for i in range(3):
            nats.kill(i)
        await s.wait_for("tick", gone + WITHOUT_NATS_SECONDS, node=active, epoch=epoch, timeout=30)
        assert s.history.events("passive", since=gone) == []
        assert s.nodes.actives("wiki") == [active]
        back = since_now()
        nats.start()
        ended = await s.wait_for("passive", back, node=active, timeout=60)
        began = await s.next_active(ended.at, timeout=60)
        assert began.epoch > epoch
        s.check()


async def test_nats_and_one_member_are_gone_and_the_active_one_ends(tmp_path: Path) -> None:
    """Without the promises of all it stands down before the last lease ends, and nobody follows."""
    with NatsCluster(3) as nats, holding(tmp_path, nats) as s:
        active = await ready(s)
        gone = since_now()
        for i in range(3):
            nats.kill(i)
        await s.wait_for("tick", gone + 1.5 * TTL, node=active, timeout=30)
        other = next(node for node in s.nodes if node.node != active)
        killed = since_now()
        other.kill()
        ended = await s.wait_for("passive", killed, node=active)
        assert ended.at - killed < TTL
        s.check()


async def test_only_the_active_one_is_cut_off_and_nobody_takes_over(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The others see its session end, and have promised; when it is back it hands over in order."""
    async with TcpProxy("127.0.0.1", nats_server.port()) as link:
        with holding(tmp_path, nats_server, urls_of={0: [link.url]}) as s:
            await lead_from_n1(s)
            epoch = s.history.events("active")[-1].epoch
            cut = since_now()
            link.black_hole()
            await s.wait_for("tick", cut + WITHOUT_NATS_SECONDS, node="n1", epoch=epoch, timeout=30)
            assert s.history.events("active", since=cut) == []
            back = since_now()
            link.heal()
            ended = await s.wait_for("passive", back, node="n1", timeout=60)
            began = await s.next_active(ended.at, timeout=60)
            assert began.epoch > epoch
            s.check()


async def test_g1_frozen_holder_is_ended_by_its_keeper_before_another_follows(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGSTOP while it is cut off and held: its leases run out, its keeper kills it, another one follows."""
    async with TcpProxy("127.0.0.1", nats_server.port()) as link:
        with holding(tmp_path, nats_server, urls_of={0: [link.url]}) as s:
            await lead_from_n1(s)
            cut = since_now()
            link.black_hole()
            await s.wait_for("tick", cut + 1.5 * TTL, node="n1", timeout=30)
            s.nodes["n1"].freeze()
            frozen = since_now()
            began = await s.next_active(frozen)
            assert not s.nodes["n1"].is_running
            assert began.node != "n1"
            s.check()


async def test_g4_killed_active_node_of_an_app_that_holds_moves_at_once(
    nats_cluster: NatsCluster, tmp_path: Path
) -> None:
    """While NATS is well nobody is bound, and its keeper vouches for its end."""
    with holding(tmp_path, nats_cluster) as s:
        active = await ready(s)
        killed = since_now()
        s.nodes[active].kill()
        began = await s.next_active(killed)
        assert began.node != active
        s.check()

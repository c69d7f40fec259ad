"""Failovers of real nodes on real NATS servers; each test names the promise it holds."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import pytest

from phalanx import ConfigError, NatsOptions, system
from phalanx.client import PlatformClient
from phalanx.observe.audit import AuditEntry
from phalanx.testing.faults import TcpProxy
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.stage import since_now, stage


async def audited(nats: NatsCluster) -> list[AuditEntry]:
    """The audit log so far."""
    async with PlatformClient("test", NatsOptions(urls=tuple(nats.urls))) as client:
        return await client.audit(limit=1000)


@pytest.mark.alone
async def test_g4_killed_node_moves_its_app_at_once(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """SIGKILL of the active node: another is active well before half a second, at the default TTL."""
    with stage(tmp_path, nats_cluster, ttl=5.0) as s:
        active = await s.settled()
        killed = since_now()
        s.nodes[active].kill()
        began = await s.next_active(killed)
        assert began.node != active
        assert began.at - killed < 0.5
        s.check()


@pytest.mark.alone
async def test_g10_sigterm_hands_over_before_the_process_ends(
    nats_cluster: NatsCluster, tmp_path: Path
) -> None:
    """SIGTERM: the successor was named, begins right after the end, and the process exits with 0."""
    with stage(tmp_path, nats_cluster) as s:
        active = await s.settled()
        asked = since_now()
        s.nodes[active].terminate()
        ended = await s.wait_for("passive", asked, node=active)
        began = await s.next_active(asked)
        assert s.nodes[active].wait(10) == 0
        assert 0 < began.at - ended.at < 0.25
        assert f"to {began.node}" in s.nodes[active].log()
        s.check()


async def test_g1_frozen_node_is_fenced_before_another_begins(
    nats_cluster: NatsCluster, tmp_path: Path
) -> None:
    """SIGSTOP of the active node: its keeper kills it, then another begins; no overlap after SIGCONT."""
    with stage(tmp_path, nats_cluster) as s:
        active = await s.settled()
        frozen = since_now()
        s.nodes[active].freeze()
        began = await s.next_active(frozen)
        assert began.node != active
        s.nodes[active].thaw()
        assert s.nodes[active].wait(5) == -9
        s.check()
        entries = await audited(nats_cluster)
        fenced = next(e for e in entries if (e.category, e.action) == ("node", "fenced"))
        assert fenced.node == active
        assert "stood still" in fenced.reason


@pytest.mark.alone
async def test_g1_frozen_host_cannot_go_on_after_its_session(
    nats_cluster: NatsCluster, tmp_path: Path
) -> None:
    """Node and keeper stopped past the TTL: another begins; on waking the old one can write nothing."""
    with stage(tmp_path, nats_cluster, writes=True) as s:
        active = await s.settled()
        frozen = since_now()
        s.nodes[active].freeze(keeper=True)
        began = await s.next_active(frozen)
        assert 2.0 * 0.9 < began.at - frozen < 2.0 * 1.05 + 1.0
        thawed = since_now()
        s.nodes[active].thaw(keeper=True)
        await s.nodes.wait_until(
            lambda: not s.nodes[active].is_running or not s.nodes[active].is_active("wiki"), 5, "goes on"
        )
        late = [e for e in s.history.events("written", "tick", since=thawed) if e.node == active]
        assert [e for e in late if e.epoch < began.epoch] == []
        s.check()


async def test_g1_blocked_node_without_a_keeper_dies_with_its_session(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Blocked loop, keeper killed: the kernel's timer ends the process before another begins."""
    trigger = tmp_path / "block"
    with stage(tmp_path, nats_server, count=2, fault="block", fault_file=str(trigger)) as s:
        active = await s.settled()
        trigger.touch()
        blocking = await s.wait_for("blocking", 0.0)
        s.nodes[active].kill_keeper()
        assert s.nodes[active].wait(5) == -signal.SIGALRM
        died = since_now()
        began = await s.next_active(blocking.at)
        assert began.at > died - 0.3
        s.check()


@pytest.mark.alone
async def test_g4_blocked_event_loop_counts_as_a_crash(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """A hook that blocks the event loop: the keeper kills the node after the stall limit."""
    trigger = tmp_path / "block"
    with stage(
        tmp_path, nats_cluster, fault="block", fault_file=str(trigger), timings={"stall_limit": 1.0}
    ) as s:
        active = await s.settled()
        trigger.touch()
        blocking = await s.wait_for("blocking", 0.0)
        began = await s.next_active(blocking.at)
        assert began.node != active
        assert began.at - blocking.at < 1.0 + 0.5
        assert s.nodes[active].wait(5) == -9
        s.check()


@pytest.mark.alone
async def test_g1_keeper_dies_and_the_node_fences_itself(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """SIGKILL of the keeper: the node's section ends at once, and it comes back with a new session."""
    with stage(tmp_path, nats_cluster) as s:
        active = await s.settled()
        before = s.nodes[active].status()["session"]
        killed = since_now()
        s.nodes[active].kill_keeper()
        ended = await s.wait_for("passive", killed, node=active)
        assert ended.at - killed < 0.5
        await s.next_active(killed)
        after = await s.nodes.wait_until(
            lambda: (st := s.nodes[active].status()) and st["ready"] and st["session"], 10, "no new session"
        )
        assert after != before
        s.check()


@pytest.mark.alone
async def test_dead_host_costs_the_ttl(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """Node and keeper killed at once: the session expires, and another begins within TTL x 1.05 + 0.3 s."""
    with stage(tmp_path, nats_cluster) as s:
        active = await s.settled()
        killed = since_now()
        s.nodes[active].kill_both()
        began = await s.next_active(killed)
        assert 2.0 * 0.85 < began.at - killed < 2.0 * 1.05 + 0.3
        s.check()


async def test_g9_node_cut_off_from_nats_stops_before_another_begins(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The active node's cable is pulled: its section ends by itself before the other one begins."""
    async with TcpProxy("127.0.0.1", nats_server.port()) as link:
        with stage(tmp_path, nats_server, count=2, urls_of={0: [link.url]}) as s:
            await s.settled()
            if s.nodes["n2"].is_active("wiki"):
                s.nodes["n2"].kill()
                await s.nodes.wait_for_active("wiki", other_than="n2")
                s.nodes["n2"].start()
            assert await s.settled() == "n1"
            cut = since_now()
            link.black_hole()
            ended = await s.wait_for("passive", cut, node="n1")
            began = await s.next_active(cut)
            assert began.node == "n2"
            assert ended.at < began.at < cut + 2.0 * 1.05 + 0.5
            link.heal()
            await s.nodes.wait_for_standbys("wiki", 1)
            s.check()


@pytest.mark.alone
async def test_g9_nats_wholly_gone_and_back(tmp_path: Path) -> None:
    """All NATS servers die: the section ends by its deadline; when they return, one node is active again."""
    with NatsCluster(3) as nats, stage(tmp_path, nats) as s:
        active = await s.settled()
        gone = since_now()
        for i in range(3):
            nats.kill(i)
        ended = await s.wait_for("passive", gone, node=active)
        assert ended.at - gone < 2.0
        nats.start()
        began = await s.next_active(ended.at, timeout=60)
        assert began.epoch > ended.epoch
        s.check()


@pytest.mark.parametrize("server", [0, 1, 2])
async def test_no_failover_when_one_nats_server_dies(tmp_path: Path, server: int) -> None:
    """SIGKILL of any one of three NATS servers deposes nobody, and loses no acknowledged write."""
    with NatsCluster(3) as nats, stage(tmp_path, nats, writes=True) as s:
        active = await s.settled()
        epoch = s.history.events("active")[-1].epoch
        await s.wait_for("written", 0.0)
        killed = since_now()
        nats.kill(server)
        # Three times the TTL: whoever could be deposed by this would be by now.
        await s.wait_for("tick", killed + 6.0, node=active, epoch=epoch)
        await s.wait_for("written", killed + 6.0, node=active, timeout=30)
        assert {e.epoch for e in s.history.events("active")} == {epoch}
        s.check()


async def test_second_node_with_the_same_id_is_refused(nats_server: NatsServer, tmp_path: Path) -> None:
    """While the first lives the second exits with 2 and says who has the id; the first goes on."""
    with stage(tmp_path, nats_server, count=2, ttl=1.0) as s:
        await s.settled()
        first, second = s.nodes["n1"], s.nodes["n2"]
        second.terminate()
        second.wait(10)
        second.node = "n1"
        second.start()
        assert second.wait(20) == 2
        assert "node id 'n1' is taken by session n1." in second.log()
        assert first.is_running
        assert first.status()["ready"]


@pytest.mark.alone
async def test_node_id_is_free_once_its_session_is_gone(nats_server: NatsServer, tmp_path: Path) -> None:
    """After a crash the same id starts again at once: the keeper has ended the old session."""
    with stage(tmp_path, nats_server, count=1, ttl=5.0) as s:
        await s.settled()
        s.nodes["n1"].kill()
        killed = since_now()
        s.nodes["n1"].start()
        began = await s.next_active(killed)
        assert began.at - killed < 3.0
        s.check()


async def test_failing_hook_moves_the_app_to_another_node(nats_server: NatsServer, tmp_path: Path) -> None:
    """on_active raises on one node: it stands down with a growing delay, another becomes active."""
    with stage(tmp_path, nats_server, fault="fail", fault_node="n1") as s:
        active = await s.nodes.wait_for_active("wiki")
        assert active != "n1"
        s.nodes[active].kill()
        other = await s.nodes.wait_for_active("wiki", other_than=active)
        assert other != "n1"
        s.check()


async def test_deaf_hook_costs_the_node_not_the_promise(nats_server: NatsServer, tmp_path: Path) -> None:
    """on_active ignores its cancellation: nobody else begins before that node has died."""
    with stage(tmp_path, nats_server, fault="deaf") as s:
        active = await s.settled()
        asked = since_now()
        s.nodes[active].terminate()
        began = await s.next_active(asked, timeout=40)
        assert s.nodes[active].wait(5) == -9
        assert began.node != active
        s.check()


async def test_g1_backend_does_not_outlive_node_and_keeper_killed_at_once(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Nobody is left who could kill the program: the kernel does. Its successor runs elsewhere alone."""
    pids = tmp_path / "pids"
    program = f"/bin/sh -c 'echo $PHALANX_NODE $$ >> {pids}; exec sleep 1000'"
    with stage(tmp_path, nats_server, count=2, backend=program, hooks=False) as s:
        active = await s.settled()
        node, pid = (await s.nodes.wait_until(pids.read_text, 5, "no program")).split()[:2]
        assert node == active
        s.nodes[active].kill_both()
        await s.nodes.wait_until(lambda: not system.is_running(int(pid)), 1.0, "the program goes on")
        other = await s.nodes.wait_for_active("wiki", other_than=active)
        lines = await s.nodes.wait_until(lambda: pids.read_text().split()[2:], 5, "the successor's program")
        assert lines[0] == other


async def test_g4_backend_of_a_killed_node_is_gone_before_its_successor_starts(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGKILL of the node: its program, and children that left its process group, are gone first."""
    alive = tmp_path / "alive"
    code = (
        "import os,time\\n"
        "if os.fork() == 0: os.setsid()\\n"
        "f=os.open(os.environ['ALIVE'],os.O_WRONLY|os.O_APPEND|os.O_CREAT)\\n"
        "while True:\\n"
        "  line=os.environ['PHALANX_EPOCH']+' '+str(time.clock_gettime(time.CLOCK_BOOTTIME))+chr(10)\\n"
        "  os.write(f,line.encode()); time.sleep(0.002)\\n"
    )
    script = tmp_path / "beacon.py"
    script.write_text(code.replace("\\n", "\n"))
    env = {"ALIVE": str(alive)}
    with stage(
        tmp_path,
        nats_server,
        count=2,
        backend=f"{sys.executable} {script}",
        hooks=False,
        node_env=env,
    ) as s:
        active = await s.settled()
        await s.nodes.wait_until(
            lambda: alive.exists() and alive.stat().st_size > 1000, 5, "no signs of life"
        )
        s.nodes[active].kill()
        await s.nodes.wait_for_active("wiki", other_than=active)

        def spans() -> dict[int, tuple[float, float]]:
            times: dict[int, list[float]] = {}
            for line in alive.read_text().splitlines():
                epoch, at = line.split()
                times.setdefault(int(epoch), []).append(float(at))
            return {epoch: (min(at), max(at)) for epoch, at in times.items()}

        await s.nodes.wait_until(lambda: len(spans()) == 2, 10, "the successor gives no sign of life")
        first, second = (spans()[epoch] for epoch in sorted(spans()))
        assert first[1] < second[0]


async def test_dead_node_can_be_forgotten_and_a_live_one_not(nats_server: NatsServer, tmp_path: Path) -> None:
    """``forget`` refuses a node whose session lives, and takes a dead one off the member list."""
    with stage(tmp_path, nats_server, count=2, ttl=1.0) as s:
        await s.settled()
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            with pytest.raises(ConfigError, match="its session lives"):
                await client.forget("n2")
            s.nodes["n2"].kill()
            await s.nodes.wait_until(lambda: not s.nodes["n2"].is_running, 5, "n2 lives")
            async with asyncio.timeout(10):
                while "n2" in await client.members():
                    with contextlib.suppress(ConfigError):
                        await client.forget("n2")
                    await asyncio.sleep(0.05)
            assert set(await client.members()) == {"n1"}

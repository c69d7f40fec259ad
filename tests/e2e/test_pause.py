"""A pause: nothing changes hands, whatever fails, until it is over. Real nodes, real NATS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from tests.e2e.cli import Cli

from phalanx import system
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.errors import ConfigError, Paused
from phalanx.keeper import note, wire
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess
from phalanx.testing.stage import Stage, since_now, stage

NOTHING_SECONDS = 1.0
"""How long nothing has to happen after what would move an app within some 20 ms."""


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[PlatformClient]:
    """One of the platform that the test program makes."""
    async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as made:
        yield made


async def audited(client: PlatformClient, action: str) -> list[tuple[str, str]]:
    """App and reason of all entries with that action."""
    return [(entry.app, entry.reason) for entry in await client.audit(limit=1000) if entry.action == action]


async def nothing_began(s: Stage, since: float) -> None:
    """No section began since then, for a while."""
    await asyncio.sleep(NOTHING_SECONDS)
    assert s.history.events("active", since=since) == []


@pytest.mark.parametrize("app", ["wiki", None])
@pytest.mark.alone
async def test_active_node_killed_in_a_pause_then_resumed(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient, app: str | None
) -> None:
    """Nobody takes over while the app, or the platform, is paused; with its end somebody does at once."""
    with stage(tmp_path, nats_server, count=2) as s:
        active = await s.settled()
        done = await client.pause(app, reason="a move")
        assert (done.app, done.changed, done.unaware) == (app or "", True, ())
        killed = since_now()
        s.nodes[active].kill()
        await nothing_began(s, killed)
        assert all(view.status.apps[0].pause for view in await client.nodes() if view.status)
        resumed = since_now()
        await client.resume(app)
        event = await s.next_active(resumed)
        assert event.node != active
        assert event.at - resumed < 2.0
        s.check()
    assert ("a move" in str(await audited(client, "paused"))) is True
    assert len(await audited(client, "resumed")) == 1


async def test_program_ends_and_node_is_asked_to_step_down_in_a_pause(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient
) -> None:
    """What has ended is reported and nothing else; a step-down is refused; with the pause's end it counts."""
    with stage(tmp_path, nats_server, count=2, backend="sleep 1000", hooks=False) as s:
        active = await s.settled()
        epoch = s.nodes[active].status()["apps"][0]["epoch"]
        await client.pause("wiki")
        with pytest.raises(Paused, match="resume it first: phalanx resume wiki"):
            await client.step_down("wiki")
        os.kill(program_of(s.nodes[active].data_dir), signal.SIGKILL)
        reason = "failed in a pause"
        await s.nodes.wait_until(
            lambda: reason in s.nodes[active].status()["apps"][0].get("reason", ""), 10, "it is not reported"
        )
        await asyncio.sleep(NOTHING_SECONDS)
        assert s.nodes.actives("wiki") == [active]
        assert s.nodes[active].status()["apps"][0]["epoch"] == epoch
        assert s.nodes[active].get("/metrics")[1].decode().count("phalanx_app_paused{") == 1
        assert s.nodes[active].status()["apps"][0]["program"]["restarts"] == 0
        await client.resume("wiki")
        await s.nodes.wait_until(
            lambda: (s.nodes[active].status()["apps"][0]["program"] or {}).get("restarts"),
            10,
            "not started again",
        )
        assert s.nodes[active].status()["apps"][0]["epoch"] == epoch
    assert [app for app, _ in await audited(client, "failed-in-pause")] == ["wiki"]


def program_of(data_dir: Path) -> int:
    """The process of the backend that is registered in *data_dir*."""
    return json.loads((data_dir / "registered.json").read_bytes())["resources"][0]["pgid"]


async def test_session_is_lost_in_a_pause(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient
) -> None:
    """G1 goes first: the keeper and the node end the section in time; nobody takes over before the resume."""
    with stage(tmp_path, nats_server, count=2, ttl=1.0) as s:
        await s.settled()
        await client.pause("wiki")
        frozen = since_now()
        nats_server.freeze()
        try:
            await s.wait_for("passive", frozen)
        finally:
            nats_server.thaw()
        back = since_now()
        await s.nodes.wait_for_standbys("wiki", 2)
        await nothing_began(s, back)
        await client.resume("wiki")
        await s.next_active(back)
        s.check()


async def test_pause_is_made_and_ended_once(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient
) -> None:
    """Twice changes nothing; who was first stays named; one app of a paused platform cannot be resumed."""
    with stage(tmp_path, nats_server, count=1) as s:
        await s.settled()
        assert await client.resume("wiki") is None
        first = await client.pause("wiki", reason="one")
        again = await client.pause("wiki", reason="two")
        assert (again.changed, again.pause) == (False, first.pause)
        with pytest.raises(ConfigError, match="no such app"):
            await client.pause("wikki")
        await client.pause()
        assert set(await client.pauses()) == {"", "wiki"}
        assert await client.resume("wiki")
        with pytest.raises(ConfigError, match="the whole platform is"):
            await client.resume("wiki")
        assert await client.resume()
        assert await client.pauses() == {}


async def test_command_line(nats_server: NatsServer, tmp_path: Path) -> None:
    """``pause``, ``status``, ``stepdown``, ``resume``, as an operator meets them."""
    cli = Cli(nats_server.url(), tmp_path, platform="test")
    with stage(tmp_path, nats_server, count=2) as s:
        await s.settled()
        assert (await cli.call("pause", "wiki", "--reason", "a move"))[0] == "wiki: paused\n"
        assert "was paused by" in (await cli.call("pause", "wiki"))[0]
        assert "wiki: paused by" in (await cli.call("status"))[0]
        assert (await cli.json("status"))["apps"][0]["pause"].endswith(": a move")
        assert "resume it first: phalanx resume wiki" in await cli.refused("stepdown", "wiki", code=1)
        await cli.refused("pause", "wikki")
        await cli.call("pause")
        out, err = await cli.call("resume")
        assert (out, err) == ("platform test: resumed\n", "app wiki stays paused: phalanx resume wiki\n")
        done = await cli.json("resume", "wiki")
        assert (done["app"], done["paused"], done["changed"]) == ("wiki", False, True)
        assert (await cli.call("resume", "wiki"))[0] == "wiki: was not paused\n"
        assert (await cli.json("resume", "wiki"))["changed"] is False
        assert "nothing changes hands" not in (await cli.call("status"))[0]


async def test_node_starts_in_a_pause(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient
) -> None:
    """It reads the pause before it takes part in any election."""
    with stage(tmp_path, nats_server, count=1) as s:
        await s.settled()
        s.nodes["n1"].terminate()
        s.nodes["n1"].wait()
        await client.pause("wiki")  # only now: else it would leave its session, and go on with that
        started = system.now()
        s.nodes["n1"].start()
        await s.nodes.wait_for_standbys("wiki", 1)
        await nothing_began(s, started)
        await client.resume("wiki")
        await s.next_active(started)


# --- the node's own end in a pause

TICKS = """
import os, sys, time
with open(sys.argv[1], "a", buffering=1) as file:
    while True:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        file.write(f"{os.environ['PHALANX_EPOCH']} {os.getpid()} {now}\\n")
        time.sleep(0.002)
"""


class Ticks:
    """What a program that outlives its node has written down: its epoch, its pid, the moment."""

    def __init__(self, folder: Path) -> None:
        self.path, script = folder / "ticks", folder / "ticks.py"
        script.write_text(TICKS)
        self.command = f"{sys.executable} {script} {self.path}"

    def read(self, since: float = 0.0) -> list[tuple[int, int, float]]:
        """All ticks since then."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = [
            (int(epoch), int(pid), float(at)) for epoch, pid, at in (line.split() for line in lines[:-1])
        ]
        return [tick for tick in found if tick[2] >= since]

    def longest_gap(self, since: float) -> float:
        """The longest time without a tick."""
        moments = [at for _, _, at in self.read(since)]
        return max(after - before for before, after in pairwise(moments))


@pytest.fixture
def ticks(tmp_path: Path) -> Ticks:
    """Of the one program of a test."""
    return Ticks(tmp_path)


async def paused_stage(s: Stage, client: PlatformClient, ticks: Ticks) -> tuple[NodeProcess, int, int]:
    """A node that is active and paused, the epoch and the process of its program."""
    active = await s.settled()
    await s.nodes.wait_until(lambda: len(ticks.read()) > 2, 10, "the program does not run")
    await client.pause("wiki")
    node = s.nodes[active]
    await s.nodes.wait_until(lambda: note.read(node.data_dir), 5, "the keeper does not know of the pause")
    epoch, pid, _ = ticks.read()[-1]
    return node, epoch, pid


@pytest.mark.parametrize("how", ["terminated", "killed"])
@pytest.mark.alone
async def test_node_restarts_in_a_pause_and_adopts_its_program(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient, ticks: Ticks, how: str
) -> None:
    """The program runs on without a gap, under the same epoch; after the pause all is as ever."""
    with stage(tmp_path, nats_server, count=2, hooks=False, lasting=ticks.command) as s:
        node, epoch, pid = await paused_stage(s, client, ticks)
        began, keeper = since_now(), node.keeper_pid
        if how == "terminated":
            node.terminate()
            assert node.wait() == 0
        else:
            node.kill()
        await asyncio.sleep(NOTHING_SECONDS + 2.5)  # longer than the session would last without renewals
        node.start()
        await s.nodes.wait_for_active("wiki")
        assert s.nodes.actives("wiki") == [node.node]
        status = node.status()["apps"][0]
        assert (status["epoch"], status["unkept"]) == (epoch, "")
        assert {(e, p) for e, p, _ in ticks.read(began)} == {(epoch, pid)}
        assert ticks.longest_gap(began) < 2.0  # a program that had waited for its node: 3.5 s
        assert node.keeper_pid == keeper
        await client.resume("wiki")
        done = await client.step_down("wiki")
        assert done.active != node.node
        assert not system.ProcessRef.of(pid).alive()
    assert [e.action for e in await client.audit(limit=1000)].count("session-taken-up") == 1


async def test_resumed_while_the_node_is_away(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient, ticks: Ticks
) -> None:
    """The keeper ends what it has kept, then another node takes over; nothing overlaps."""
    with stage(tmp_path, nats_server, count=2, hooks=False, lasting=ticks.command) as s:
        node, epoch, pid = await paused_stage(s, client, ticks)
        node.kill()
        resumed = since_now()
        await client.resume("wiki")
        await s.nodes.wait_for_active("wiki", other_than=node.node)
        await s.nodes.wait_until(lambda: ticks.read()[-1][0] > epoch, 5, "the next one does not run")
        assert not system.ProcessRef.of(pid).alive()
        last = max(at for e, _, at in ticks.read() if e == epoch)
        first = min(at for e, _, at in ticks.read() if e > epoch)
        assert resumed < last < first
        assert note.read(node.data_dir) is None
        node.start()
        await s.nodes.wait_for_standbys("wiki", 1)


async def test_nats_is_lost_while_the_node_is_away(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient, ticks: Ticks
) -> None:
    """The keeper that is alone kills by the session's deadline: G1 goes before the pause."""
    with stage(tmp_path, nats_server, count=1, ttl=1.0, hooks=False, lasting=ticks.command) as s:
        node, _, pid = await paused_stage(s, client, ticks)
        node.kill()
        frozen = since_now()
        nats_server.freeze()
        try:
            ref = system.ProcessRef.of(pid)
            await s.nodes.wait_until(lambda: not ref.alive(), 5, "it was not killed")
            assert ticks.read()[-1][2] - frozen < 1.0
        finally:
            nats_server.thaw()
        node.start()
        await s.nodes.wait_for_standbys("wiki", 1)
        await client.resume("wiki")
        await s.nodes.wait_for_active("wiki")


async def test_node_with_hooks_restarts_in_a_pause(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient
) -> None:
    """Code inside the node ends with it; it begins again on the same node, under an epoch of its own."""
    with stage(tmp_path, nats_server, count=2) as s:
        active = await s.settled()
        await client.pause("wiki")
        node = s.nodes[active]
        await s.nodes.wait_until(lambda: note.read(node.data_dir), 5, "the keeper does not know of the pause")
        epoch = node.status()["apps"][0]["epoch"]
        assert "hooks" in node.status()["apps"][0]["unkept"]
        stopped = since_now()
        node.terminate()
        node.wait()
        node.start()
        event = await s.next_active(stopped)
        assert event.node == active
        assert event.epoch > epoch
        s.check()


@pytest.mark.alone
async def test_other_apps_of_a_node_that_dies_in_a_pause_fail_over(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient
) -> None:
    """The session lives on for what is paused; the keeper gives the keys of the others back at once (G4)."""
    with stage(tmp_path, nats_server, count=2, apps=("wiki", "shop"), ttl=20.0) as s:
        await s.settled()
        wiki = await s.nodes.wait_for_active("wiki")
        if await s.nodes.wait_for_active("shop") != wiki:
            await client.step_down("shop", to=wiki)
        await client.pause("wiki")
        node = s.nodes[wiki]
        await s.nodes.wait_until(lambda: note.read(node.data_dir), 5, "the keeper does not know of the pause")
        killed = since_now()
        node.kill()
        event = await s.next_active(killed)
        assert (event.app, event.node != wiki) == ("shop", True)
        assert event.at - killed < 3.0
        await asyncio.sleep(NOTHING_SECONDS)
        assert [e.app for e in s.history.events("active", since=killed)] == ["shop"]
        s.check()


async def test_keeper_of_another_version_ends_what_it_has_kept(
    nats_server: NatsServer, tmp_path: Path, client: PlatformClient, ticks: Ticks
) -> None:
    """A new node that does not understand it has it fence and release; then it begins as ever."""
    with stage(tmp_path, nats_server, count=1, hooks=False, lasting=ticks.command) as s:
        node, epoch, pid = await paused_stage(s, client, ticks)
        node.kill()
        await s.nodes.wait_until(lambda: (node.data_dir / note.SOCKET).exists(), 5, "nobody listens")
        hello, over = await asyncio.to_thread(visit, node.data_dir)
        assert hello.version == wire.VERSION
        assert hello.session.node == node.node
        assert over
        assert not system.ProcessRef.of(pid).alive()
        node.start()
        await s.nodes.wait_for_standbys("wiki", 1)
        await client.resume("wiki")
        await s.nodes.wait_for_active("wiki")
        assert node.status()["apps"][0]["epoch"] > epoch


def visit(data_dir: Path) -> tuple[wire.Hello, bool]:
    """What a node of another version does: it reads Hello and says End; whether the keeper ends then."""
    kept = note.read(data_dir)
    assert kept is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel, note.socket_path(data_dir) as path:
        channel.settimeout(10)
        channel.connect(path)
        hello = wire.decode_hello(channel.makefile("rb").readline())
        channel.sendall(wire.encode(wire.End("a later version")))
        while channel.recv(4096):
            pass
    deadline = time.monotonic() + 10
    while kept.lives and time.monotonic() < deadline:
        time.sleep(0.02)
    return hello, not kept.lives

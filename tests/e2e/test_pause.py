"""A pause: nothing changes hands, whatever fails, until it is over. Real nodes, real NATS."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.cli import Cli

from phalanx import system
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.errors import ConfigError, Paused
from phalanx.testing.nats import NatsServer
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
        assert event.at - resumed < 1.0
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
    import json

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
            await s.wait_for("passive", frozen, timeout=3)
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
        await client.pause("wiki")
        s.nodes["n1"].terminate()
        s.nodes["n1"].wait()
        started = system.now()
        s.nodes["n1"].start()
        await s.nodes.wait_for_standbys("wiki", 1)
        await nothing_began(s, started)
        await client.resume("wiki")
        await s.next_active(started)

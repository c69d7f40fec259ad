"""``phalanx switchover``, ``failover`` and ``why`` on three real nodes."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.e2e.cli import CLI, Cli
from tests.waiting import until

from phalanx import NatsOptions
from phalanx.cli import exits
from phalanx.client import PlatformClient
from phalanx.control import FailoverRequest, StepDownReply
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import Stage, since_now, stage

SWITCHED = {
    "app", "previous", "active", "epoch", "seconds", "healthy_seconds", "ended", "left_behind",
}  # fmt: skip


class Platform(Cli):
    """The command line, and the nodes behind it."""

    def __init__(self, url: str, folder: Path, running: Stage) -> None:
        super().__init__(url, folder, "test")
        self.running = running

    async def app(self) -> dict[str, Any]:
        """What ``status`` says of the app."""
        [app] = (await self.json("status"))["apps"]
        return dict(app)

    def others(self, active: str) -> list[str]:
        """All nodes but that one."""
        return [node.node for node in self.running.nodes if node.node != active]


@pytest.fixture
def platform(tmp_path: Path, nats_server: NatsServer) -> Iterator[Platform]:
    """Three nodes; n1 never takes over by itself."""
    with stage(tmp_path, nats_server, no_failover=("n1",)) as running:
        yield Platform(nats_server.url(), tmp_path, running)
        running.check()


@pytest.fixture
def with_database(tmp_path: Path, nats_server: NatsServer) -> Iterator[Platform]:
    """Three nodes whose app commits all the time."""
    for node in ("n1", "n2", "n3"):
        (tmp_path / node).mkdir()
    with stage(tmp_path, nats_server, database=str(tmp_path / "{node}" / "wiki.db")) as running:
        yield Platform(nats_server.url(), tmp_path, running)
        running.check()


# --- switchover


async def test_three_nodes_switchover_to_a_named_node(platform: Platform) -> None:
    """It waits until that one is active and healthy, also one that never takes over by itself."""
    active = await platform.running.settled()
    done = await platform.json("switchover", "wiki", "--to", "n1", "--reason", "a new kernel")
    assert set(done) == SWITCHED
    assert (done["app"], done["previous"], done["active"]) == ("wiki", active, "n1")
    assert (done["ended"], done["left_behind"]) == ("gracefully", "")
    assert done["seconds"] <= done["healthy_seconds"] < 10
    app = await platform.app()
    assert (app["active"], app["epoch"]) == ("n1", done["epoch"])
    await platform.running.settled()
    out, _ = await platform.call("switchover", "wiki")
    assert "took over from n1 after" in out
    assert (await platform.app())["active"] in ("n2", "n3")


async def test_three_nodes_switchover_of_what_is_not_there(platform: Platform) -> None:
    """Unknown app or node, a node that cannot take over, bad times: one line, exit code 2, no change."""
    active = await platform.running.settled()
    assert "error: app = 'wikki'" in await platform.refused("switchover", "wikki")
    assert "error: --to = 'n9'" in await platform.refused("switchover", "wiki", "--to", "n9")
    assert f"error: --to = '{active}'" in await platform.refused("switchover", "wiki", "--to", active)
    assert "in the past" in await platform.refused("switchover", "wiki", "--at", "2020-01-01T00:00")
    assert "not a time" in await platform.refused("switchover", "wiki", "--at", "soon")
    assert "--at = '25:00'" in await platform.refused("switchover", "wiki", "--at", "25:00")
    assert "--cancel" in await platform.refused("switchover", "wiki", "--cancel", "--to", "n1")
    assert "--wait" in await platform.refused("switchover", "wiki", "--wait", "0")
    assert (await platform.app())["active"] == active


async def test_three_nodes_planned_switchover_is_carried_out(platform: Platform) -> None:
    """The key in the platform is what counts: the active node hands over at that time, once."""
    active = await platform.running.settled()
    target = platform.others(active)[-1]
    moment = datetime.now().astimezone() + timedelta(seconds=20)
    at = moment.isoformat()
    planned = await platform.json("switchover", "wiki", "--to", target, "--at", at, "--reason", "night")
    assert set(planned) == {"app", "at", "to", "reason", "by", "made"}
    assert platform.running.nodes.actives("wiki") == [active]
    await until(lambda: platform.running.nodes.actives("wiki") == [target], 60)
    assert datetime.now().astimezone() >= moment
    assert (await platform.app())["planned"] is None


async def test_three_nodes_planned_switchover_is_shown_and_called_off(platform: Platform) -> None:
    """``status`` has it; ``--cancel`` says what was planned; a second one that there is nothing."""
    await platform.running.settled()
    await platform.call("switchover", "wiki", "--at", "2099-01-01T00:00", "--to", "n3", "--reason", "night")
    assert "planned already" in await platform.refused("switchover", "wiki", "--at", "2099-01-01T00:00")
    shown = (await platform.app())["planned"]
    assert (shown["to"], shown["reason"]) == ("n3", "night")
    text, _ = await platform.call("status")
    assert "switchover to n3 planned at 2099-01-01" in text
    out, _ = await platform.call("switchover", "wiki", "--cancel")
    assert "called off: switchover to n3 planned at 2099-01-01" in out
    assert (await platform.json("switchover", "wiki", "--cancel", code=1))["cancelled"] is False
    assert (await platform.app())["planned"] is None


async def test_three_nodes_switchover_with_a_database_loses_nothing(with_database: Platform) -> None:
    """While it is written all the time: nothing is left behind, and nothing is set aside."""
    active = await with_database.running.settled()
    await with_database.running.wait_for("confirmed", since_now())
    target = with_database.others(active)[0]
    done = await with_database.json("switchover", "wiki", "--to", target)
    assert (done["active"], done["left_behind"]) == (target, "")
    await with_database.running.settled()
    assert (await with_database.json("db", "diverged", "wiki"))["files"] == []


async def test_three_nodes_switchover_to_a_node_whose_replica_is_silent_is_refused(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """A frozen host's session still lives, so it is a candidate still; nothing is changed."""
    for node in ("n1", "n2", "n3"):
        (tmp_path / node).mkdir()
    database = str(tmp_path / "{node}" / "wiki.db")
    with stage(tmp_path, nats_server, ttl=60.0, database=database) as running:
        platform = Platform(nats_server.url(), tmp_path, running)
        active = await running.settled()
        target = platform.others(active)[0]
        running.nodes[target].freeze(keeper=True)
        said = await platform.refused("switchover", "wiki", "--to", target, code=1)
        assert f"refused: {target} does not say how its replica is; choose another node" in said
        assert running.nodes.actives("wiki") == [active]


# --- failover


async def test_g2_failover_request_for_an_earlier_epoch_ends_nothing(platform: Platform) -> None:
    """A node that was frozen may get it late, when it leads again."""
    active = await platform.running.settled()
    epoch = (await platform.app())["epoch"]
    async with PlatformClient("test", NatsOptions(urls=tuple(platform.running.nats.urls))) as client:
        subject = client.names.control_subject("wiki", "failover")
        request = msgspec.json.encode(FailoverRequest(epoch - 1, None, "late"))
        answer = await client.bus.request(subject, request, timeout=10.0)
        assert "not active" in msgspec.json.decode(answer.data, type=StepDownReply).error
    assert ((await platform.app())["active"], (await platform.app())["epoch"]) == (active, epoch)


async def test_three_nodes_failover_of_a_node_that_answers_ends_it_at_once(platform: Platform) -> None:
    """It needs no grace; what it does is told first; without a terminal it has to be confirmed."""
    active = await platform.running.settled()
    assert "error: --yes" in await platform.refused("failover", "wiki")
    done = await platform.json("failover", "wiki", "--yes", "--to", "n1", "--reason", "it is ill")
    assert set(done) == SWITCHED
    assert (done["previous"], done["active"], done["ended"]) == (active, "n1", "at once")
    assert "no node of that name" in await platform.refused("failover", "wiki", "--yes", "--to", "n9")
    assert "leads already" in await platform.refused("failover", "wiki", "--yes", "--to", "n1")
    assert "no such app" in await platform.refused("failover", "wikki", "--yes")


async def test_three_nodes_failover_on_a_terminal_asks_and_takes_no_for_an_answer(platform: Platform) -> None:
    """What it would do is told before the question; then nothing was changed, exit code 1."""
    active = await platform.running.settled()
    process = await asyncio.create_subprocess_exec(
        "script", "-qec", f"{' '.join(CLI)} failover wiki", "/dev/null",
        env=platform.environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, _ = await process.communicate(b"n\n")
    assert process.returncode == 1
    assert f"fencing: {active} answers" in out.decode()
    assert "fail wiki over to n" in out.decode()
    assert "nothing was changed" in out.decode()
    assert platform.running.nodes.actives("wiki") == [active]


async def test_three_nodes_failover_ends_at_once_at_ctrl_c_instead_of_an_answer(platform: Platform) -> None:
    """It does not wait for the answer that will never come; nothing was changed."""
    active = await platform.running.settled()
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *CLI, "failover", "wiki", env=platform.environment, stdin=theirs, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            await process.stderr.readuntil(b"[y/N] ")
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == exits.INTERRUPTED
    assert b"Traceback" not in err
    assert platform.running.nodes.actives("wiki") == [active]


async def test_g1_failover_of_a_frozen_host_waits_for_the_end_of_its_session(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """By force neither does anybody begin before: the history shows no overlap, and the nominee follows."""
    with stage(tmp_path, nats_server, ttl=10.0, no_failover=("n1",)) as running:
        platform = Platform(nats_server.url(), tmp_path, running)
        active = await running.settled()
        frozen = running.nodes[active]
        frozen.freeze(keeper=True)
        out, _ = await platform.call("failover", "wiki", "--yes", "--to", "n1")
        assert f"{active} does not answer: nobody becomes active before its session is over" in out
        assert f"n1 took over from {active} after" in out
        frozen.thaw(keeper=True)
        running.check()


async def test_three_nodes_failover_says_what_the_database_would_lose(with_database: Platform) -> None:
    """Of a node that answers it is known; the position of the one that follows is told."""
    active = await with_database.running.settled()
    await with_database.running.wait_for("confirmed", since_now())
    target = with_database.others(active)[0]
    out, _ = await with_database.call("failover", "wiki", "--yes", "--to", target)
    assert f"from {active} (epoch" in out
    assert "lost: " in out
    assert f"{target} is" in out
    assert f"{target} took over from {active}" in out


# --- what happened, and why


async def test_three_nodes_failover_show_tells_a_crash_step_by_step(with_database: Platform) -> None:
    """The list has it; the timeline goes from the end that was seen to the answer, with each step."""
    active = await with_database.running.settled()
    killed = since_now()
    with_database.running.nodes[active].kill()
    began = await with_database.running.next_active(killed)

    async def told() -> dict[str, Any] | None:
        listed = (await with_database.json("failover", "show", "--app", "wiki"))["failovers"]
        return next((each for each in listed if each["epoch"] == began.epoch and each["total_seconds"]), None)

    found = await until(told, 60)
    assert found["id"] == f"wiki/{began.epoch}"
    assert (found["node"], found["previous"], found["how"]) == (began.node, active, "session-over")
    assert found["missing"]
    shown = await with_database.json("failover", "show", found["id"])
    assert shown == found
    steps = [step["what"] for step in shown["steps"]]
    for what in ("session over, seen", "key taken", "step seal", "step promote", "step capture", "active"):
        assert what in steps
    assert steps.index("session over, seen") < steps.index("key taken") < steps.index("active")
    assert shown["activation_seconds"] <= shown["healthy_seconds"] <= shown["total_seconds"]
    out, _ = await with_database.call("failover", "show", found["id"])
    assert f"{began.node} took over from {active}" in out
    assert "in all" in out
    assert "app/epoch" in await with_database.refused("failover", "show", "wiki")
    assert "no such failover" in await with_database.refused("failover", "show", "wiki/1")
    assert "no such app" in await with_database.refused("failover", "show", "--app", "nothing")


async def test_three_nodes_why_explains_who_and_why_not_the_others(platform: Platform) -> None:
    """The leader by how it came to lead, a node that never takes over, one that is dead, what is planned."""
    active = await platform.running.settled()
    other = next(node for node in platform.others(active) if node != "n1")
    await platform.call("switchover", "wiki", "--at", "2099-01-01T00:00", "--to", "n1", "--reason", "night")
    found = await platform.json("why", "wiki")
    assert set(found) == {
        "app", "active", "leader", "epoch", "here", "not_there", "waits_for", "hints",
    }  # fmt: skip
    assert (found["active"], found["leader"]) == (active, active)
    because = {each["node"]: each["because"] for each in found["not_there"]}
    assert "never takes over by itself" in because["n1"]
    assert f"{active} leads" in because[other]
    assert "a switchover to n1, planned by" in found["waits_for"][0]
    platform.running.nodes[active].kill()
    await platform.running.nodes.wait_for_active("wiki", other_than=active)
    out, _ = await platform.call("why", "wiki")
    assert f"{other} is active for wiki" in out
    assert f"from {active} (epoch {found['epoch']}), whose session had ended" in out
    assert "no such app" in await platform.refused("why", "wikki")

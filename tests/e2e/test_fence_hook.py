"""The fence command before a takeover: real nodes that die in every way, and real scripts."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import msgspec
import pytest
from tests.e2e.cli import Cli

from phalanx import Fence, NatsOptions, system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.client import PlatformClient
from phalanx.coord.fencer import Fencer
from phalanx.coord.membership import PlatformState
from phalanx.errors import FenceFailed
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry, AuditLog
from phalanx.observe.journal import Journal
from phalanx.observe.metrics import Metrics
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess
from phalanx.testing.stage import Stage, since_now, stage
from phalanx.types import Member, Resource, SessionId

FAILS = "echo no answer from the board >&2; exit 1"


class Hook:
    """A fence script that notes each call, with its arguments and the time, and then does *body*."""

    def __init__(self, tmp_path: Path, body: str = "exit 0", *, arguments: str = "{node} {host}") -> None:
        self.calls_path, self._script = tmp_path / "calls", tmp_path / "fence.sh"
        self.arguments = arguments
        self.does(body)

    def does(self, body: str) -> None:
        """From now on it does *body*."""
        new = self._script.with_suffix(".new")
        new.write_text(f'echo "$(cut -d" " -f1 /proc/uptime) $*" >> {self.calls_path}\n{body}\n')
        new.replace(self._script)

    def declared(self, **options: float) -> dict[str, object]:
        """As settings of the test program."""
        return {"command": f"/bin/sh {self._script} {self.arguments}", "retries": 0, **options}

    def calls(self) -> list[tuple[float, str]]:
        """When it was called (seconds since boot) and with which arguments."""
        lines = self.calls_path.read_text().splitlines() if self.calls_path.exists() else []
        return [(float(at), words) for at, words in (line.split(" ", 1) for line in lines)]


async def registered(resource: Resource) -> None:
    """A keeper that takes note of nothing."""


async def audited(nats: NatsServer, *actions: str, count: int = 1) -> list[AuditEntry]:
    """The entries of these actions, once there are so many: they are delivered a little later."""
    async with PlatformClient("test", NatsOptions(urls=tuple(nats.urls))) as client, asyncio.timeout(10):
        while True:
            found = [entry for entry in await client.audit(limit=1000) if entry.action in actions]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)


async def until_called(s: Stage, hook: Hook, times: int = 1) -> None:
    """Wait for so many calls."""
    await s.nodes.wait_until(lambda: len(hook.calls()) >= times, 15, f"not called {times} times")


async def test_dead_host_is_fenced_before_anything_starts(nats_server: NatsServer, tmp_path: Path) -> None:
    """Node and keeper killed: the command runs once with node and host, then the next section begins."""
    hook = Hook(tmp_path, "sleep 0.3; echo chassis power is off")
    with stage(tmp_path, nats_server, count=3, ttl=1.0, fence=hook.declared()) as s:
        active = await s.settled()
        killed = since_now()
        s.nodes[active].kill_both()
        began = await s.next_active(killed)
        host = socket.gethostname()
        ((called, words),) = hook.calls()
        assert words == f"{active} {host}"
        assert called + 0.25 < began.at
        fencing, done = await audited(nats_server, "fencing", "fence-done", count=2)
        assert (fencing.action, done.action) == ("fencing", "fence-done")
        assert fencing.details["fenced_node"] == active
        assert "the command said: chassis power is off" in done.reason
        assert done.duration_seconds is not None
        assert done.duration_seconds >= 0.3
        log = s.nodes[began.node].log()
        assert f"fencing node {active}: chassis power is off" in log
        s.check()


async def test_node_that_ended_its_session_itself_is_not_fenced(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """SIGTERM, a step-down, SIGKILL of the node alone (its keeper releases): no command, no delay."""
    hook = Hook(tmp_path, FAILS)
    with stage(tmp_path, nats_server, count=3, fence=hook.declared()) as s:
        for end in ("kill", "terminate"):
            active = await s.settled()
            ended = since_now()
            getattr(s.nodes[active], end)()
            began = await s.next_active(ended)
            assert began.node != active
            s.nodes[active].wait(20)
            s.nodes[active].start()
        await s.settled()
        assert hook.calls() == []
        s.check()


@pytest.mark.alone
async def test_failing_command_keeps_the_app_from_starting_until_an_operator_confirms(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """It is tried again with growing delays by all who could lead; an operator's word ends that at once."""
    hook = Hook(tmp_path, FAILS)
    cli = Cli(nats_server.url(), tmp_path, "test")
    with stage(tmp_path, nats_server, count=3, ttl=1.0, fence=hook.declared(retries=1, delay=0.05)) as s:
        active = await s.settled()
        refused = await cli.refused("fence", active, "--confirm-off")
        assert "its session lives" in refused
        killed = since_now()
        s.nodes[active].kill_both()
        await until_called(s, hook, 6)
        assert s.history.events("active", since=killed) == []
        failed = await audited(nats_server, "fence-failed", "activation-failed", count=4)
        assert {"fence-failed", "activation-failed"} == {entry.action for entry in failed}
        assert len({entry.node for entry in failed}) == 2, "both that are left have tried"
        assert "exited with code 1: no answer from the board" in failed[0].reason
        assert f"phalanx fence {active} --confirm-off" in failed[0].reason
        confirmed = since_now()
        out, _ = await cli.call("fence", active, "--confirm-off")
        assert "an operator's word" in out
        began = await s.next_active(confirmed)
        assert began.at - confirmed < 5.0
        (word,) = await audited(nats_server, "fence-confirmed")
        assert word.details["fenced_node"] == active
        s.check()


async def test_hanging_command_is_killed_with_all_that_it_started(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """After its timeout; then it is run again, and that helps."""
    pids = tmp_path / "pids"
    hook = Hook(tmp_path, f"sleep 1000 & echo $! $$ >> {pids}; wait")
    with stage(tmp_path, nats_server, count=2, ttl=1.0, fence=hook.declared(timeout=0.3)) as s:
        active = await s.settled()
        killed = since_now()
        s.nodes[active].kill_both()
        await until_called(s, hook, 2)
        hook.does("exit 0")
        await s.next_active(killed)
        for pid in pids.read_text().split():
            await s.nodes.wait_until(lambda p=int(pid): not system.is_running(p), 2, f"{pid} runs")
        failed = await audited(nats_server, "fence-failed")
        assert "did not end within 0.3 s" in failed[0].reason
        s.check()


async def test_node_that_comes_back_needs_no_fencing_any_more(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Its keeper has ended what the earlier life left: whoever waited for the fencing goes on."""
    hook = Hook(tmp_path, FAILS)
    with stage(tmp_path, nats_server, count=2, ttl=1.0, fence=hook.declared()) as s:
        active = await s.settled()
        killed = since_now()
        s.nodes[active].kill_both()
        await until_called(s, hook, 2)
        assert s.history.events("active", since=killed) == []
        s.nodes[active].start()
        await s.next_active(killed)
        s.check()


async def test_two_apps_of_one_dead_node_are_fenced_once(nats_server: NatsServer, tmp_path: Path) -> None:
    """The command runs once; a second dead leader of the same app is fenced too, and the first not again."""
    hook = Hook(tmp_path, "sleep 0.2")
    apps = ("wiki", "blog")
    with stage(tmp_path, nats_server, count=2, ttl=1.0, apps=apps, fence=hook.declared()) as s:
        active = await s.settled()
        other = next(n.node for n in s.nodes if n.node != active)
        await s.nodes.wait_until(lambda: any(n.is_active("blog") for n in s.nodes), 10, "no blog")
        if not s.nodes[active].is_active("blog"):
            async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
                await client.step_down("blog", to=active)
        await s.nodes.wait_for_standbys("blog", 1)
        s.nodes[active].kill_both()
        for app in apps:
            await s.nodes.wait_for_active(app, other_than=active)
        assert [words.split()[0] for _, words in hook.calls()] == [active]
        s.nodes[active].start()
        await s.nodes.wait_for_standbys("wiki", 1)
        s.nodes[other].kill_both()
        await s.nodes.wait_for_active("wiki", other_than=other)
        await s.nodes.wait_for_active("blog", other_than=other)
        assert [words.split()[0] for _, words in hook.calls()] == [active, other]
        s.check()


async def test_leader_that_dies_while_it_fences_leaves_both_to_the_next(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """n1 dead, its successor dies in the middle of the command: the third fences both before it starts."""
    pids = tmp_path / "pids"
    hook = Hook(tmp_path, f"sleep 1000 & echo $$ $! > {pids}; wait")
    with stage(tmp_path, nats_server, count=3, ttl=1.0, fence=hook.declared(timeout=60.0)) as s:
        first = await s.settled()
        killed = since_now()
        s.nodes[first].kill_both()
        await s.nodes.wait_until(lambda: pids.exists() and pids.read_text().strip(), 15, "not called")

        def found() -> str:
            return next((n.node for n in s.nodes if n.is_running and activating(n)), "")

        second = await s.nodes.wait_until(found, 5, "nobody")
        hook.does("exit 0")
        s.nodes[second].kill_both()
        await s.nodes.wait_until(
            lambda: not any(map(runs, pids.read_text().split())), 5, "it outlives its node"
        )
        began = await s.next_active(killed)
        assert began.node not in (first, second)
        assert {words.split()[0] for at, words in hook.calls() if at <= began.at} == {first, second}
        s.check()


async def test_node_without_a_command_starts_nothing_and_leaves_it_to_one_that_has_it(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """n1 dies silently: n2 gives the key back with n1 still to be fenced; n3 does that, then starts."""
    hook = Hook(tmp_path)
    with stage(tmp_path, nats_server, count=3, ttl=1.0, fence=hook.declared()) as s:
        await s.settled()
        for name in ("n2", "n3"):
            s.nodes[name].terminate()
            s.nodes[name].wait(20)
        active = await s.nodes.wait_for_active("wiki")
        assert active == "n1"
        without = json.loads(s.nodes["n2"].env["PHALANX_TEST"])
        del without["fence"]
        s.nodes["n2"].env["PHALANX_TEST"] = json.dumps(without)
        s.nodes["n2"].start()
        await s.nodes.wait_for_standbys("wiki", 1)
        killed = since_now()
        s.nodes["n1"].kill_both()
        failed = await audited(nats_server, "fence-failed", count=2)
        assert {entry.node for entry in failed} == {"n2"}
        assert "this node declares no fence command" in failed[0].reason
        assert hook.calls() == []
        assert s.history.events("active", since=killed) == []
        s.nodes["n3"].start()
        began = await s.next_active(killed)
        assert began.node == "n3"
        ((called, words),) = hook.calls()
        assert words.startswith("n1 ")
        assert called < began.at
        s.check()


async def test_fencer_forgets_whom_nobody_has_fenced_any_more(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Over years there are many dead sessions: nothing is kept of one when the last takeover is done."""
    hook, names = Hook(tmp_path), Names("test")
    fence = Fence(f"/bin/sh {tmp_path}/fence.sh {hook.arguments}".split(), retries=0)
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)), name="test", ping_interval=1.0)
    try:
        await create_stream(bus, bucket_config(names, names.platform_bucket, None, history=1, replicas=1))
        audit = AuditLog(names, "n2", tmp_path / "audit")
        journal = Journal(audit, Metrics("test", "n2", "1"))
        state = PlatformState(bus, names)
        fencer = Fencer(fence, bus, names, "n2", state, journal, registered, lambda _: None)
        died = SessionId.new("n1")
        await asyncio.gather(*(fencer.fence(app, 7, (died,)) for app in ("wiki", "blog", "shop")))
        assert len(hook.calls()) == 1
        hook.does(FAILS)
        with pytest.raises(FenceFailed):
            await fencer.fence("wiki", 8, (SessionId.new("n3"),))
        assert fencer.sessions == 0
        audit.close()
    finally:
        await bus.close()


def runs(pid: str) -> bool:
    """Whether the process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def activating(node: NodeProcess) -> bool:
    """Whether it is just becoming active."""
    return any(app["role"] == "activating" for app in node.status().get("apps", ()))


async def test_by_hand_the_command_of_the_file_runs_and_is_noted(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """``phalanx fence NODE`` for each app where the command names it; failing it is exit code 1."""
    hook = Hook(tmp_path, "echo off", arguments="{node} {app}")
    (tmp_path / "phalanx.toml").write_text(
        '[platform]\nname = "test"\n'
        f'[fence]\ncommand = "/bin/sh {tmp_path}/fence.sh {{node}} {{app}}"\nretries = 0\n'
        '[apps.wiki]\npattern = "active-passive"\n'
    )
    cli = Cli(nats_server.url(), tmp_path, "test")
    with stage(tmp_path, nats_server, count=2, apps=("wiki", "blog")) as s:
        await s.settled()
        shown = await cli.json("fence", "n1", "--config", "phalanx.toml")
        assert (shown["node"], shown["said"]) == ("n1", "off")
        assert sorted(words for _, words in hook.calls()) == ["n1 blog", "n1 wiki"]
        assert len(await audited(nats_server, "fence-confirmed", count=2)) == 2
        hook.does(FAILS)
        error = await cli.refused("fence", "n1", "--config", "phalanx.toml", code=1)
        assert "node n1 is not fenced: the command exited with code 1: no answer" in error
        assert "no member of this platform" in await cli.refused("fence", "n9", "--confirm-off")
        assert "no fence command is declared" in await cli.refused("fence", "n1")


async def test_g1_member_that_the_watch_has_from_before_that_session_proves_nothing(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The watch of who fences still has the dead node's last life but one: the command runs all the same."""
    hook, names = Hook(tmp_path), Names("test")
    fence = Fence(f"/bin/sh {tmp_path}/fence.sh {hook.arguments}".split(), retries=0)
    before, died = SessionId.new("n1"), SessionId.new("n1")
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)), name="test", ping_interval=1.0)
    try:
        await create_stream(bus, bucket_config(names, names.platform_bucket, None, history=1, replicas=1))
        state = PlatformState(bus, names)  # not started: its watch is as late as can be
        state.members["n1"] = Member("n1", before, 0.0, "1", "old-host")
        subject = names.key_subject(names.platform_bucket, names.member_key("n1"))
        await bus.write(subject, msgspec.json.encode(Member("n1", died, 1.0, "1", "host-1")))
        audit = AuditLog(names, "n2", tmp_path / "audit")
        journal = Journal(audit, Metrics("test", "n2", "1"))
        fencer = Fencer(fence, bus, names, "n2", state, journal, registered, lambda _: None)
        await fencer.fence("wiki", 7, (before,))
        assert hook.calls() == []
        await fencer.fence("wiki", 7, (died,))
        assert [words for _, words in hook.calls()] == ["n1 host-1"]
        audit.close()
    finally:
        await bus.close()

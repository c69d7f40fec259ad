"""A node restarts in a pause: its process, container or systemd unit runs on. Real engines, nodes, kills."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from tests.systemd_units import command_line, remove_unit, systemctl, write_unit

from phalanx import system
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.keeper import note
from phalanx.keeper.warden import NAME
from phalanx.testing.dockerd import DockerDaemon
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess, Nodes

TTL = 1.0
AWAY_SECONDS = 2.5
"""Longer than the session would last without renewals."""
GAP_SECONDS = 2.0
"""No program waits so long for the processor, not even on a busy machine; every restart takes longer: its
node is away for AWAY_SECONDS."""

TICKS = (
    "run=${INVOCATION_ID:-${PHALANX_SECTION:-$(hostname)}}; "
    'while read now rest < /proc/uptime; do echo "$PHALANX_EPOCH $run $now"; sleep 0.01; done >> "$0/ticks"'
)
"""A program for sh that writes down its epoch, which process, container or unit's start it is, and when."""


class Tick(NamedTuple):
    """One line of a program."""

    epoch: int
    run: str
    at: float


class Engine(Protocol):
    """What runs the program."""

    ends_alone: bool
    """Whether a program of its ends without node, keeper and warden."""

    def declare(self, node: str, command: list[str], folder: Path) -> str:
        """The lines below ``[apps.wiki.backend]``."""
        ...

    def running(self) -> list[str]:
        """All that runs of any node, as it calls itself."""
        ...

    def crash(self, run: str) -> None:
        """SIGKILL that program itself."""
        ...

    def close(self) -> None:
        """Nothing of it is left."""
        ...


class DockerEngine:
    """Containers of a real dockerd."""

    ends_alone = False

    def __init__(self, dockerd: DockerDaemon) -> None:
        self._dockerd, self._image = dockerd, dockerd.busybox_image()

    def declare(self, node: str, command: list[str], folder: Path) -> str:
        """See ``Engine.declare``."""
        return (
            f'type = "docker"\nimage = "{self._image}"\ncommand = {toml_list(command)}\nstop_timeout = "1s"\n'
            f'volumes = ["{folder}:{folder}"]\nsocket = "{self._dockerd.socket}"\n'
        )

    def running(self) -> list[str]:
        """See ``Engine.running``: the beginnings of their ids, which are their host names."""
        return self._dockerd.docker("ps", "--quiet", "--filter", "label=phalanx.app=wiki").split()

    def crash(self, run: str) -> None:
        """See ``Engine.crash``."""
        self._dockerd.docker("kill", run)

    def close(self) -> None:
        """See ``Engine.close``."""
        for one in self._dockerd.docker("ps", "--all", "--quiet").split():
            self._dockerd.try_docker("rm", "--force", one)


class HolderEngine:
    """Processes, whose parent is the holder of their node."""

    ends_alone = True

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def declare(self, node: str, command: list[str], folder: Path) -> str:
        """See ``Engine.declare``."""
        return f'type = "process"\ncommand = {toml_list(command)}\nstop_timeout = "1s"\n'

    def running(self) -> list[str]:
        """See ``Engine.running``: their marks."""
        return list(self._found())

    def _found(self) -> dict[str, int]:
        """The process of each mark."""
        found: dict[str, int] = {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            if self._folder in system.command_line(pid) and system.is_running(pid):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                marks = [
                    entry for entry in environment if entry.startswith(system.MARKER_ENV.encode() + b"=")
                ]
                if marks and os.getsid(pid) == pid:
                    found[marks[0].decode().partition("=")[2]] = pid
        return found

    def crash(self, run: str) -> None:
        """See ``Engine.crash``."""
        os.kill(self._found()[run], signal.SIGKILL)

    def close(self) -> None:
        """See ``Engine.close``."""
        for pid in self._found().values():
            os.kill(pid, signal.SIGKILL)


class SystemdEngine:
    """Units of a real systemd, one of each node."""

    ends_alone = False

    def __init__(self) -> None:
        self._names: list[str] = []

    def declare(self, node: str, command: list[str], folder: Path) -> str:
        """See ``Engine.declare``."""
        name = f"phalanx-adopt-{folder.name}-{node}.service"
        write_unit(name, f"ExecStart={command_line(command)}")
        self._names.append(name)
        return f'type = "systemd"\nunit = "{name}"\nstop_timeout = "1s"\n'

    def running(self) -> list[str]:
        """See ``Engine.running``: their invocation ids."""
        return [run for name in self._names if (run := self._run_of(name))]

    def _run_of(self, name: str) -> str:
        if systemctl("is-active", name, check=False) in ("inactive", "failed"):
            return ""
        return systemctl("show", "-P", "InvocationID", name)

    def crash(self, run: str) -> None:
        """See ``Engine.crash``."""
        (name,) = (name for name in self._names if self._run_of(name) == run)
        os.kill(int(systemctl("show", "-P", "MainPID", name)), signal.SIGKILL)

    def close(self) -> None:
        """See ``Engine.close``."""
        for name in self._names:
            remove_unit(name)


def toml_list(words: list[str]) -> str:
    """*words* as TOML, none of which has an apostrophe."""
    return "[" + ", ".join(f"'{word}'" for word in words) + "]"


class Adopting:
    """Two nodes with one app, whose program writes down ticks."""

    def __init__(self, engine: Engine, nodes: Nodes, client: PlatformClient, folder: Path) -> None:
        self.engine, self.nodes, self.client, self._ticks = engine, nodes, client, folder / "ticks"

    def ticks(self, since: float = 0.0) -> list[Tick]:
        """All since then. The program's clock has steps of 10 ms."""
        lines = self._ticks.read_text().splitlines()[:-1] if self._ticks.exists() else []
        found = (Tick(int(e), run, float(at)) for e, run, at in (line.split() for line in lines))
        return [tick for tick in found if tick.at >= since - 0.01]

    def longest_gap(self, since: float) -> float:
        """The longest time without a tick, up to this moment."""
        moments = [since, *(tick.at for tick in self.ticks(since)), system.now()]
        return max(after - before for before, after in pairwise(moments))

    async def paused(self) -> tuple[NodeProcess, Tick]:
        """The active node, once it is paused and its keeper knows; the last word of its program."""
        active = await self.nodes.wait_for_active("wiki")
        await self.nodes.wait_for_standbys("wiki", 1)
        await self.until(lambda: len(self.ticks()) > 2, "the program does not run")
        await self.client.pause("wiki")
        node = self.nodes[active]
        await self.until(lambda: note.read(node.data_dir), "the keeper does not know of the pause")
        last = self.ticks()[-1]
        assert self.engine.running() == [last.run]
        return node, last

    async def keeper_alone(self) -> tuple[NodeProcess, Tick, note.KeeperNote]:
        """As ``paused``; then the node is killed: its keeper goes on, and has noticed."""
        node, last = await self.paused()
        node.kill()
        kept = note.read(node.data_dir)
        assert kept is not None
        await self.until(lambda: (node.data_dir / note.SOCKET).exists(), "the keeper is not alone yet")
        return node, last, kept

    async def until(self, condition: Callable[[], object], problem: str, seconds: float = 10.0) -> None:
        """Wait for it."""
        await self.nodes.wait_until(condition, seconds, problem)

    async def taken_over(self, node: NodeProcess, last: Tick) -> Tick:
        """Wait until the other node's program runs; its first word. The old one has said nothing since."""
        await self.nodes.wait_for_active("wiki", other_than=node.node)
        await self.until(lambda: self.ticks()[-1].epoch > last.epoch, "no later program runs")
        return self.check_apart(last)

    def check_apart(self, last: Tick) -> Tick:
        """One program runs, of a later epoch, and began after the old one: its first word."""
        ticks = self.ticks()
        first = next(tick for tick in ticks if tick.epoch > last.epoch)
        assert all(tick.at <= first.at for tick in ticks if tick.run == last.run)
        assert {tick.run for tick in ticks if tick.epoch == last.epoch} == {last.run}
        assert self.engine.running() == [ticks[-1].run]
        return first


@pytest.fixture(params=["process", "docker", pytest.param("systemd", marks=pytest.mark.in_systemd)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """Each in turn."""
    if request.param == "docker":
        return DockerEngine(request.getfixturevalue("dockerd"))
    if request.param == "process":
        return HolderEngine(tmp_path)
    return SystemdEngine()


@pytest.fixture
async def s(engine: Engine, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Adopting]:
    """Two nodes, started."""
    command = ["/bin/sh", "-c", TICKS, str(tmp_path)]
    for node in ("n1", "n2"):
        (tmp_path / f"{node}.toml").write_text(
            f'[platform]\nname = "test"\n[timings]\nttl = "{TTL}s"\n'
            '[apps.wiki]\npattern = "active-passive"\n'
            f"[apps.wiki.backend]\n{engine.declare(node, command, tmp_path)}"
        )
    run = f"exec {sys.executable} -m phalanx.cli.main run {tmp_path}/$PHALANX_NODE.toml"
    try:
        with Nodes(["/bin/sh", "-c", run], nats_server.urls, count=2) as nodes:
            async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
                yield Adopting(engine, nodes, client, tmp_path)
    finally:
        engine.close()


@pytest.mark.parametrize("how", ["terminated", "killed"])
async def test_node_restarts_in_a_pause_and_what_it_ran_runs_on(s: Adopting, how: str) -> None:
    """The same container or start of the unit, the same epoch, no gap; then it steps down as ever."""
    node, last = await s.paused()
    began, keeper = system.now(), node.keeper_pid
    if how == "terminated":
        node.terminate()
        assert node.wait() == 0
    else:
        node.kill()
    await asyncio.sleep(AWAY_SECONDS)
    node.start()
    assert await s.nodes.wait_for_active("wiki") == node.node
    status = node.status()["apps"][0]
    assert (status["epoch"], status["program"]["restarts"], node.keeper_pid) == (last.epoch, 0, keeper)
    await s.client.resume("wiki")
    await asyncio.sleep(TTL)  # the end of the pause moves nothing either
    assert {(tick.epoch, tick.run) for tick in s.ticks(began)} == {(last.epoch, last.run)}
    gap = s.longest_gap(began)
    print(f"longest gap between words of the program: {1000 * gap:.0f} ms")
    assert gap < GAP_SECONDS
    assert s.engine.running() == [last.run]
    done = await s.client.step_down("wiki")
    assert done.active != node.node
    await s.taken_over(node, last)
    await s.nodes.wait_for_standbys("wiki", 1)


async def test_adopted_program_ends_after_the_pause_and_is_started_again(s: Adopting) -> None:
    """The next life follows what it has taken up: its end is seen, and it restarts in place."""
    node, last = await s.paused()
    node.kill()
    node.start()
    await s.nodes.wait_for_active("wiki")
    await s.client.resume("wiki")
    s.engine.crash(last.run)
    await s.until(lambda: s.ticks()[-1].run != last.run, "it is not started again")
    assert s.ticks()[-1].epoch == last.epoch
    assert await s.nodes.wait_for_active("wiki") == node.node
    assert s.engine.running() == [s.ticks()[-1].run]


async def test_program_ends_while_its_node_is_away(s: Adopting) -> None:
    """It is not started before the pause is over; then on the same node."""
    node, last = await s.paused()
    node.kill()
    s.engine.crash(last.run)
    node.start()
    reason = "while the node was away"
    await s.until(lambda: reason in node.get("/status")[1].decode(), "it is not told")
    assert s.engine.running() == []
    await s.client.resume("wiki")
    await s.until(lambda: s.ticks()[-1].run != last.run, "it is not started again")
    assert s.ticks()[-1].epoch == last.epoch
    assert await s.nodes.wait_for_active("wiki") == node.node


async def test_resumed_while_the_node_is_away(s: Adopting) -> None:
    """The keeper ends what it has kept, then another node takes over; the first comes back as a standby."""
    node, last = await s.paused()
    node.kill()
    killed = system.now()
    await s.until(lambda: s.ticks()[-1].at > killed, "the program has ended with its node")
    await s.client.resume("wiki")
    await s.taken_over(node, last)
    assert note.read(node.data_dir) is None
    node.start()
    await s.nodes.wait_for_standbys("wiki", 1)
    s.check_apart(last)


async def test_keeper_alone_in_a_pause_is_killed(s: Adopting) -> None:
    """Its warden ends what runs, well before the session does; nobody takes over before the resume."""
    node, last, keeper = await s.keeper_alone()
    killed = system.now()
    os.kill(keeper.pid, signal.SIGKILL)
    await s.until(lambda: not s.engine.running(), "the warden does not end it")
    last_word = s.ticks()[-1].at
    print(f"said its last {1000 * (last_word - killed):.0f} ms after the keeper's end")
    assert last_word - killed < TTL / 2
    await asyncio.sleep(2 * TTL)
    assert s.engine.running() == []
    node.start()  # with a note of a keeper that is dead
    await s.nodes.wait_for_standbys("wiki", 2)
    assert s.engine.running() == []
    await s.client.resume("wiki")
    await s.nodes.wait_for_active("wiki")
    await s.until(lambda: s.ticks()[-1].epoch > last.epoch, "no later program runs")
    s.check_apart(last)


async def test_g1_keeper_alone_in_a_pause_is_stopped(s: Adopting) -> None:
    """It renews no more, and would end nothing: its warden kills it, and ends what runs."""
    node, last, keeper = await s.keeper_alone()
    stopped = system.now()
    os.kill(keeper.pid, signal.SIGSTOP)
    await s.until(lambda: not s.engine.running(), "nobody ends it")
    print(f"said its last {1000 * (s.ticks()[-1].at - stopped):.0f} ms after the keeper's stop")
    await s.until(lambda: not keeper.lives, "the keeper still is there")
    await s.client.resume("wiki")
    await s.taken_over(node, last)
    node.start()
    await s.nodes.wait_for_standbys("wiki", 1)
    s.check_apart(last)


@pytest.mark.parametrize("warden", [True, False])
async def test_node_and_keeper_killed_in_a_pause_then_started(s: Adopting, warden: bool) -> None:
    """Nothing of the old life runs on, or twice: its warden ends it, or else the next life does."""
    node, last = await s.paused()
    second = warden_of(node.keeper_pid)
    if not warden:
        os.kill(second, signal.SIGSTOP)
    node.kill_both()
    if not warden:
        if s.engine.ends_alone:
            await s.until(lambda: not s.engine.running(), "its holder does not end it")
        else:
            assert s.engine.running() == [last.run]
        os.kill(second, signal.SIGKILL)
    node.start()
    await s.nodes.wait_for_standbys("wiki", 2)
    assert s.engine.running() == []
    over = s.ticks()[-1]
    assert over.run == last.run
    await s.client.resume("wiki")
    await s.nodes.wait_for_active("wiki")
    await s.until(lambda: s.ticks()[-1].epoch > last.epoch, "no later program runs")
    s.check_apart(last)


def warden_of(keeper: int) -> int:
    """The warden of that keeper, a child of any of its threads."""
    threads = Path(f"/proc/{keeper}/task").iterdir()
    children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    (found,) = (int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == NAME)
    return found


async def until(condition: Callable[[], Any], problem: str, seconds: float = 20.0) -> Any:
    """Wait until it is true: its value."""
    deadline = system.now() + seconds
    while not (value := await asyncio.to_thread(condition)):
        assert system.now() < deadline, problem
        await asyncio.sleep(0.05)
    return value


def node_took_up(service: str) -> bool:
    """Whether the service's log says that its node goes on with what ran."""
    command = ["journalctl", "--output=cat", "--no-pager", f"--unit={service}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    return "adopted unit" in said or "adopted process" in said


@pytest.mark.in_systemd
@pytest.mark.parametrize("kind", ["unit", "process"])
async def test_service_of_the_node_is_restarted_in_a_pause(
    nats_server: NatsServer, tmp_path: Path, kind: str
) -> None:
    """``systemctl restart phalanx``, its unit as documented: keeper and program outlive the node."""
    engine = SystemdEngine() if kind == "unit" else HolderEngine(tmp_path)
    service = f"phalanx-{kind}-{tmp_path.name}.service"
    toml, state_dir = tmp_path / "n1.toml", tmp_path / "data"
    toml.write_text(
        '[platform]\nname = "test"\nnode = "n1"\n[apps.wiki]\npattern = "active-passive"\n'
        f"[apps.wiki.backend]\n{engine.declare('n1', ['/bin/sh', '-c', TICKS, str(tmp_path)], tmp_path)}"
    )
    environment = {
        "PHALANX_DATA": state_dir, "PHALANX_NATS": nats_server.url(), "PYTHONPATH": os.environ["PYTHONPATH"],
        "PATH": os.environ["PATH"],
    }  # fmt: skip
    write_unit(
        service,
        "Type=notify",
        f"ExecStart={command_line([sys.executable, '-m', 'phalanx.cli.main', 'run', str(toml)])}",
        "KillMode=process",
        "Delegate=yes",
        *(f"Environment={name}={value}" for name, value in environment.items()),
    )
    try:
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            await asyncio.to_thread(systemctl, "start", service)
            await until(engine.running, "the unit does not run")
            await client.pause("wiki")
            kept = await until(lambda: note.read(state_dir), "the keeper does not know of the pause")
            before, node = engine.running(), systemctl("show", "-P", "MainPID", service)
            await asyncio.to_thread(systemctl, "restart", service)
            assert systemctl("show", "-P", "MainPID", service) != node
            await until(lambda: node_took_up(service), "it has not taken up what ran")
            assert engine.running() == before
            assert kept.lives
            await client.resume("wiki")
            await asyncio.to_thread(systemctl, "stop", service)
            assert engine.running() == []
    finally:
        remove_unit(service)
        engine.close()

"""What becomes of programs when node and keeper are killed at once: the warden's work, on real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phalanx import NatsOptions, system
from phalanx.client import PlatformClient
from phalanx.keeper import warden
from phalanx.keeper.fencing import Registry
from phalanx.keeper.warden import NAME, Warden, take_lock
from phalanx.testing.holders import holder_of
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import NodeProcess, Nodes
from phalanx.testing.stage import stage
from phalanx.types import Resource

# A daemon in a session of its own, whose parent has ended; and a program that ignores every other signal.
FORKS = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(1000)
os.wait()
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(1000)
"""


def wardens_of(node: NodeProcess) -> list[int]:
    """The wardens of the node's present keeper."""
    threads = Path(f"/proc/{node.keeper_pid}/task").iterdir()  # each has children of its own
    children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == NAME]


def processes(pids: Path, count: int = 2) -> list[system.ProcessRef]:
    """The processes that were written down, once there are so many."""
    lines = pids.read_text().splitlines() if pids.exists() else []
    return [system.ProcessRef.of(int(pid)) for pid in lines] if len(lines) >= count else []


@dataclass(frozen=True)
class Forking:
    """Nodes, the active of which runs ``FORKS``. ``pids``: the file with those of all its lives."""

    nodes: Nodes
    node: NodeProcess
    pids: Path

    async def running(self) -> list[system.ProcessRef]:
        """Wait until both of its processes run."""
        return await self.nodes.wait_until(lambda: processes(self.pids), 10, "no programs")

    async def gone(self, victims: list[system.ProcessRef], seconds: float) -> None:
        """Wait at most *seconds* until none of them is left."""
        await self.nodes.wait_until(lambda: not any(v.alive() for v in victims), seconds, "they go on")


@asynccontextmanager
async def forking(
    nats_server: NatsServer, tmp_path: Path, count: int = 1, **settings: Any
) -> AsyncGenerator[Forking]:
    """*count* nodes for ``FORKS``, one of them active. *settings*: see ``stage``."""
    script, pids = tmp_path / "forks.py", tmp_path / "pids"
    script.write_text(FORKS)
    command = f"{sys.executable} {script} {pids}"
    with stage(tmp_path, nats_server, count=count, backend=command, hooks=False, **settings) as s:
        yield Forking(s.nodes, s.nodes[await s.settled()], pids)


async def test_g1_node_and_keeper_killed_at_once_a_daemonised_child_is_gone_within_a_second(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The kernel kills the program itself; the warden what that has started, before another node begins."""
    async with forking(nats_server, tmp_path, count=2) as s:
        victims = await s.running()
        assert all(one.alive() for one in victims)
        (warden,) = wardens_of(s.node)
        s.node.kill_both()
        killed = system.now()
        await s.gone(victims, 1.0)
        print(f"gone after {1000 * (system.now() - killed):.0f} ms")
        await s.nodes.wait_until(lambda: not system.is_running(warden), 2.0, "the warden goes on")
        log = s.node.log()
        assert "the keeper died: killing what it has kept: wiki." in log
        assert "all of it is gone after" in log
        await s.nodes.wait_for_active("wiki", other_than=s.node.node)


async def test_g1_all_four_killed_while_nats_is_away_the_next_life_ends_what_is_left_all_the_same(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Node, keeper, warden and holder: nobody is left to end a daemonised child. A node without NATS
    does it before all else."""
    async with forking(nats_server, tmp_path, ttl=1.0) as s:
        node = s.node
        victims = await s.running()
        nats_server.kill(0)
        holder = holder_of(node.data_dir)
        os.kill(holder, signal.SIGSTOP)
        for warden in wardens_of(node):
            os.kill(warden, signal.SIGKILL)
        node.kill_both()
        os.kill(holder, signal.SIGKILL)
        assert any(one.alive() for one in victims)
        node.start()
        await s.gone(victims, 5.0)


async def test_g1_holder_ends_what_is_left_when_node_keeper_and_warden_are_killed_at_once(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A daemonised child as well, and then itself; nobody has to start the node again for that."""
    async with forking(nats_server, tmp_path, ttl=1.0) as s:
        node = s.node
        victims = await s.running()
        for warden in wardens_of(node):
            os.kill(warden, signal.SIGKILL)
        node.kill_both()
        await s.gone(victims, 10.0)
        await s.nodes.wait_until(lambda: not holder_of(node.data_dir), 10.0, "the holder goes on")


async def test_node_that_is_started_again_at_once_loses_nothing_of_its_new_life(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The new keeper waits for the old warden's lock; what it starts then is killed by nobody."""
    async with forking(nats_server, tmp_path, ttl=1.0) as s:
        node = s.node
        victims = list[system.ProcessRef]()
        for life in range(1, 4):
            victims = await s.nodes.wait_until(
                lambda n=2 * life: processes(s.pids, n), 20, "the programs did not start"
            )
            assert all(one.alive() for one in victims[-2:])
            assert not any(one.alive() for one in victims[:-2])
            await s.nodes.wait_until(lambda: node.is_active("wiki"), 20, "not active")
            if life < 3:
                node.kill_both()
                node.start()
        await asyncio.sleep(0.5)
        assert all(one.alive() for one in victims[-2:])
        assert node.is_active("wiki")


async def test_keeper_dies_alone_and_the_new_one_has_a_warden_of_its_own(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Node and old warden both end the section; the next session begins with a new keeper and warden."""
    async with forking(nats_server, tmp_path, ttl=1.0) as s:
        node = s.node
        await s.running()
        (old,) = wardens_of(node)
        node.kill_keeper()
        victims = await s.nodes.wait_until(lambda: processes(s.pids, 4), 20, "it did not start again")
        assert not any(one.alive() for one in victims[:2])
        assert all(one.alive() for one in victims[2:])
        assert not system.is_running(old)
        assert len(wardens_of(node)) == 1
        assert node.is_running


async def test_graceful_end_dismisses_the_warden(nats_server: NatsServer, tmp_path: Path) -> None:
    """It ends with its keeper, kills nothing and says nothing; the lock is free."""
    with stage(tmp_path, nats_server, count=1, backend="sleep 1000", hooks=False) as s:
        node = s.nodes[await s.settled()]
        (warden,) = wardens_of(node)
        node.terminate()
        assert node.wait(20) == 0
        await s.nodes.wait_until(lambda: not system.is_running(warden), 2.0, "the warden goes on")
        assert "the keeper died" not in node.log()
        system.lock_file(node.data_dir / "warden.lock").release()


async def test_dead_warden_is_replaced_and_reported(nats_server: NatsServer, tmp_path: Path) -> None:
    """SIGKILL of the warden: no failover, an audit entry, and the next one does the work as well."""
    async with forking(nats_server, tmp_path) as s:
        node = s.node
        victims = await s.running()
        (first,) = wardens_of(node)
        os.kill(first, signal.SIGKILL)
        (second,) = await s.nodes.wait_until(
            lambda: (found := wardens_of(node)) and found != [first] and found, 10, "no new warden"
        )
        assert second != first
        assert system.process_start_time(first) == 0, "it was waited for"
        await s.nodes.wait_until(lambda: holds_lock(second, node), 20, "the new one has no lock")
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            async with asyncio.timeout(20):
                while not (found := [e for e in await client.audit() if e.action == "warden-exited"]):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert f"process {first}) has ended: killed by signal 9" in found[0].reason
        assert node.is_active("wiki")
        node.kill_both()
        await s.gone(victims, 1.5)


def holds_lock(pid: int, node: NodeProcess) -> bool:
    """Whether *pid* has the lock file open."""
    path = str(node.data_dir / "warden.lock")
    return any(os.readlink(entry) == path for entry in Path(f"/proc/{pid}/fd").iterdir())


async def test_warden_is_small_and_sleeps(nats_server: NatsServer, tmp_path: Path) -> None:
    """What it has for itself is below 8 MiB, and in a second it uses no processor time at all."""
    with stage(tmp_path, nats_server, count=1) as s:
        node = s.nodes[await s.settled()]
        (warden,) = wardens_of(node)
        kept = open_descriptors(warden)
        assert len(kept) <= 6, kept  # the standard three, the channel, the lock, the node

        def used() -> int:
            fields = Path(f"/proc/{warden}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = used()
        await asyncio.sleep(1.0)
        assert used() == before
        sizes = sizes_of(warden)
        private = sizes["Private_Clean:"] + sizes["Private_Dirty:"]
        print(f"private {private} KiB, PSS {sizes['Pss:']} KiB, RSS {sizes['Rss:']} KiB")
        assert private < 8 * 1024


def sizes_of(pid: int) -> dict[str, int]:
    """Its memory in KiB, as proc_pid_smaps(5) has it."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in rollup[1:]}


def open_descriptors(pid: int) -> dict[str, str]:
    """What *pid* has open."""
    return {entry.name: os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}


async def test_g1_keeper_stopped_and_node_killed_the_warden_ends_what_is_left(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Nobody else would, until the node is started again: the keeper cannot see that its node is dead."""
    async with forking(nats_server, tmp_path, ttl=1.0) as s:
        node = s.node
        victims = await s.running()
        keeper = system.ProcessRef.of(node.keeper_pid)
        (warden,) = wardens_of(node)
        os.kill(holder_of(node.data_dir), signal.SIGSTOP)  # it would do that too
        try:
            node.freeze_keeper()
            node.kill()
            await s.gone(victims, 10.0)
        finally:
            os.kill(holder_of(node.data_dir), signal.SIGCONT)
        assert not keeper.alive()
        await s.nodes.wait_until(lambda: not system.is_running(warden), 10.0, "the warden goes on")
        assert f"the keeper, process {keeper.pid}, stands still: killing it" in node.log()


# --- the parts


@pytest.fixture
def sleeper(tmp_path: Path) -> Generator[tuple[Resource, system.ProcessRef]]:
    """A marked process, registered in tmp_path as if a keeper had done it."""
    marker = "wiki.1.0123456789abcdef"
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {system.MARKER_ENV: marker}, setsid=True)
    process = system.ProcessRef.of(pid)
    resource = Resource("process", marker, "wiki", 1, pid, process.start_time)
    Registry(tmp_path).add(resource)
    yield resource, process
    if process.alive():
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


async def test_end_of_the_channel_without_a_goodbye_kills(
    tmp_path: Path, sleeper: tuple[Resource, system.ProcessRef]
) -> None:
    """A spawned warden, its channel closed: the process dies, and the lock is free only after that."""
    process = sleeper[1]
    lock = await take_lock(tmp_path)
    warden = Warden.spawn()
    warden.tell(tmp_path, lock)
    assert lock is not None
    lock.release()
    with pytest.raises(BlockingIOError):
        system.lock_file(tmp_path / "warden.lock")
    assert process.alive()
    warden._channel.close()  # pyright: ignore[reportPrivateUsage]
    freed = await take_lock(tmp_path)
    assert freed is not None
    assert not process.alive()
    freed.release()
    assert await asyncio.to_thread(os.waitpid, warden.pid, 0) == (warden.pid, 0)


async def test_goodbye_kills_nothing(tmp_path: Path, sleeper: tuple[Resource, system.ProcessRef]) -> None:
    """Told, dismissed: it ends with 0, and the process lives."""
    warden = Warden.spawn()
    warden.tell(tmp_path, None)
    warden.goodbye()
    assert await asyncio.to_thread(os.waitpid, warden.pid, 0) == (warden.pid, 0)
    assert sleeper[1].alive()


async def test_lock_that_is_held_for_long_is_an_error_that_names_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that is no keeper is not killed."""
    monkeypatch.setattr("phalanx.keeper.warden.LOCK_WAIT_SECONDS", 0.3)
    monkeypatch.setattr("phalanx.keeper.warden.LOCK_PATIENCE_SECONDS", 0.1)
    held = system.lock_file(tmp_path / "warden.lock")
    with pytest.raises(TimeoutError, match=f"locked by process {os.getpid()}"):
        await take_lock(tmp_path)
    held.release()


async def test_frozen_keeper_of_an_earlier_life_is_killed(nats_server: NatsServer, tmp_path: Path) -> None:
    """SIGSTOP of the keeper, SIGKILL of the node, and a new start: nobody has to help."""
    async with forking(nats_server, tmp_path, ttl=1.0) as s:
        node = s.node
        await s.running()
        keeper = system.ProcessRef.of(node.keeper_pid)
        node.freeze_keeper()
        node.kill()
        node.start()
        victims = await s.nodes.wait_until(lambda: processes(s.pids, 4), 30, "it did not start again")
        assert not keeper.alive()
        assert not any(one.alive() for one in victims[:2])
        assert all(one.alive() for one in victims[2:])


def test_registered_file_of_another_boot_is_nobodys_business(tmp_path: Path) -> None:
    """What the file names ran before this boot: nothing is left over."""
    Registry(tmp_path).add(Resource("process", "wiki.1.ab", "wiki", 1))
    saved = json.loads((tmp_path / "registered.json").read_bytes())
    (tmp_path / "registered.json").write_text(json.dumps({**saved, "boot_id": "another"}))
    assert Registry(tmp_path).left_over() == []


async def test_keeper_of_another_node_that_has_got_the_old_pid_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old keeper is dead, its warden still busy: whoever has the pid in the lock file by now lives on."""
    monkeypatch.setattr(warden, "LOCK_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(warden, "LOCK_WAIT_SECONDS", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(60)", "phalanx.keeper"]
    busy = system.lock_file(tmp_path / "warden.lock")  # by this process, as if it were that warden
    with subprocess.Popen(command) as other:  # noqa: ASYNC220 - returns at once
        try:
            (tmp_path / "warden.lock").write_text(f"{other.pid}\n")
            with pytest.raises(TimeoutError, match=f"locked by process {other.pid}"):
                await warden.take_lock(tmp_path)
            assert other.poll() is None
        finally:
            busy.release()
            other.kill()

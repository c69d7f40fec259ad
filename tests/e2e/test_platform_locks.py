"""Locks of the platform: from nodes with different apps, from clients, and as an operator sees them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.e2e.cli import CLI, Cli
from tests.waiting import until

from phalanx import (
    BusError,
    ConfigError,
    LockLost,
    LockTimeout,
    NatsOptions,
    Platform,
    Secret,
    SessionLost,
    StartError,
)
from phalanx.bus import permissions
from phalanx.client import PlatformClient
from phalanx.testing.nats import NatsServer

TTL = 4.0


def make(name: str, nats: NatsServer, folder: Path, *apps: str, login: NatsOptions | None = None) -> Platform:
    platform = Platform(
        "prod",
        node=name,
        nats=login or nats.url(),
        data_dir=str(folder / name),
        http={"enabled": False},
        timings={"ttl": TTL},
    )
    for app in apps:
        platform.app(app)
    return platform


@pytest.fixture
async def nodes(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[tuple[Platform, Platform]]:
    """Two nodes that have no app in common."""
    async with (
        make("n1", nats_server, tmp_path, "wiki") as n1,
        make("n2", nats_server, tmp_path, "shop") as n2,
    ):
        yield n1, n2


async def test_platform_lock_is_the_same_on_nodes_with_other_apps(nodes: tuple[Platform, Platform]) -> None:
    """What one node holds is closed to the other; who waits gets it in turn; holder and waiters are seen."""
    n1, n2 = nodes
    async with n1.lock("backup-window", timeout=20) as held:
        with pytest.raises(LockTimeout, match=r"held by n1\."):
            async with n2.lock("backup-window", timeout=0):
                pytest.fail("held twice")
        waiting = asyncio.create_task(n2.locks.acquire("backup-window", timeout=30))
        async with asyncio.timeout(20):
            while True:
                seen = await n2.locks.holder("backup-window")
                assert seen is not None
                if seen.waiters:
                    break
                await asyncio.sleep(0.02)
        assert (seen.node, seen.token, [each.node for each in seen.waiters]) == ("n1", held.token, ["n2"])
    got = await waiting
    assert got.token > held.token
    await got.release()


async def test_platform_lock_is_lost_with_the_session(nats_server: NatsServer, tmp_path: Path) -> None:
    """The keeper dies: the holder is told at once, and its block is cancelled; another node gets it soon."""
    async with make("n2", nats_server, tmp_path) as n2:
        async with make("n1", nats_server, tmp_path) as n1:
            with pytest.raises(LockLost):  # noqa: PT012
                async with n1.lock("x", timeout=20, cancel=True):
                    assert n1._node is not None
                    assert n1._node.session is not None
                    os.kill(n1._node.session.keeper_pid, signal.SIGKILL)
                    await asyncio.sleep(60)
        async with n2.lock("x", timeout=30):
            pass


async def test_platform_lock_is_free_when_its_node_stops(nats_server: NatsServer, tmp_path: Path) -> None:
    """An orderly stop tells the holder, and frees what it held without waiting for a TTL."""
    async with make("n2", nats_server, tmp_path) as n2:
        n1 = make("n1", nats_server, tmp_path)
        await n1.start()
        held = await n1.locks.acquire("x", timeout=20)
        await n1.stop()
        assert held.lost.is_set()
        async with n2.lock("x", timeout=30):
            pass
        with pytest.raises(StartError):
            n1.lock("x")


async def test_platform_semaphore_over_nodes_and_clients(
    nodes: tuple[Platform, Platform], nats_server: NatsServer
) -> None:
    """Two permits for two nodes and a client."""
    n1, n2 = nodes
    async with PlatformClient("prod", NatsOptions(urls=(nats_server.url(),))) as client:
        first = await n1.semaphore("imports", permits=2).acquire(timeout=20)
        second = await client.semaphore("imports", permits=2).acquire(timeout=20)
        with pytest.raises(LockTimeout):
            await n2.semaphore("imports", permits=2).acquire(timeout=0.3)
        with pytest.raises(ConfigError, match="has 2 permits now"):
            await n2.semaphore("imports", permits=3).acquire(timeout=5)
        await first.release()
        async with n2.semaphore("imports", permits=2).hold(timeout=20) as third:
            assert first.token < second.token < third.token
        await second.release()


# --- clients


async def test_client_holds_locks_by_a_session_of_its_own(
    nodes: tuple[Platform, Platform], nats_server: NatsServer
) -> None:
    """Of the platform and of an app; both are free for nodes when the client ends."""
    n1, _ = nodes
    async with PlatformClient("prod", NatsOptions(urls=(nats_server.url(),))) as client:
        async with client.lock("x", timeout=20) as held, client.lock("x", app="wiki", timeout=20):
            held.check()
            with pytest.raises(LockTimeout, match=r"held by client-"):
                await n1.locks.acquire("x", timeout=0)
            with pytest.raises(LockTimeout, match=r"held by client-"):
                await n1.apps["wiki"].locks.acquire("x", timeout=0)
        left = await client.locks().acquire("x", timeout=20)
    assert left.lost.is_set()
    async with n1.lock("x", timeout=20) as ours:
        assert ours.token > left.token


async def test_client_outlives_its_ttl_and_loses_without_nats(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """It renews its session; when NATS is away too long it is told by its clock; later it has another one."""
    async with (
        make("n1", nats_server, tmp_path),
        PlatformClient("prod", NatsOptions(urls=(nats_server.url(),))) as client,
    ):
        async with client.lock("x", timeout=20) as held:
            await asyncio.sleep(1.5 * TTL)
            held.check()
        held = await client.locks().acquire("y", timeout=20)
        nats_server.kill()
        try:
            await asyncio.wait_for(held.lost.wait(), 30)
        finally:
            nats_server.start()
        await held.release()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(StartError, SessionLost, BusError, LockTimeout):
                    again = await client.locks().acquire("y", timeout=10)
                    break
                await asyncio.sleep(0.2)
        assert again.token > held.token
        await again.release()


def test_client_without_a_loop(nats_server: NatsServer, tmp_path: Path) -> None:
    """The same in a plain ``with``."""

    async def run(started: asyncio.Event, ended: asyncio.Event) -> None:
        async with make("n1", nats_server, tmp_path):
            started.set()
            await ended.wait()

    async def main() -> None:
        started, ended = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(run(started, ended))
        await started.wait()
        await asyncio.to_thread(plain)
        ended.set()
        await running

    def plain() -> None:
        with Platform.client("prod", nats_server.url()) as client:
            with client.lock("x", timeout=20) as held:
                held.check()
                assert held.is_held
                with pytest.raises(LockTimeout), client.lock("x", timeout=0):
                    pytest.fail("held twice")
            with pytest.raises(ZeroDivisionError), client.semaphore("s", permits=1, timeout=20):
                raise ZeroDivisionError
            with client.semaphore("s", permits=1, timeout=20) as permit:
                assert permit.token

    asyncio.run(main())


CLIENT = """
import asyncio, sys
from phalanx import NatsOptions
from phalanx.client import PlatformClient

async def main():
    async with PlatformClient("prod", NatsOptions(urls=(sys.argv[1],))) as client:
        async with client.lock("x", timeout=20) as held:
            print(held.token, flush=True)
            await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_killed_client_holds_up_others_for_its_ttl(
    nodes: tuple[Platform, Platform], nats_server: NatsServer
) -> None:
    """A client has no keeper: what it held is free when its session has run out, with a larger token."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, nats_server.url(), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            token = int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()
    async with nodes[0].lock("x", timeout=30) as held:
        assert held.token > token


# --- the command line


async def test_lock_commands(
    nodes: tuple[Platform, Platform], nats_server: NatsServer, tmp_path: Path
) -> None:
    """What is held is listed and shown; a release by force reaches holder, next one, audit log."""
    n1, n2 = nodes
    cli = Cli(nats_server.url(), tmp_path)
    assert "no lock is held" in (await cli.call("lock", "list"))[0]
    assert "nobody holds it" in (await cli.call("lock", "show", "x", code=1))[0]
    held = await n1.locks.acquire("x", timeout=20)
    permit = await n1.apps["wiki"].semaphore("s", permits=2).acquire(timeout=20)
    waiting = asyncio.create_task(n2.locks.acquire("x", timeout=60))
    async with asyncio.timeout(30):
        while not (shown := await cli.json("lock", "show", "x"))["waiters"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (shown["app"], shown["kind"], shown["name"], shown["permits"]) == ("", "lock", "x", 1)
    assert [(each["node"], each["token"]) for each in shown["holders"]] == [("n1", held.token)]
    assert [(each["node"], each["tasks"]) for each in shown["waiters"]] == [("n2", 1)]
    listed = (await cli.json("lock", "list"))["locks"]
    assert [(each["app"], each["kind"], each["name"]) for each in listed] == [
        ("", "lock", "x"),
        ("wiki", "semaphore", "s"),
    ]
    assert [each["name"] for each in (await cli.json("lock", "list", "wiki"))["locks"]] == ["s"]
    assert "1 of 2 permits" in (await cli.call("lock", "show", "s", "--app", "wiki", "--semaphore"))[0]
    assert "HELD BY" in (await cli.call("lock", "list"))[0]
    done = await cli.json("lock", "release", "x", "--yes")
    assert (done["node"], done["token"], done["successor"]) == ("n1", held.token, "n2")
    await asyncio.wait_for(held.lost.wait(), 20)
    assert "taken away by" in held.lost_reason
    with pytest.raises(LockLost, match="taken away by"):
        held.check()
    got = await asyncio.wait_for(waiting, 20)
    assert got.token > held.token
    assert not await n2.locks.is_current("x", held.token)
    assert await n2.locks.is_current("x", got.token)
    await held.release()  # takes nothing from the next one
    got.check()
    await got.release()
    entries, _ = await cli.call("audit")
    assert "lock-taken-away" in entries
    await cli.call(
        "lock", "release", "s", "--app", "wiki", "--semaphore", "--token", str(permit.token), "--yes"
    )
    await asyncio.wait_for(permit.lost.wait(), 20)
    await permit.release()


async def test_lock_commands_refuse_bad_input(
    nodes: tuple[Platform, Platform], nats_server: NatsServer, tmp_path: Path
) -> None:
    """Unknown apps, names that are none, free locks, no terminal to ask on, several holders."""
    cli = Cli(nats_server.url(), tmp_path)
    assert "no such app" in await cli.refused("lock", "list", "blog")
    assert "no such app" in await cli.refused("lock", "show", "x", "--app", "blog")
    assert "lock = 'a b'" in await cli.refused("lock", "show", "a b")
    assert "nobody holds it" in await cli.refused("lock", "release", "x", "--yes")
    assert "give --yes" in await cli.refused("lock", "release", "x")
    permits = [await nodes[0].semaphore("s", permits=2).acquire(timeout=20) for _ in range(2)]
    assert "it has 2 holders" in await cli.refused("lock", "release", "s", "--semaphore", "--yes")
    assert "with token 1" in await cli.refused("lock", "release", "s", "--semaphore", "--token", "1", "--yes")
    for each in permits:
        each.check()
        await each.release()


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
async def test_lock_release_asks_first(
    nodes: tuple[Platform, Platform], nats_server: NatsServer, tmp_path: Path, answer: str, code: int
) -> None:
    """On a terminal it says what it breaks, and takes a no for a no."""
    held = await nodes[0].locks.acquire("x", timeout=20)
    cli = Cli(nats_server.url(), tmp_path)
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *CLI, "lock", "release", "x", env=cli.environment, cwd=tmp_path, stdin=theirs,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    try:
        async with asyncio.timeout(60):
            _, err = await process.communicate()
    finally:
        os.close(ours)
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == code
    assert b"only what checks tokens is safe" in err
    if code:
        held.check()
    else:
        await until(held.lost.is_set)
    await held.release()


USERS = ("prod-node", "prod-operator", "prod-viewer", "prod-app-wiki")


def login(server: NatsServer, user: str) -> str:
    return server.url().replace("://", f"://{user}:pw-{user}@")


async def test_g5_lock_commands_as_each_login(tmp_path: Path) -> None:
    """The operator lists, shows and releases; viewers and apps, whose clients are others, do nothing."""
    conf = permissions.render("prod", ["wiki"], passwords={user: f"pw-{user}" for user in USERS})
    with NatsServer(extra=conf, system_user=False) as server:
        node = NatsOptions(urls=(server.url(),), user="prod-node", password=Secret("pw-prod-node"))
        async with make("n1", server, tmp_path, "wiki", login=node) as n1:
            held = await n1.locks.acquire("x", timeout=20)
            ours = await n1.apps["wiki"].locks.acquire("y", timeout=20)
            operator = Cli(login(server, "prod-operator"), tmp_path)
            names = [each["name"] for each in (await operator.json("lock", "list"))["locks"]]
            assert names == ["x", "y"]
            viewer = Cli(login(server, "prod-viewer"), tmp_path)
            assert (await viewer.run("lock", "show", "x"))[0] == 3
            assert (await viewer.run("lock", "release", "x", "--yes"))[0] == 3
            assert (await Cli(login(server, "prod-app-wiki"), tmp_path).run("lock", "list"))[0] == 3
            held.check()
            await operator.call("lock", "release", "x", "--yes")
            await operator.call("lock", "release", "y", "--app", "wiki", "--yes")
            await asyncio.wait_for(held.lost.wait(), 20)
            await asyncio.wait_for(ours.lost.wait(), 20)
            await held.release()
            await ours.release()
            guest = NatsOptions(
                urls=(server.url(),), user="prod-operator", password=Secret("pw-prod-operator")
            )
            async with PlatformClient("prod", guest) as client:
                with pytest.raises(StartError, match="log in as the nodes do"):
                    await client.locks().acquire("x", timeout=20)

"""A platform's identity: what vanished is reported, never silently made anew."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx import IdentityError, Platform, Role, StartError
from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.testing.nats import NatsServer


def platform(nats: NatsServer, directory: Path, node: str = "n1", name: str = "test") -> Platform:
    made = Platform(
        name,
        node=node,
        nats=nats.urls,
        data_dir=str(directory),
        http={"enabled": False},
        timings={"ttl": 2},
    )
    made.app("wiki")
    return made


async def run_once(made: Platform) -> int:
    """Run it until it is active; its epoch."""
    async with made:
        await made.wait_for_role("wiki", Role.ACTIVE)
        return made.apps["wiki"].epoch


async def delete(nats: NatsServer, stream: str) -> None:
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats.urls)), name="test", ping_interval=1.0)
    await bus.api(f"STREAM.DELETE.{stream}", {})
    await bus.close()


async def exists(nats: NatsServer, stream: str) -> bool:
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats.urls)), name="test", ping_interval=1.0)
    names = await bus.api("STREAM.NAMES", {})
    await bus.close()
    return stream in (names.get("streams") or [])


async def test_g2_epochs_grow_across_restarts_of_everything(nats_server: NatsServer, tmp_path: Path) -> None:
    """Node and server restarted: the next reign's epoch is larger."""
    first = await run_once(platform(nats_server, tmp_path / "a"))
    nats_server.kill()
    nats_server.start()
    assert await run_once(platform(nats_server, tmp_path / "b", "n2")) > first


async def test_vanished_app_bucket_is_reported_and_not_made_anew(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Any node, known or new, refuses to start; the bucket stays away."""
    await run_once(platform(nats_server, tmp_path / "a"))
    await delete(nats_server, "KV_test_wiki")
    for directory, node in (("a", "n1"), ("b", "n2")):
        with pytest.raises(IdentityError, match=r"bucket 'test_wiki' .* is gone.*docs/operations\.md"):
            await platform(nats_server, tmp_path / directory, node).start()
    assert not await exists(nats_server, "KV_test_wiki")


async def test_vanished_platform_bucket_is_reported_and_not_made_anew(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A node that knew the platform refuses to start."""
    await run_once(platform(nats_server, tmp_path / "a"))
    await delete(nats_server, "KV_test_platform")
    with pytest.raises(IdentityError, match=r"bucket 'test_platform' is gone"):
        await platform(nats_server, tmp_path / "a").start()
    assert not await exists(nats_server, "KV_test_platform")


async def test_another_platform_of_the_same_name_is_refused(nats_server: NatsServer, tmp_path: Path) -> None:
    """The node's NATS was replaced by one that has another platform of this name."""
    await run_once(platform(nats_server, tmp_path / "a"))
    with NatsServer() as other:
        await run_once(platform(other, tmp_path / "b"))
        with pytest.raises(IdentityError, match="belongs to platform"):
            await platform(other, tmp_path / "a").start()


async def test_two_nodes_in_one_data_directory_are_refused(nats_server: NatsServer, tmp_path: Path) -> None:
    """The second one is told which process has it."""
    async with platform(nats_server, tmp_path / "a"):
        with pytest.raises(StartError, match="give each node its own data_dir"):
            await platform(nats_server, tmp_path / "a", "n2").start()


async def test_bucket_that_vanishes_while_active_deposes_the_node(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """After a reconnection that finds no leader key the active node stands down at once."""
    async with platform(nats_server, tmp_path / "a") as running:
        await running.wait_for_role("wiki", Role.ACTIVE)
        await delete(nats_server, "KV_test_wiki")
        nats_server.kill()
        nats_server.start()
        async with asyncio.timeout(15):
            while running.apps["wiki"].role is Role.ACTIVE:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_g2_bucket_made_anew_by_the_operator_goes_on_above_all_epochs(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """``phalanx recreate-bucket``: refused while the bucket is there; afterwards the app runs again."""
    first = await run_once(platform(nats_server, tmp_path / "a"))
    command = [sys.executable, "-m", "phalanx.cli.main", "recreate-bucket", "wiki", "--platform", "test"]
    command += ["--nats", nats_server.url()]

    def recreate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    refused = await asyncio.to_thread(recreate)
    assert refused.returncode == 2
    assert "is there" in refused.stderr
    await delete(nats_server, "KV_test_wiki")
    made = await asyncio.to_thread(recreate)
    assert made.returncode == 0, made.stderr
    assert await run_once(platform(nats_server, tmp_path / "a")) > first + 1_000_000

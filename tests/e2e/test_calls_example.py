"""The examples with calls, as a user runs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from tests.e2e.cli import Cli

from phalanx.testing.nats import NatsServer, Ports
from phalanx.testing.nodes import Nodes

ROOT = Path(__file__).parents[2]


async def test_orders_are_counted_through_a_hand_over(tmp_path: Path, nats_server: NatsServer) -> None:
    """Orders placed on one node count on the next; wrong ones are refused by the handler's own code."""
    cli = Cli(nats_server.url(), tmp_path)
    command = (sys.executable, "-m", "examples.orders")
    with Nodes(command, nats_server.urls, count=2, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}) as nodes:
        active = await nodes.wait_for_active("orders")
        await nodes.wait_for_standbys("orders", 1)
        place = ("call", "orders", "place", '{"item": "apple", "count": 3}', "--wait", "30")
        assert json.loads((await cli.call(*place))[0]) == {"item": "apple", "total": 3}
        await cli.call("stepdown", "orders")
        assert json.loads((await cli.call(*place))[0]) == {"item": "apple", "total": 6}
        nodes[active].kill()
        total = ("call", "orders", "total", '"apple"', "--wait", "30")
        assert json.loads((await cli.call(*total))[0]) == 6
        wrong = await cli.refused("call", "orders", "place", '{"item": "apple", "count": 0}', code=1)
        assert "nothing-ordered" in wrong


@asynccontextmanager
async def shop(nats: NatsServer) -> AsyncIterator[httpx.AsyncClient]:
    """The web service of the example as a process of its own, and a client of it."""
    ports = Ports()
    port = str(ports.take())
    ports.close()
    env = {**os.environ, "PHALANX_NATS": nats.url(), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = (sys.executable, "-m", "uvicorn", "examples.shop:app", "--port", port, "--log-level", "warning")
    process = await asyncio.create_subprocess_exec(*command, env=env, cwd=ROOT)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            async with asyncio.timeout(60):
                while True:
                    assert process.returncode is None
                    with contextlib.suppress(httpx.TransportError):
                        await client.get("/nothing")
                        break
                    await asyncio.sleep(0.05)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def test_web_service_calls_across(tmp_path: Path, nats_server: NatsServer) -> None:
    """Requests to a service that is no node go on while the app that it calls moves, and after a crash."""
    cli = Cli(nats_server.url(), tmp_path)
    command = (sys.executable, "-m", "examples.orders")
    with Nodes(command, nats_server.urls, count=2, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}) as nodes:
        active = await nodes.wait_for_active("orders")
        await nodes.wait_for_standbys("orders", 1)
        async with shop(nats_server) as web:
            moving = asyncio.create_task(cli.call("stepdown", "orders"))
            placed = unknown = 0
            while not moving.done() or placed < 20:
                answer = await web.post("/orders", json={"item": "apple", "count": 2})
                if answer.status_code == 502:  # a machine too busy to end a handler within two seconds
                    assert answer.json()["code"] == "interrupted"
                    unknown += 1
                    continue
                placed += 1
                assert answer.status_code == 201
                assert 2 * placed <= answer.json()["total"] <= 2 * (placed + unknown)
            await moving
            other = await nodes.wait_for_active("orders", other_than=active)
            await nodes.wait_for_standbys("orders", 1)
            nodes[other].kill()
            async with asyncio.timeout(120):
                while (answer := await web.get("/orders/apple")).status_code != 200:
                    assert answer.json()["code"] in ("no-leader", "deadline")
            assert 2 * placed <= answer.json()["total"] <= 2 * (placed + unknown)
            answer = await web.post("/orders", json={"item": "apple", "count": 0})
            assert (answer.status_code, answer.json()["code"]) == (422, "nothing-ordered")
            answer = await web.post("/orders", json={"item": "apple", "count": "two"})
            assert (answer.status_code, "$.count" in answer.json()["error"]) == (400, True)

"""The partitioned cache, as a user runs it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.waiting import until

from phalanx import Key, NatsOptions, partition_of
from phalanx.client import PlatformClient
from phalanx.client_ring import report
from phalanx.errors import BusError, ConfigError, PlatformNotFound
from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import Nodes

ROOT = Path(__file__).parents[2]
KEYS = [f"customer-{number}" for number in range(30)]


async def settled(client: PlatformClient, counts: dict[str, int]) -> None:
    """Wait until these nodes serve so many partitions."""

    async def serving() -> dict[str, int]:
        try:
            nodes = (await report(client, "cache")).nodes
        except (ConfigError, BusError, PlatformNotFound):  # no node has made it yet
            return {}
        return {node.node: node.serving for node in nodes if node.is_live and node.serving}

    async with asyncio.timeout(60):
        while await serving() != counts:  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.1)


async def test_cache_keeps_its_keys_while_nodes_come_and_go(nats_server: NatsServer) -> None:
    """Each key is held by the owner of its partition and moves with it; after a kill all are answered."""
    command = (sys.executable, "-m", "examples.cache")
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    with Nodes(command, nats_server.urls, count=2, env=env) as nodes:
        async with PlatformClient("prod", NatsOptions(urls=tuple(nats_server.urls))) as client:
            api = client.api("cache")
            await settled(client, {"n1": 32, "n2": 32})
            for key in KEYS:
                await api.call("put", {"key": key, "value": key.upper()}, to=Key(key), timeout=60)
            nodes["n1"].terminate()
            assert nodes["n1"].wait(30) == 0
            for key in KEYS:
                assert await api.call("get", key, to=Key(key), timeout=60) == key.upper()
            nodes["n1"].start()
            await settled(client, {"n1": 32, "n2": 32})
            for key in KEYS:
                assert await api.call("get", key, to=Key(key), timeout=60) == key.upper()
            holders = {await api.call("put", {"key": k, "value": "new"}, to=Key(k), timeout=60) for k in KEYS}
            assert holders == {"n1", "n2"}
            assert len({partition_of(key, 64) for key in KEYS}) > 2
            nodes["n2"].kill()
            await until(lambda: not nodes["n2"].is_running)
            for key in KEYS:  # what was not saved is lost with its node, but everybody is answered
                assert await api.call("get", key, to=Key(key), timeout=60) in (
                    "NEW",
                    "new",
                    key.upper(),
                    None,
                )

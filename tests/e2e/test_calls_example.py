"""The example with calls, as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.e2e.cli import Cli

from phalanx.testing.nats import NatsServer
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

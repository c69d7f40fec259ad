"""What operators see of a pool and do with it, and the example with a pool, as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.e2e.cli import Cli

from phalanx.testing.nats import NatsServer
from phalanx.testing.nodes import Nodes

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}


async def test_scheduler_gives_its_jobs_to_a_pool_whatever_happens_to_its_nodes(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """The example: jobs are done by both workers; a killed node and a scaled pool lose none."""
    cli = Cli(nats_server.url(), tmp_path)
    command = (sys.executable, "-m", "examples.jobs")
    with Nodes(command, nats_server.urls, count=3, env=ENV) as nodes:
        await nodes.wait_for_active("scheduler")
        await nodes.wait_until(lambda: len(nodes.actives("workers")) == 2, 30, "not two workers")
        await cli.call("call", "scheduler", "submit", json.dumps(list(range(60))), "--wait", "30")
        nodes[nodes.actives("workers")[0]].kill()
        await cli.call("scale", "workers", "1")
        found: dict[str, list[int | str]] = {}
        while len(found) < 60:
            found = json.loads((await cli.call("call", "scheduler", "results", "--wait", "30"))[0])
        assert {int(number): done[0] for number, done in found.items()} == {n: n * n for n in range(60)}


async def test_operator_sees_and_scales_a_pool(tmp_path: Path, nats_server: NatsServer) -> None:
    """status, app, why, health, scale; what is for one active node is refused, and says what to do."""
    cli = Cli(nats_server.url(), tmp_path)
    command = (sys.executable, "-m", "examples.jobs")
    with Nodes(command, nats_server.urls, count=2, env=ENV) as nodes:
        await nodes.wait_for_active("scheduler")
        await nodes.wait_for_standbys("scheduler", 1)
        await nodes.wait_until(lambda: len(nodes.actives("workers")) == 2, 30, "not two workers")
        listed = {each["app"]: each for each in (await cli.json("app", "list"))["apps"]}
        assert {name: each["pattern"] for name, each in listed.items()} == {
            "scheduler": "active-passive",
            "workers": "pool",
        }
        shown = await cli.json("app", "show", "workers")
        assert (shown["active"], shown["methods"]) == (["n1", "n2"], ["square"])
        assert shown["pool"]["replicas"] == 2
        await nodes.wait_until(lambda: len(nodes.actives("workers")) == 2, 30, "not two workers")
        assert "2 of 2 instances active" in (await cli.call("status"))[0]
        assert "2 of 2 instances are active" in (await cli.call("why", "workers"))[0]
        await cli.call("health")

        done = await cli.json("scale", "workers", "5")
        assert (done["before"], done["replicas"], done["is_reset"]) == (2, 5, False)
        await nodes.wait_until(
            lambda: nodes["n1"].status()["apps"][1]["pool"]["replicas"] == 5, 30, "it does not know"
        )
        assert "2 of 5 instances active" in (await cli.call("status"))[0]
        assert "fewer nodes (2) than instances wanted (5)" in (await cli.call("why", "workers"))[0]
        await cli.call("scale", "workers", "0")
        await nodes.wait_until(lambda: not nodes.actives("workers"), 30, "they stay active")
        assert "0 of 0 instances active" in (await cli.call("app", "show", "workers"))[0]
        assert (
            "2 instances wanted, as declared (0 before)" in (await cli.call("scale", "workers", "--reset"))[0]
        )

        for words in (("stepdown", "workers"), ("switchover", "workers"), ("failover", "workers", "--yes")):
            assert "it is a pool" in await cli.refused(*words)
        assert "it is no pool, but active-passive" in await cli.refused("scale", "scheduler", "2")
        assert "no such app" in await cli.refused("scale", "nothing", "2")
        assert "no number of instances" in await cli.refused("scale", "workers", "many")
        assert "neither a number nor --reset" in await cli.refused("scale", "workers")
        assert "no such app" in await cli.refused("app", "show", "nothing")

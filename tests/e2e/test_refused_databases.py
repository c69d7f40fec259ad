"""A database that can only be seen to be unusable when the node tries to lead."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.test_database import database_stage

from phalanx.preflight import SQLITE_MAGIC
from phalanx.testing.nats import NatsServer


async def test_one_node_whose_database_is_damaged_says_why_it_is_only_a_standby(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Between two attempts, too: whoever looks at the status sees what keeps the app from running."""
    folder = tmp_path / "n1"
    folder.mkdir()
    (folder / "wiki.db").write_bytes(SQLITE_MAGIC + bytes(range(256)) * 64)
    with database_stage(tmp_path, nats_server, count=1) as running:
        node = running.nodes["n1"]

        def failed_again() -> bool:
            apps = node.status().get("apps", [])
            return any(
                "failed 2 times in a row: " in app["reason"] and str(folder / "wiki.db") in app["reason"]
                for app in apps
                if app["role"] == "standby"
            )

        await running.nodes.wait_until(failed_again, 30, "it does not say why")

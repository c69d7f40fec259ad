"""Databases that cannot be used: known before the start where that is possible, else said by the status."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.test_database import database_stage

from phalanx import ConfigError, Platform, SQLite
from phalanx.preflight import SQLITE_MAGIC
from phalanx.testing.nats import NatsServer


async def test_one_node_whose_activation_fails_says_why_it_is_only_a_standby(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Between two attempts, too: whoever looks at the status sees what keeps the app from running."""
    (tmp_path / "n1").mkdir()
    with database_stage(tmp_path, nats_server, count=1, fault="fail") as running:
        node = running.nodes["n1"]

        def failed_again() -> bool:
            apps = node.status().get("apps", [])
            return any(
                "failed 2 times in a row: " in app["reason"] and "told to fail" in app["reason"]
                for app in apps
                if app["role"] == "standby"
            )

        await running.nodes.wait_until(failed_again, 30, "it does not say why")


@pytest.mark.parametrize("is_locked", [False, True])
async def test_platform_whose_database_is_damaged_or_locked_starts_nothing(
    tmp_path: Path, nats_server: NatsServer, is_locked: bool
) -> None:
    """One line says which file it is; neither folders nor streams are made, and no node leads in vain."""
    file, data = tmp_path / "wiki.db", tmp_path / "data"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (x)")
        if is_locked:
            connection.execute("BEGIN EXCLUSIVE")
        else:
            file.write_bytes(SQLITE_MAGIC + bytes(range(256)) * 64)
        platform = Platform("prod", node="n1", data_dir=str(data), nats=nats_server.url())
        platform.app("wiki", database=SQLite(file))
        with pytest.raises(ConfigError, match="locked" if is_locked else "no sound SQLite") as raised:
            await platform.start()
        assert (raised.value.key, raised.value.value) == ("apps.wiki.database.path", str(file))
        assert raised.value.remedy
    assert os.listdir(tmp_path) == ["wiki.db"]

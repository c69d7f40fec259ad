"""A node that alone has no connection, while its keeper has one, gives its session up, and returns."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from phalanx import Platform, Role
from phalanx.ports import Connection
from phalanx.testing.nats import NatsServer


async def test_g9_node_that_gave_its_session_up_is_a_candidate_again(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """It stands down after a TTL without a connection, and once it has one again it becomes active again."""
    platform = Platform(
        "prod",
        node="n1",
        nats=nats_server.urls,
        data_dir=str(tmp_path / "data"),
        timings={"ttl": "1s"},
        http={"port": 0},
    )
    app = platform.app("wiki")
    failing = platform.app("failing")

    @failing.on_start
    async def fail() -> None:
        raise RuntimeError("told to fail")

    async with platform:
        await platform.wait_for_role("wiki", Role.ACTIVE)
        first = app.epoch
        node = platform._live  # pyright: ignore[reportPrivateUsage]
        # Node and keeper log in alike, so no proxy can cut the one without the other.
        node._on_connection(Connection.DISCONNECTED)  # pyright: ignore[reportPrivateUsage]
        await platform.wait_for_role("wiki", Role.STANDBY, Role.INELIGIBLE, timeout=10)
        node._on_connection(Connection.CONNECTED)  # pyright: ignore[reportPrivateUsage]
        await platform.wait_for_role("wiki", Role.ACTIVE, timeout=10)
        assert app.epoch > first
        # What bars a node for good is not forgotten by that.
        assert failing.role is Role.INELIGIBLE
        assert "told to fail" in failing.status().reason


async def test_keeper_that_is_slow_to_start_gets_more_time_at_each_attempt(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an overloaded host a new keeper may need longer than the first attempt waits for it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nif 'phalanx.keeper' in ' '.join(sys.orig_argv): time.sleep(6.5)\n"
    )
    platform = Platform(
        "prod",
        node="n1",
        nats=nats_server.urls,
        data_dir=str(tmp_path / "data"),
        timings={"ttl": "1s"},
        http={"port": 0},
    )
    platform.app("wiki")
    async with platform:
        await platform.wait_for_role("wiki", Role.ACTIVE)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        node = platform._live  # pyright: ignore[reportPrivateUsage]
        assert node.session is not None
        os.kill(node.session.keeper_pid, signal.SIGKILL)
        await platform.wait_for_role("wiki", Role.STANDBY, Role.INELIGIBLE, timeout=10)
        await platform.wait_for_role("wiki", Role.ACTIVE, timeout=30)

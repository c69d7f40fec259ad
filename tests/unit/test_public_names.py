"""The names of the package itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

import phalanx
from phalanx import errors


@pytest.mark.parametrize("name", phalanx.__all__)
def test_public_name_is_there(name: str) -> None:
    """Each one that is announced can be imported, and is found where it says it is."""
    assert getattr(phalanx, name) is not None


@pytest.mark.parametrize(
    "name", ["SyncTimeout", "DatabaseError", "ReplicaUnavailable", "Fenced", "NotActive"]
)
def test_error_that_users_catch_is_a_public_name(name: str) -> None:
    """What the calls of ctx.db and app.db raise is caught by names of the package."""
    assert getattr(phalanx, name) is getattr(errors, name)


def test_errors_of_databases_are_caught_without_loading_what_raises_them() -> None:
    """The names cost the keeper, which lives in this package too, nothing until they are used."""
    code = (
        "import sys, phalanx; assert 'phalanx.data.reading' not in sys.modules; "
        "import sqlite3; assert issubclass(phalanx.StaleConnection, sqlite3.OperationalError)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


@pytest.mark.parametrize("module", ["phalanx.platform", "phalanx.keeper.__main__", "phalanx.cli.main"])
def test_node_and_keeper_do_not_import_what_only_some_apps_need(module: str) -> None:
    """They start sooner and stay smaller; whoever needs one of these imports it, also after us."""
    heavy = {"aiohttp", "aiodocker", "dbus_fast", "pyroute2", "phalanx.client"}
    code = (
        f"import sys, {module}\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))\n"
        "import aiohttp, nats.aio.transport\n"
        "assert aiohttp.ClientSession\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"

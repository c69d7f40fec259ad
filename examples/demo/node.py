"""One node of the demo, as a user would write it: ``python -m examples.demo.node``.

Who it is and where it keeps its files comes from ``PHALANX_NODE``, ``PHALANX_DATA``, ``PHALANX_DATABASES``
and ``PHALANX_HTTP``, as in production; the free ports that the demo has found come in ``DEMO_NODE``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from pathlib import Path

import msgspec

from phalanx import (
    ActiveContext,
    ActivePassive,
    EmbeddedNats,
    HttpCheck,
    Logging,
    Platform,
    Process,
    SQLite,
    system,
)
from phalanx.errors import SyncTimeout

PLATFORM = "demo"
WIKI, NOTES = "wiki", "notes"
"""The app of the first part, an HTTP server, and that of the second one, a program with a database."""
TTL_SECONDS = 2.0
STALL_LIMIT_SECONDS = 1.0
RUN_MARK = "DEMO_RUN"
"""The environment variable by which the demo knows its own programs among those of this machine."""
CONFIRMED = "confirmed what was committed"
CONFIRM_SECONDS = 0.1

_METADATA = Path(__file__).with_name("datasette.json")
_BIN = Path(sys.executable).parent

log = logging.getLogger("phalanx.demo")


class Settings(msgspec.Struct, frozen=True):
    """Ports and folders of one node. ``app``: the one it has; ``routes``: the NATS servers of all nodes."""

    run: str
    app: str
    backend_port: int
    www: str
    nats_port: int
    cluster_port: int
    monitor_port: int
    routes: tuple[str, ...]


def build(settings: Settings) -> Platform:
    """The platform: a NATS server beside each node, and one app whose backend is a program from PyPI."""
    platform = Platform(
        PLATFORM,
        nats=EmbeddedNats(
            port=settings.nats_port,
            cluster_port=settings.cluster_port,
            monitor_port=settings.monitor_port,
            routes=settings.routes,
        ),
        timings={"ttl": TTL_SECONDS, "stall_limit": STALL_LIMIT_SECONDS},
        logging=Logging(format="json"),
    )
    if settings.app == WIKI:
        platform.app(WIKI, ActivePassive(), backend=_uploadserver(settings))
        return platform
    notes = platform.app(NOTES, ActivePassive(), backend=_datasette(settings), database=SQLite(f"{NOTES}.db"))
    notes.on_active(_confirm)
    return platform


async def _confirm(ctx: ActiveContext) -> None:
    """Say all the time up to which moment everything survives the loss of this node.

    Datasette itself knows nothing of barriers; what it has committed before one begins is confirmed by it.
    """
    ctx.ready()  # active while this goes on
    while True:
        began = system.now()  # one clock for all processes of this machine
        try:
            await ctx.db.sync()
        except SyncTimeout as error:
            log.warning("no barrier: %s", error)
        else:
            log.info("%s before %.6f in epoch %d", CONFIRMED, began, ctx.epoch)
        await asyncio.sleep(CONFIRM_SECONDS)


def _uploadserver(settings: Settings) -> Process:
    """An HTTP server that serves files."""
    port, www = str(settings.backend_port), settings.www
    command = [sys.executable, "-m", "uploadserver", port, "--bind", "127.0.0.1", "--directory", www]
    return _process(command, settings, "/node.txt")


def _datasette(settings: Settings) -> Process:
    """A program that reads and writes a SQLite database by HTTP; datasette.json has what can be written."""
    database = str(Path(os.environ["PHALANX_DATABASES"]) / f"{NOTES}.db")
    command = [str(_BIN / "datasette"), "serve", database, "--create", "--metadata", str(_METADATA)]
    command += ["--host", "127.0.0.1", "--port", str(settings.backend_port)]
    command += ["--setting", "max_returned_rows", "1000000", "--setting", "sql_time_limit_ms", "10000"]
    return _process(command, settings, "/-/versions.json")


def _process(command: list[str], settings: Settings, path: str) -> Process:
    """A shell sends the program's log, a line for each request, to a file."""
    return Process(
        ("sh", "-c", f"exec {shlex.join(command)} >>{shlex.quote(settings.www)}.log 2>&1"),
        env={RUN_MARK: settings.run},
        ready=HttpCheck(url=f"http://127.0.0.1:{settings.backend_port}{path}"),
    )


if __name__ == "__main__":
    build(msgspec.json.decode(os.environ["DEMO_NODE"], type=Settings)).run()

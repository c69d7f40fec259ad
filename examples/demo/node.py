"""One node of the demo, as a user would write it: ``python -m examples.demo.node``.

Who it is and where it keeps its files comes from ``PHALANX_NODE``, ``PHALANX_DATA`` and ``PHALANX_HTTP``,
as in production; the free ports that the demo has found come in ``DEMO_NODE``.
"""

from __future__ import annotations

import os
import shlex
import sys

import msgspec

from phalanx import ActivePassive, EmbeddedNats, HttpCheck, Logging, Platform, Process

PLATFORM, APP = "demo", "wiki"
TTL_SECONDS = 2.0
STALL_LIMIT_SECONDS = 1.0
RUN_MARK = "DEMO_RUN"
"""The environment variable by which the demo knows its own programs among those of this machine."""


class Settings(msgspec.Struct, frozen=True):
    """Ports and folders of one node. ``routes``: the NATS servers of all nodes."""

    run: str
    backend_port: int
    www: str
    nats_port: int
    cluster_port: int
    monitor_port: int
    routes: tuple[str, ...]


def program(port: int, folder: str) -> tuple[str, ...]:
    """The third-party HTTP server. A shell sends its log, a line for each request, to a file."""
    server = [sys.executable, "-m", "uploadserver", str(port), "--bind", "127.0.0.1", "--directory", folder]
    return ("sh", "-c", f"exec {shlex.join(server)} >>{shlex.quote(folder)}.log 2>&1")


def build(settings: Settings) -> Platform:
    """The platform: a NATS server beside each node, and one app whose backend is that program."""
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
    platform.app(
        APP,
        ActivePassive(),
        backend=Process(
            program(settings.backend_port, settings.www),
            env={RUN_MARK: settings.run},
            ready=HttpCheck(url=f"http://127.0.0.1:{settings.backend_port}/node.txt"),
        ),
    )
    return platform


if __name__ == "__main__":
    build(msgspec.json.decode(os.environ["DEMO_NODE"], type=Settings)).run()

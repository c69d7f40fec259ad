"""The pytest plugin of ``phalanx.testing``: fixtures that give real NATS servers, and a real dockerd.

pytest imports this module at its start, so it imports nothing of Phalanx before a fixture runs.
The fixtures are synchronous: they work in plain and in asyncio tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from phalanx.testing.dockerd import DockerDaemon
    from phalanx.testing.nats import NatsCluster, NatsServer


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """One nats-server with JetStream, for this test alone."""
    from phalanx.testing.nats import NatsServer

    with NatsServer() as server:
        yield server


@pytest.fixture
def nats_cluster() -> Iterator[NatsCluster]:
    """A cluster of three nats-servers, for this test alone; ready in about 0.3 s."""
    from phalanx.testing.nats import NatsCluster

    with NatsCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def dockerd() -> Iterator[DockerDaemon]:
    """One real dockerd of its own for all tests of a run; up in about a second. Needs root and docker.io."""
    from phalanx.testing.dockerd import DockerDaemon

    with DockerDaemon() as daemon:
        yield daemon

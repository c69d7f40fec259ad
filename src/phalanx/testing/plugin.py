"""The pytest plugin of ``phalanx.testing``: fixtures that give real NATS servers.

pytest imports this module at its start, so it imports nothing of Phalanx before a fixture runs.
The fixtures are synchronous: they work in plain and in asyncio tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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

"""The test servers themselves: they form, lose and regain members, and leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import nats as client
import pytest

from phalanx.testing.nats import NatsCluster, NatsServer


def _exists(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has collected yet does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip() not in ("", "Z", "Zs")


async def test_cluster_places_three_replicas_as_soon_as_it_is_ready(nats_cluster: NatsCluster) -> None:
    """A stream with three replicas can be created at once, and its leader is found by name."""
    connection = await client.connect(nats_cluster.urls)
    try:
        await connection.jetstream().add_stream(name="S", subjects=["s"], num_replicas=3)
        leader = nats_cluster.stream_leader("S")
        assert nats_cluster.name(nats_cluster.index(leader)) == leader
        assert nats_cluster.meta_leader() in {"n1", "n2", "n3"}
    finally:
        await connection.close()


async def test_cluster_member_killed_frozen_and_replaced(nats_cluster: NatsCluster) -> None:
    """A member that was killed, frozen, wiped or replaced by a new one takes part again."""
    nats_cluster.kill(0)
    assert not nats_cluster.is_running(0)
    nats_cluster.start(0)
    await nats_cluster.ready()
    nats_cluster.freeze(1)
    assert nats_cluster.monitor(1, "/varz", timeout=0.2) == {}
    nats_cluster.thaw(1)
    await nats_cluster.ready()
    assert nats_cluster.replace(2) == "n4"
    await nats_cluster.ready()
    assert nats_cluster.index("n4") == 2


def test_server_started_from_a_plain_script_leaves_nothing(nats_server: NatsServer) -> None:
    """Outside asyncio the same class works, and stop() ends its process and deletes its files."""
    with NatsServer(sync_always=True) as other:
        pid, directory = other.pid(), other.directory
        assert other.port() != nats_server.port()
        assert other.monitor(0, "/healthz") == {"status": "ok"}
    assert not _exists(pid)
    assert not directory.exists()


def test_server_with_a_wrong_configuration_is_reported_with_its_log() -> None:
    """A server that exits is an error that shows what it logged, not a timeout."""
    with pytest.raises(RuntimeError, match="no_such_option"), NatsServer(extra="no_such_option: 1"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
def test_servers_die_with_a_killed_parent() -> None:
    """A test process that is SIGKILLed leaves no server behind."""
    script = (
        "import time; from phalanx.testing.nats import NatsServer\n"
        "s = NatsServer(); s.start(); s.wait_ready(); print(s.pid(), s.directory, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    try:
        pid, directory = parent.stdout.readline().split()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()
    deadline = time.monotonic() + 5
    while _exists(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    subprocess.run(["rm", "-rf", directory], check=True)
    assert not _exists(int(pid))

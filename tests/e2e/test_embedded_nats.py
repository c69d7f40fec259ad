"""The embedded nats-server: started, adopted, replaced, restarted, refused, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import nats
import pytest
from tests.waiting import until

from phalanx.bus.embedded import EmbeddedServer
from phalanx.bus.server_process import ProcessRecord, ServerProcess
from phalanx.config import EmbeddedNats, Secret
from phalanx.decide.backoff import Backoff
from phalanx.errors import ConfigError, NatsUnusable, StartError
from phalanx.testing.nats import Ports, stop_leftover


@pytest.fixture
def ports() -> Iterator[Ports]:
    """Free ports, ours for the whole test."""
    ports = Ports()
    yield ports
    ports.close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A node's data directory; whatever server still runs there is killed after the test."""
    yield tmp_path / "n1"
    for folder in tmp_path.iterdir():
        stop_leftover(folder)


@pytest.fixture
def events() -> list[tuple[str, str]]:
    """What a server reported."""
    return []


def server(
    data_dir: Path, config: EmbeddedNats, events: list[tuple[str, str]] | None = None, node: str = "n1"
) -> EmbeddedServer:
    """A server of platform prod that starts again quickly."""
    return EmbeddedServer(
        config,
        platform="prod",
        node=node,
        data_dir=data_dir,
        on_event=lambda kind, detail: None if events is None else events.append((kind, detail)),
        restart=Backoff(first=0.05, longest=0.2),
    )


async def publish_and_read(embedded: EmbeddedServer) -> bytes:
    """Store one message in a new or present stream and read it back, with the server's own options."""
    options = embedded.options
    client = await nats.connect(
        list(options.urls),
        user=options.user or None,
        password=options.password.reveal() or None,
        token=options.token.reveal() or None,
    )
    try:
        js = client.jetstream()
        await js.add_stream(name="S", subjects=["s"])
        await js.publish("s", b"kept")
        return (await js.get_last_msg("S", "s")).data or b""
    finally:
        await client.close()


async def test_single_server_starts_with_secrets_only_in_its_file(data_dir: Path, ports: Ports) -> None:
    """A server with user and password answers, keeps its secrets off the command line, and stops."""
    password = 'p"q\\ $x#{ü'
    config = EmbeddedNats(port=ports.take(), user="app", password=Secret(password), monitor_port=ports.take())
    async with server(data_dir, config) as embedded:
        await embedded.wait_ready(10)
        assert await publish_and_read(embedded) == b"kept"
        pid = embedded.pid
        assert pid is not None
        assert password not in await asyncio.to_thread(Path(f"/proc/{pid}/cmdline").read_text)
        assert stat.S_IMODE((data_dir / "nats" / "nats.conf").stat().st_mode) == 0o600
        assert stat.S_IMODE((data_dir / "nats" / "server.json").stat().st_mode) == 0o600
        assert os.getsid(pid) == pid
    assert embedded.pid is None
    assert stop_leftover(data_dir) is None


async def test_server_is_adopted_by_the_next_node_with_the_same_configuration(
    data_dir: Path, ports: Ports, events: list[tuple[str, str]]
) -> None:
    """A second life of the node finds the server running, takes it over and can stop it."""
    config = EmbeddedNats(port=ports.take(), token=Secret("t"))
    first = server(data_dir, config)
    await first.start()
    pid = first.pid
    await first.detach()
    async with server(data_dir, config, events) as second:
        assert second.pid == pid
        await second.wait_ready(10)
    assert [kind for kind, _ in events] == ["adopted", "stopped"]
    assert stop_leftover(data_dir) is None


async def test_server_survives_the_sigkill_of_its_node_and_is_adopted(
    data_dir: Path, ports: Ports, events: list[tuple[str, str]]
) -> None:
    """The server of a killed node runs on; the next node adopts it and restarts it when it dies."""
    port = ports.take()
    script = (
        "import asyncio, time\n"
        "from phalanx.bus.embedded import EmbeddedServer\n"
        "from phalanx.config import EmbeddedNats\n"
        "async def main():\n"
        f"    server = EmbeddedServer(EmbeddedNats(port={port}), platform='prod', node='n1',"
        f" data_dir={str(data_dir)!r})\n"
        "    await server.start(); print(server.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    node = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert node.stdout is not None
    try:
        pid = int(await asyncio.wait_for(node.stdout.readline(), 20))
    finally:
        node.kill()
        await node.wait()
    os.kill(pid, 0)
    async with server(data_dir, EmbeddedNats(port=port), events) as embedded:
        assert embedded.pid == pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: embedded.pid not in (None, pid))
        await embedded.wait_ready(10)
    assert [kind for kind, _ in events] == ["adopted", "exited", "started", "stopped"]


async def test_leftover_with_another_configuration_is_replaced_and_keeps_its_data(
    data_dir: Path, ports: Ports, events: list[tuple[str, str]]
) -> None:
    """After a change of configuration the old server is stopped first; the store is the same."""
    port = ports.take()
    first = server(data_dir, EmbeddedNats(port=port))
    await first.start()
    await first.wait_ready(10)
    assert await publish_and_read(first) == b"kept"
    pid = first.pid
    await first.detach()
    async with server(data_dir, EmbeddedNats(port=port, sync="2m"), events) as second:
        assert second.pid != pid
        await second.wait_ready(10)
        assert await publish_and_read(second) == b"kept"
    assert [kind for kind, _ in events] == ["replaced", "started", "stopped"]


async def test_killed_server_is_restarted_every_time(
    data_dir: Path, ports: Ports, events: list[tuple[str, str]]
) -> None:
    """Three SIGKILLs in a row: each is reported with its cause, and the server is there again."""
    async with server(data_dir, EmbeddedNats(port=ports.take()), events) as embedded:
        for _ in range(3):
            pid = embedded.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: embedded.pid not in (None, pid))
        await embedded.wait_ready(10)
    exits = [detail for kind, detail in events if kind == "exited"]
    assert len(exits) == 3
    assert all("SIGKILL" in detail for detail in exits)


async def test_pid_file_of_a_stranger_is_never_signalled(data_dir: Path, ports: Ports) -> None:
    """A record whose pid now belongs to another process is ignored; that process lives on."""
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        config = EmbeddedNats(port=ports.take())
        async with server(data_dir, config) as embedded:
            record = (
                (data_dir / "nats" / "server.json")
                .read_text()
                .replace(str(embedded.pid), str(stranger.pid), 1)
            )
        (data_dir / "nats" / "server.json").write_text(record)
        (data_dir / "nats" / "nats.pid").write_text(str(stranger.pid))
        assert stop_leftover(data_dir) is None
        async with server(data_dir, config) as embedded:
            assert embedded.pid != stranger.pid
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_record_of_another_start_or_boot_is_not_this_process(data_dir: Path, ports: Ports) -> None:
    """A server with our command line that started at another time, or before a reboot, is not adopted."""
    async with server(data_dir, EmbeddedNats(port=ports.take())) as embedded:
        path = data_dir / "nats" / "server.json"
        record = ProcessRecord.read(path)
        assert record is not None
        for other in (
            msgspec.structs.replace(record, started=1),
            msgspec.structs.replace(record, boot="an earlier one"),
        ):
            assert not ServerProcess(other).is_alive()
        assert ServerProcess(record).is_alive()
        path.unlink()  # as if the node had died before it wrote its record: the pid file still leads there
        found = ServerProcess.find(data_dir / "nats")
        assert found is not None
        assert (found.pid, found.record.config) == (embedded.pid, "")


async def test_port_in_use_is_refused_before_anything_starts(data_dir: Path, ports: Ports) -> None:
    """A port that something else listens on is named, and no server or record is left."""
    port = ports.take()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        embedded = server(data_dir, EmbeddedNats(port=port))
        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port} .*nats\.embedded\.port"):
            await embedded.start()
    assert embedded.pid is None
    assert not (data_dir / "nats" / "server.json").exists()
    async with embedded:  # and once the port is free, the same object starts
        await embedded.wait_ready(10)


async def test_second_node_on_the_same_data_dir_is_refused(data_dir: Path, ports: Ports) -> None:
    """Two live nodes do not fight over one server."""
    config = EmbeddedNats(port=ports.take())
    async with server(data_dir, config) as first:
        with pytest.raises(StartError, match="another node"):
            await server(data_dir, config).start()
        assert first.pid is not None


async def test_server_that_cannot_start_reports_its_last_words(data_dir: Path, ports: Ports) -> None:
    """A certificate that is not there: StartError with what nats-server said, nothing left running."""
    config = EmbeddedNats(port=ports.take(), tls_cert="/no/cert.pem", tls_key="/no/key.pem")
    with pytest.raises(StartError, match=r"exited with 1.*cert\.pem"):
        await server(data_dir, config).start()
    assert stop_leftover(data_dir) is None


async def test_three_nodes_form_a_cluster_and_one_leaves_by_lame_duck(tmp_path: Path, ports: Ports) -> None:
    """With a route secret three servers place three replicas; a stopped one does not stop the others."""
    client_ports = [ports.take() for _ in range(3)]
    route_ports = [ports.take() for _ in range(3)]
    async with AsyncExitStack() as stack:
        servers: list[EmbeddedServer] = []
        for i in range(3):
            config = EmbeddedNats(
                port=client_ports[i],
                cluster_port=route_ports[i],
                routes=tuple(f"127.0.0.1:{port}" for port in route_ports),
                route_secret=Secret("s/e:c@ret%"),
                user="u",
                password=Secret("p"),
            )
            embedded = server(tmp_path / f"n{i}", config, node=f"n{i}")
            await stack.enter_async_context(embedded)
            stack.callback(stop_leftover, tmp_path / f"n{i}")
            servers.append(embedded)
        for embedded in servers:
            await embedded.wait_ready(20)
        client = await nats.connect(list(servers[0].options.urls), user="u", password="p")
        stack.push_async_callback(client.close)
        js = client.jetstream()
        async with asyncio.timeout(20):
            while True:
                try:
                    await js.add_stream(name="R3", subjects=["r3"], num_replicas=3)
                    break
                except nats.js.errors.APIError:  # a server that only just joined cannot be placed on
                    await asyncio.sleep(0.1)
        await js.publish("r3", b"1")
        loop = asyncio.get_running_loop()
        began = loop.time()
        await servers[2].stop()
        assert loop.time() - began < 9
        assert servers[2].pid is None
        await js.publish("r3", b"2", timeout=10)


async def test_one_of_three_servers_says_what_it_waits_for(data_dir: Path, ports: Ports) -> None:
    """Without a majority JetStream does not answer: NatsUnusable says how many servers are needed."""
    routes = tuple(f"127.0.0.1:{ports.take()}" for _ in range(3))
    config = EmbeddedNats(port=ports.take(), cluster_port=int(routes[0].split(":")[1]), routes=routes)
    async with server(data_dir, config) as embedded:
        with pytest.raises(NatsUnusable, match="2 of the 3 servers"):
            await embedded.wait_ready(0.5)


def test_open_server_beyond_loopback_is_refused(tmp_path: Path) -> None:
    """Without authentication, or clustered without a route secret, only loopback is allowed."""
    with pytest.raises(ConfigError, match="without authentication"):
        server(tmp_path, EmbeddedNats(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="route_secret"):
        server(tmp_path, EmbeddedNats(host="0.0.0.0", token=Secret("t"), routes=("10.0.0.2:6222",)))
    assert list(tmp_path.iterdir()) == []

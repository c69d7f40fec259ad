"""The container backend with a real dockerd: refusals, whose containers it ends, an engine that fails."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from phalanx import child, config, containers, netlink, system
from phalanx.backends import make_backend
from phalanx.backends.container import Container, how_ended
from phalanx.backends.engine import State
from phalanx.errors import BackendError
from phalanx.keeper import containers as keeper
from phalanx.ports import Backend, Running, SectionContext
from phalanx.testing import docker_images
from phalanx.testing.dockerd import DockerDaemon
from phalanx.testing.nats import NatsServer, Ports
from phalanx.testing.nodes import Nodes
from phalanx.types import Health, ProgramState, Resource

CLI = [sys.executable, "-m", "phalanx.cli.main"]
SLEEPS = ["sleep", "1000"]
GRACEFUL = ["sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done"]


class Host:
    """One node's backends on an engine, and what its keeper knows."""

    def __init__(self, dockerd: DockerDaemon) -> None:
        self.dockerd, self.image = dockerd, dockerd.busybox_image()
        self.resources: dict[str, Resource] = {}
        self.told: list[tuple[Health, str]] = []
        """What sections have heard of the program's own health check."""

    def backend(self, node: str = "n1", platform: str = "prod", **options: object) -> Backend:
        """A backend of that node; by image, unless *options* name a container."""
        if "container" not in options:
            options = {"image": self.image, "command": SLEEPS} | options
        declared = config.Docker(socket=self.dockerd.socket, **options)  # pyright: ignore
        app = config.build_app("wiki", config.ActivePassive(), backend=declared)
        assert app.backend is not None
        return make_backend(app.backend, platform, node)

    def section(self, epoch: int = 7, node: str = "n1", platform: str = "prod") -> SectionContext:
        """An active section of app ``wiki``."""

        async def register(resource: Resource) -> None:
            self.resources[resource.id] = resource

        return SectionContext(
            platform,
            node,
            "wiki",
            epoch,
            register,
            lambda one: self.resources.pop(one, None) and None,
            on_health=lambda health, detail: self.told.append((health, detail)),
        )

    def running(self) -> set[str]:
        """The ids of the containers that run, by the engine's word."""
        return set(self.dockerd.docker("ps", "--no-trunc", "-q").split())

    def all(self) -> set[str]:
        """Those that there are."""
        return set(self.dockerd.docker("ps", "--no-trunc", "-aq").split())

    def inspect(self, container: str) -> dict[str, object]:
        """What the engine says of it."""
        return json.loads(self.dockerd.docker("inspect", container))[0]


@pytest.fixture
def host(dockerd: DockerDaemon) -> Iterator[Host]:
    """A host whose engine has no container, before and after."""
    yield Host(dockerd)
    deadline = time.monotonic() + 20
    while left := dockerd.docker("ps", "-aq").split():
        dockerd.try_docker("rm", "-fv", *left)  # a keeper may be about to remove it as well
        assert time.monotonic() < deadline, left


@pytest.fixture
async def own_host() -> AsyncIterator[Host]:
    """The same with an engine of this test's own, with live-restore, to be frozen and killed."""
    with DockerDaemon(live_restore=True) as dockerd:
        yield Host(dockerd)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "problem", "remedy"),
    [
        ({"image": "no/such:1"}, "image 'no/such:1' is not on this host", "docker pull no/such:1"),
        ({"container": "none"}, "there is no container 'none'", "docker create --name none"),
        ({"container": "restarts"}, "has the restart policy 'always'", "docker update --restart=no restarts"),
        ({"container": "vanishes"}, "was made with --rm", "without --rm"),
        ({"volumes": ["/no/such/folder:/data"]}, "/no/such/folder does not exist", "create it"),
        ({"network": "nowhere"}, "there is no network 'nowhere'", "docker network create nowhere"),
    ],
)  # fmt: skip
async def test_what_cannot_run_here_is_refused(
    host: Host, options: dict[str, object], problem: str, remedy: str
) -> None:
    """prepare() says in one line what is missing and what to do, and makes nothing."""
    host.dockerd.docker("create", "--name", "restarts", "--restart", "always", host.image)
    host.dockerd.docker("create", "--name", "vanishes", "--rm", host.image)
    before = host.all()
    with pytest.raises(BackendError) as caught:
        await host.backend(**options).prepare("wiki")
    assert caught.value.step == "prepare"
    assert problem in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    assert host.all() == before


async def test_no_engine_is_refused(host: Host, tmp_path: Path) -> None:
    """No socket, something else in its place, nobody who answers: told apart, each with a remedy."""
    (tmp_path / "file").touch()
    silent = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(silent))
        for path, problem in [
            (tmp_path / "none", "there is no Docker Engine at"),
            (tmp_path / "file", "is no socket"),
            (silent, "does not answer"),
        ]:
            declared = config.Docker(image=host.image, socket=path)
            with pytest.raises(BackendError, match=problem) as caught:
                await make_backend(declared, "prod", "n1").prepare("wiki")
            assert caught.value.remedy


async def test_published_port_in_use_is_refused(host: Host) -> None:
    """By a program of the host, or by somebody else's container, which is named; not by the app's own."""
    ports = Ports()
    mine, theirs = ports.take(), ports.take()
    with socket.create_server(("127.0.0.1", mine)):
        with pytest.raises(BackendError, match=f"port {mine}/tcp of this host is in use; see who has it"):
            await host.backend(ports=[f"127.0.0.1:{mine}:80"]).prepare("wiki")
        with pytest.raises(BackendError, match="in use") as caught:
            await host.backend(ports=[f"127.0.0.1:{mine}:80"]).start(host.section())
        assert caught.value.step == "start"
    assert not host.all()
    other = host.dockerd.docker("run", "-d", "-p", f"{theirs}:80", host.image, *SLEEPS)
    with pytest.raises(BackendError, match=f"in use by container {other[:12]}"):
        await host.backend(ports=[f"{theirs}:80"]).prepare("wiki")
    backend = host.backend(ports=[f"{mine}:80"])
    running = await backend.start(host.section())
    await backend.prepare("wiki")
    await running.kill()
    ports.close()


async def test_command_that_is_not_in_the_image(host: Host) -> None:
    """start() says so, and the container that was made for it is gone."""
    with pytest.raises(BackendError, match="its command cannot be run"):
        await host.backend(command=["no-such-program"]).start(host.section())
    assert not host.all()
    assert not host.resources


# --- a container that is made


async def test_container_says_whose_it_is_and_never_restarts(host: Host) -> None:
    """Labels and environment say platform, node, app, epoch; the engine never starts it again by itself."""
    running = await host.backend(env={"COLOUR": "blue"}).start(host.section(epoch=17))
    (container,) = host.all()
    found = host.inspect(container)
    settings, options = found["Config"], found["HostConfig"]
    labels = dict(settings["Labels"])  # pyright: ignore
    assert len(labels.pop("phalanx.run")) == 16
    assert labels == {
        "phalanx.platform": "prod", "phalanx.node": "n1", "phalanx.app": "wiki", "phalanx.epoch": "17",
    }  # fmt: skip
    assert {"PHALANX_EPOCH=17", "PHALANX_APP=wiki", "COLOUR=blue"} <= set(settings["Env"])  # pyright: ignore
    assert options["RestartPolicy"]["Name"] == "no"  # pyright: ignore
    assert options["LogConfig"]["Config"] == {"max-size": "10000000", "max-file": "2"}  # pyright: ignore
    assert running.status().what == f"container {container[:12]}"
    await running.kill()
    assert not host.all()


async def test_published_port_answers(host: Host) -> None:
    """An HTTP server in a container is ready by its check, through the published port."""
    ports = Ports()
    port = ports.take()
    check = config.HttpCheck(f"http://127.0.0.1:{port}/hallo", interval=0.1, timeout=1.0)
    command = ["sh", "-c", "mkdir /www; echo hallo > /www/hallo; exec httpd -f -p 80 -h /www"]
    running = await host.backend(command=command, ports=[f"127.0.0.1:{port}:80"], ready=check).start(
        host.section()
    )
    await running.wait_ready()
    answer = await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/hallo", timeout=5)
    with answer:
        assert answer.read() == b"hallo\n"
    await running.kill()
    ports.close()


async def test_anonymous_volumes_go_with_it_and_named_ones_stay(host: Host) -> None:
    """What an image declares as VOLUME is removed with its container; a named volume holds data."""
    with docker_images.busybox() as tarball:
        host.dockerd.import_image("phalanx-test/volume", tarball, "ENV PATH=/bin", "VOLUME /anonymous")
    before = set(host.dockerd.docker("volume", "ls", "-q").split())
    backend = host.backend(image="phalanx-test/volume", volumes=["data:/data"])
    running = await backend.start(host.section())
    assert len(set(host.dockerd.docker("volume", "ls", "-q").split()) - before) == 2
    await running.kill()
    assert set(host.dockerd.docker("volume", "ls", "-q").split()) - before == {"data"}
    host.dockerd.docker("volume", "rm", "data")


def test_lack_of_memory_is_told() -> None:
    """What the engine knows of an end is said in words. (Not every kernel tells it that memory ran out.)"""
    assert (
        how_ended(State(exit_code=137, oom_killed=True)) == "exited with code 137: killed for want of memory"
    )
    assert how_ended(State(exit_code=143)) == "exited with code 143, as if killed by SIGTERM"
    assert how_ended(State(exit_code=255, error="no shim")) == "exited with code 255: no shim"


async def test_init_passes_signals_on_to_a_program_without_handlers(host: Host) -> None:
    """As process 1, sleep ignores SIGTERM; behind Docker's init it does not."""
    running = await host.backend(init=True, stop_timeout=20).start(host.section())
    began = system.now()
    await running.stop("done")
    assert system.now() - began < 10
    assert not host.all()


async def test_output_arrives_once_and_in_order(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Each line in the app's logger, from the first to the last, with long ones in pieces."""
    caplog.set_level(logging.INFO, "phalanx.app.wiki")
    command = ["sh", "-c", "for i in $(seq 200); do echo line $i; done; head -c 20000 /dev/zero | tr '\\0' x"]
    running = await host.backend(command=command).start(host.section())
    await running.ended
    await running.stop("it ended")
    lines = [record.getMessage() for record in caplog.records if record.name == "phalanx.app.wiki"]
    assert lines[:200] == [f"line {number}" for number in range(1, 201)]
    assert "".join(lines[200:]) == "x" * 20000
    assert max(map(len, lines)) <= child.MAX_LINE_BYTES


async def test_client_of_a_published_port_is_reset_when_the_address_goes(host: Host) -> None:
    """What docker-proxy passes on ends at a socket of this host, which is destroyed with the address; even
    if the program itself is frozen and says nothing."""
    address, ports = ipaddress.IPv4Address("127.66.0.9"), Ports()
    port = ports.take()
    serves = ["sh", "-c", "while :; do nc -l -p 8080 -e cat; done"]
    running = await host.backend(command=serves, ports=[f"{port}:8080"]).start(host.section())

    def served() -> socket.socket | None:
        with contextlib.suppress(OSError):
            client = socket.create_connection((str(address), port), 5, ("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                client.send(b"x")
                if client.recv(1) == b"x":
                    return client
            client.close()
        return None

    async with asyncio.timeout(30):
        while (client := await asyncio.to_thread(served)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    with client:
        (container,) = host.running()
        host.dockerd.docker("pause", container)
        assert netlink.reset_connections(address) == 1
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(client.recv, 1)
    await running.kill()
    ports.close()


# --- HEALTHCHECK


def image_with_healthcheck(host: Host, command: str) -> str:
    """Checked each second, unhealthy at once."""
    change = f"HEALTHCHECK --interval=1s --retries=1 CMD {command}"
    with docker_images.busybox() as tarball:
        host.dockerd.import_image("phalanx-test/health", tarball, "ENV PATH=/bin", change)
    return "phalanx-test/health"


@pytest.mark.parametrize("follow", [True, False])
async def test_healthcheck_of_the_image_drives_readiness_and_health(
    host: Host, caplog: pytest.LogCaptureFixture, follow: bool
) -> None:
    """Ready by the engine's events; each change is told to the app, unless the declaration says otherwise."""
    image = image_with_healthcheck(host, "sh -c 'test ! -e /ill || { echo no disk; exit 1; }'")
    running = await host.backend(image=image, follow_health=follow).start(host.section())
    assert running.status().detail == "health: starting"
    async with asyncio.timeout(15):
        await running.wait_ready()
    assert running.status().detail == "health: healthy"
    (container,) = host.running()
    host.dockerd.docker("exec", container, "touch", "/ill")
    await until(lambda: running.status().detail == "health: unhealthy", 15)
    await until(lambda: "its HEALTHCHECK says unhealthy: no disk" in caplog.text, 10)
    assert running.status().state is ProgramState.RUNNING
    told = [
        (Health.UNKNOWN, "its HEALTHCHECK says starting"),
        (Health.HEALTHY, "its HEALTHCHECK says healthy"),
        (Health.UNHEALTHY, "its HEALTHCHECK says unhealthy: no disk"),
    ]
    await until(lambda: host.told == (told if follow else []), 10)
    await running.kill()
    assert len(host.told) == (3 if follow else 0)


async def test_unhealthy_container_does_not_get_ready(host: Host) -> None:
    """It fails as soon as the engine says so, with what the check printed."""
    image = image_with_healthcheck(host, "sh -c 'echo no disk; exit 1'")
    running = await host.backend(image=image, ready_timeout=60).start(host.section())
    with pytest.raises(BackendError, match="HEALTHCHECK says unhealthy: no disk") as caught:
        async with asyncio.timeout(15):
            await running.wait_ready()
    assert caught.value.step == "ready"
    await running.kill()


async def test_existing_container_that_was_unhealthy_is_started_again(host: Host) -> None:
    """The engine tells of its earlier start once more; the new one is not taken for ill by that."""
    image = image_with_healthcheck(host, "test ! -e /ill")
    host.dockerd.docker("create", "--name", "mine", image, "sh", "-c", "rm -f /ill; exec sleep 1000")
    backend = host.backend(container="mine", stop_timeout=0)
    running = await backend.start(host.section())
    async with asyncio.timeout(15):
        await running.wait_ready()
    host.dockerd.docker("exec", "mine", "touch", "/ill")
    await until(lambda: running.status().detail == "health: unhealthy", 15)
    await running.kill()
    host.told.clear()
    again = await backend.start(host.section())
    async with asyncio.timeout(15):
        await again.wait_ready()
    assert [health for health, _ in host.told] == [Health.UNKNOWN, Health.HEALTHY]
    await again.kill()


# --- an existing container


async def test_existing_container_is_started_and_stopped_and_stays(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets its own stop signal, is never removed, and what it wrote earlier is not told again."""
    caplog.set_level(logging.INFO, "phalanx.app.wiki")
    container = host.dockerd.docker("create", "--name", "mine", host.image, *GRACEFUL)
    backend = host.backend(container="mine")
    await backend.prepare("wiki")
    for epoch in (7, 9):
        caplog.clear()
        running = await backend.start(host.section(epoch))
        await until(lambda: "up" in caplog.messages, 10)
        assert host.running() == {container}
        await running.stop("done")
        assert (host.running(), host.all()) == (set(), {container})
        assert [m for m in caplog.messages if m in ("up", "bye")] == ["up", "bye"]
    assert await backend.logs("wiki", 2) == ["up", "bye"]


async def test_existing_container_that_runs_already_is_ended_first(host: Host) -> None:
    """Whoever started it, it was not we: the epoch begins with a start of our own."""
    container = host.dockerd.docker("run", "-d", "--name", "mine", host.image, *SLEEPS)
    before = host.inspect(container)["State"]["Pid"]  # pyright: ignore
    running = await host.backend(container="mine").start(host.section())
    after = host.inspect(container)["State"]["Pid"]  # pyright: ignore
    assert before != after
    assert not system.is_running(before)  # pyright: ignore
    await running.kill()
    assert not host.running()


async def test_frozen_container_is_ended_too(host: Host) -> None:
    """`docker pause` keeps nothing alive: what is frozen dies as it thaws."""
    running = await host.backend().start(host.section())
    (container,) = host.running()
    host.dockerd.docker("pause", container)
    await running.kill()
    assert not host.all()


# --- whose it is


async def test_fence_ends_what_is_ours_and_nobody_elses(host: Host) -> None:
    """Left-overs of this node are removed; those of another node or platform, and strangers, run on."""
    theirs = [
        await host.backend(node="n2").start(host.section(node="n2")),
        await host.backend(platform="test").start(host.section(platform="test")),
    ]
    stranger = host.dockerd.docker("run", "-d", host.image, *SLEEPS)
    others = host.running()
    dies = await host.backend().start(host.section())
    assert isinstance(dies, Container)
    await dies.let_go()
    (ours,) = host.running() - others
    later = host.backend()  # of the next life
    (ended,) = await later.fence("wiki")
    assert ended.startswith("container phalanx-wiki-7-")
    assert host.all() == host.running() == others
    assert stranger in others
    assert await later.fence("wiki") == []
    assert not containers.find(ours)
    for running in theirs:
        await running.kill()


# --- an engine that fails


async def test_engine_that_hangs_does_not_keep_it_alive(own_host: Host) -> None:
    """G1: dockerd is frozen: kill() ends the container all the same, by its processes; so does the keeper."""
    host = own_host
    running = await host.backend(command=GRACEFUL).start(host.section())
    (resource,) = host.resources.values()
    other = await host.backend(node="n2").start(host.section(node="n2"))
    known = next(one for one in host.resources.values() if one != resource)
    host.dockerd.freeze()
    try:
        for container, end in (
            (resource.id, running.kill()),
            (known.id, asyncio.to_thread(keeper.kill, known)),
        ):
            assert containers.find(container)
            began = system.now()
            assert await end is not False
            assert system.now() - began < 6
            assert not containers.find(container)
        assert resource.id not in host.resources
    finally:
        host.dockerd.thaw()
    await other.kill()
    # The engine forgot to remove it: the next start does.
    await host.backend().fence("wiki")
    await host.backend(node="n2").fence("wiki")
    await until(lambda: not host.all(), 10)


async def test_engine_that_hangs_does_not_cost_a_program_its_grace(own_host: Host, tmp_path: Path) -> None:
    """dockerd is frozen: stop() gives the program its stop signal, and the time to put things in order."""
    host = own_host
    command = ["sh", "-c", "trap 'echo bye > /out/bye; exit 0' TERM; > /out/up; while :; do sleep 0.05; done"]
    running = await host.backend(command=command, volumes=[f"{tmp_path}:/out"]).start(host.section())
    await until((tmp_path / "up").exists, 10)
    host.dockerd.freeze()
    try:
        began = system.now()
        await running.stop("a test")
        seconds = system.now() - began
        logging.getLogger("test").info("stopped after %.2f s", seconds)
        assert seconds < 5  # 2 when nothing else runs: it is not waited for again and again
        assert (tmp_path / "bye").read_text() == "bye\n"
        assert not host.resources
    finally:
        host.dockerd.thaw()
    await host.backend().fence("wiki")


async def test_engine_that_hangs_before_the_start_is_known_keeps_the_app_held(own_host: Host) -> None:
    """G1: whether a container will run is not known while its start is under way: never "gone"."""
    host = own_host
    container = host.dockerd.docker("create", host.image, *SLEEPS)
    target = containers.Target(host.dockerd.socket, container, remove=True)
    resource = Resource("container", container, "wiki", 7, details=target.details())
    host.dockerd.freeze()
    try:
        assert not await asyncio.to_thread(keeper.kill, resource)
    finally:
        host.dockerd.thaw()
    assert await asyncio.to_thread(keeper.kill, resource)
    await until(lambda: not host.all(), 10)  # the engine may still be busy with what was asked of it before


async def test_engine_killed_and_started_again_is_no_end(own_host: Host) -> None:
    """With live-restore the container runs on meanwhile, and is followed on: its output, and its end."""
    host = own_host
    command = ["sh", "-c", "while [ ! -e /tmp/end ]; do sleep 0.05; done; echo over; exit 3"]
    running = await host.backend(command=command).start(host.section())
    ended = asyncio.ensure_future(running.ended)
    (container,) = host.running()
    await asyncio.to_thread(host.dockerd.kill)
    await until(lambda: running.status().detail == "the Docker Engine does not answer", 10)
    assert containers.find(container)
    await asyncio.to_thread(host.dockerd.start)
    await until(lambda: running.status().detail == "", 20)
    assert not ended.done()
    await asyncio.to_thread(host.dockerd.docker, "exec", container, "touch", "/tmp/end")
    async with asyncio.timeout(10):
        assert await ended == "exited with code 3"
    await running.stop("it ended")
    assert not host.all()


async def test_end_is_noticed_while_the_engine_is_gone(own_host: Host) -> None:
    """The kernel tells: at once, though nobody knows the exit code."""
    host = own_host
    running = await host.backend().start(host.section())
    (resource,) = host.resources.values()
    await asyncio.to_thread(host.dockerd.kill)
    for one in containers.find(resource.id):
        with contextlib.suppress(ProcessLookupError):
            system.kill_group(one.pid)
    async with asyncio.timeout(5):
        assert "ended" in await running.ended
    await running.stop("it ended")
    assert not host.resources


async def adopted(host: Host) -> tuple[Resource, asyncio.Task[Running | None]]:
    """A container whose node has gone, its engine too; and the next life, which is about to adopt it."""
    dies = await host.backend().start(host.section())
    assert isinstance(dies, Container)
    (resource,) = host.resources.values()
    await dies.let_go()
    await asyncio.to_thread(host.dockerd.kill)
    adopting = asyncio.create_task(host.backend().adopt(host.section(), resource))
    await asyncio.sleep(0.7)
    assert not adopting.done()
    return resource, adopting


async def test_container_is_adopted_once_its_engine_is_back(own_host: Host) -> None:
    """Both were restarted in the same pause: the container runs on through it."""
    resource, adopting = await adopted(own_host)
    (process, *_) = containers.find(resource.id)
    await asyncio.to_thread(own_host.dockerd.start)
    async with asyncio.timeout(20):
        running = await adopting
    assert running is not None
    assert process.alive()
    assert own_host.running() == {resource.id}
    await running.stop("over")
    assert not own_host.all()
    assert not own_host.resources


async def test_g1_adoption_that_is_cancelled_leaves_nothing_running(own_host: Host) -> None:
    """The section takes it for one that left nothing, so it ends the container, even without its engine."""
    resource, adopting = await adopted(own_host)
    adopting.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await adopting
    assert not containers.find(resource.id)
    assert not own_host.resources


# --- whole nodes


@pytest.mark.parametrize("both", [False, True])
async def test_node_is_killed_and_its_container_is_gone_before_another_runs(
    host: Host, nats_server: NatsServer, tmp_path: Path, both: bool
) -> None:
    """G1: SIGKILL of the node: its keeper removes the container. Of both: warden or next life do."""
    toml = tmp_path / "phalanx.toml"
    toml.write_text(
        '[platform]\nname = "test"\n[timings]\nttl = "2s"\n[apps.wiki]\npattern = "active-passive"\n'
        f'[apps.wiki.backend]\ntype = "docker"\nimage = "{host.image}"\ncommand = "sleep 1000"\n'
        f'socket = "{host.dockerd.socket}"\n'
    )
    with Nodes([*CLI, "run", str(toml)], nats_server.urls, count=2) as nodes:
        active = await nodes.wait_for_active("wiki")
        await nodes.wait_for_standbys("wiki", 1)
        (first,) = host.running()
        began = time.monotonic()
        if both:
            nodes[active].kill_both()
        else:
            nodes[active].kill()
        other = await nodes.wait_for_active("wiki", other_than=active)
        logging.getLogger("test").info("active again after %.2f s", time.monotonic() - began)
        if both:
            nodes[active].start()
            await nodes.wait_for_standbys("wiki", 1)
        (second,) = host.running()
        assert first not in host.all()
        assert not containers.find(first)
        labels = host.inspect(second)["Config"]["Labels"]  # pyright: ignore
        assert labels["phalanx.node"] == other


async def test_container_that_turns_unhealthy_is_restarted_and_then_fails_over(
    host: Host, nats_server: NatsServer, tmp_path: Path
) -> None:
    """By the image's own HEALTHCHECK, without any check declared; a pause bears it, and shows why."""
    image = image_with_healthcheck(host, "sh -c 'test ! -e /ill || { echo no disk; exit 1; }'")
    toml = tmp_path / "phalanx.toml"
    toml.write_text(
        '[platform]\nname = "test"\n[timings]\nttl = "2s"\n[apps.wiki]\npattern = "active-passive"\n'
        "restart = { count = 1, delay = 0 }\n"
        f'[apps.wiki.backend]\ntype = "docker"\nimage = "{image}"\ncommand = "sleep 1000"\n'
        f'socket = "{host.dockerd.socket}"\nready_timeout = "60s"\n'
    )
    platform = ("--platform", "test", "--nats", nats_server.url())

    async def phalanx(*command: str) -> str:
        run = await asyncio.create_subprocess_exec(
            *CLI, *command, *platform, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        return (await run.communicate())[0].decode()

    with Nodes([*CLI, "run", str(toml)], nats_server.urls, count=2) as nodes:
        active = await nodes.wait_for_active("wiki")
        await nodes.wait_for_standbys("wiki", 1)

        def app() -> dict[str, Any]:
            return nodes[active].status()["apps"][0]

        await nodes.wait_until(lambda: app()["health"] == "healthy", 30, "it is not healthy")
        (first,) = host.running()
        await phalanx("pause", "wiki", "--reason", "a look")
        host.dockerd.docker("exec", first, "touch", "/ill")
        await nodes.wait_until(lambda: app()["health"] == "unhealthy", 30, "it is not ill")
        ill = "container health: its HEALTHCHECK says unhealthy: no disk"
        assert app()["health_reason"] == ill
        assert ill in await phalanx("status")
        assert ill in await phalanx("why", "wiki")
        assert host.running() == {first}
        await phalanx("resume", "wiki")

        await nodes.wait_until(
            lambda: first not in host.all() and nodes.actives("wiki") == [active] and host.running(),
            30,
            "it is not restarted in place",
        )
        await nodes.wait_until(lambda: app()["health"] == "healthy", 30, "it is not healthy again")
        (second,) = host.running()
        host.dockerd.docker("exec", second, "touch", "/ill")
        other = await nodes.wait_for_active("wiki", other_than=active, timeout=60)
        (third,) = host.running()
        labels = host.inspect(third)["Config"]["Labels"]  # pyright: ignore
        assert labels["phalanx.node"] == other
        assert ill in await phalanx("audit")

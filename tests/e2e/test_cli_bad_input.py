"""What only the machine can tell: one line with key, value and remedy, exit code 2, nothing was started."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from phalanx import system
from phalanx.bus.binary import nats_server_binary
from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.testing.nats import HOST, NatsServer, Ports

CLI = (sys.executable, "-m", "phalanx.cli.main")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory."""
    return tmp_path


def call(folder: Path, command: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the command line in *folder*; what came of it, and the mark of all processes it started."""
    mark = f"test-{secrets.token_hex(8)}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PHALANX_")}
    environment |= {"XDG_STATE_HOME": str(folder / "state"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {system.MARKER_ENV: mark}
    done = subprocess.run(
        [*CLI, *command.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, mark


def check_refused(done: subprocess.CompletedProcess[str], *names: str) -> None:
    """Exit code 2, one line, with all of *names* in it."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for name in names:
        assert name in lines[0], lines[0]
    assert done.stdout == ""


def snapshot(folder: Path) -> set[str]:
    """All files and folders there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def ports() -> Iterator[Ports]:
    """Free ports."""
    free = Ports()
    yield free
    free.close()


def declare(folder: Path, nats: str = "", http: str = "port = 0") -> None:
    """A declaration that is right by itself."""
    (folder / "phalanx.toml").write_text(
        f'[platform]\nname = "prod"\nnode = "n1"\ndata_dir = "data"\n{nats}\n[http]\n{http}\n'
    )


def check_cannot_start(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """``phalanx run`` refuses, and leaves neither file nor process."""
    before = snapshot(folder)
    done, mark = call(folder, "run phalanx.toml")
    check_refused(done, *names)
    assert snapshot(folder) == before
    assert system.find_marked(mark) == []
    return done


def listening(stack: ExitStack, port: int) -> None:
    """Somebody else has the port."""
    other = stack.enter_context(socket.create_server((HOST, port)))
    other.listen()


def streams_of(server: NatsServer, **login: str) -> list[str]:
    """The streams that the server holds."""

    async def ask() -> list[str]:
        bus = await NatsBus.connect(NatsOptions(urls=server.urls, **login))
        try:
            return list((await bus.api("STREAM.NAMES", {})).get("streams") or [])
        finally:
            await bus.close()

    return asyncio.run(ask())


def test_http_port_in_use_starts_nothing(folder: Path, ports: Ports, nats_server: NatsServer) -> None:
    """The HTTP port is somebody else's: refused before a stream is made in NATS."""
    port = ports.take()
    declare(folder, f'[nats]\nurls = ["{nats_server.url()}"]', f"port = {port}")
    with ExitStack() as stack:
        listening(stack, port)
        check_cannot_start(folder, "http.port", str(port), "choose another")
    assert streams_of(nats_server) == []


@pytest.mark.parametrize("field", ["port", "cluster_port", "monitor_port"])
def test_embedded_port_in_use_starts_nothing(folder: Path, ports: Ports, field: str) -> None:
    """A port of the embedded server is somebody else's."""
    chosen = {name: ports.take() for name in ("port", "cluster_port", "monitor_port")}
    own = f"{HOST}:{chosen['cluster_port']}"
    lines = "\n".join(f"{name} = {port}" for name, port in chosen.items())
    declare(folder, f'[nats.embedded]\n{lines}\nroutes = ["{own}"]')
    with ExitStack() as stack:
        listening(stack, chosen[field])
        check_cannot_start(folder, f"nats.embedded.{field}", str(chosen[field]), "choose another port")


def test_unreachable_nats_starts_nothing(folder: Path, ports: Ports) -> None:
    """Nobody listens there: the line names the server and the key."""
    url = f"nats://{HOST}:{ports.take()}"
    declare(folder, f'[nats]\nurls = ["{url}"]')
    check_cannot_start(folder, url, "nats.urls")


def test_nats_without_jetstream_starts_nothing(folder: Path, ports: Ports) -> None:
    """A real nats-server that was started without -js."""
    port = ports.take()
    server = subprocess.Popen(
        [nats_server_binary(), "-a", HOST, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: accepts(port), "nats-server does not listen")
        declare(folder, f'[nats]\nurls = ["nats://{HOST}:{port}"]')
        check_cannot_start(folder, "JetStream is not available", "nats-server -js")
    finally:
        server.kill()
        server.wait(10)


LOGINS = """
accounts {
  A { jetstream: enabled, users: [
    { user: "full", password: "secret-full" }
    { user: "none", password: "secret-none", permissions: { publish: "foo", subscribe: "_INBOX.>" } }
    { user: "look", password: "secret-look", permissions: {
        publish: ["$JS.API.INFO", "$JS.API.STREAM.INFO.>"], subscribe: "_INBOX.>" } }
  ] }
}
"""


@pytest.fixture(scope="module")
def guarded() -> Iterator[NatsServer]:
    """A real server that asks for a login."""
    with NatsServer(extra=LOGINS, system_user=False) as server:
        yield server


@pytest.mark.parametrize(
    ("user", "password", "names"),
    [
        ("", "", ("nats.user", "nats.credentials")),
        ("full", "wrong-one", ("nats.password",)),
        ("none", "secret-none", ("'none'", "$js.api.info", "phalanx nats permissions")),
        ("look", "secret-look", ("'look'", "$js.api.stream.create", "phalanx nats permissions")),
    ],
    ids=["no login", "wrong password", "may do nothing", "may only look"],
)
def test_login_that_does_not_do_starts_nothing(
    folder: Path, guarded: NatsServer, user: str, password: str, names: tuple[str, ...]
) -> None:
    """A missing login, a wrong password, missing permissions: told apart, and no password is shown."""
    login = f'user = "{user}"\npassword = "{password}"' if user else ""
    declare(folder, f'[nats]\nurls = ["{guarded.url()}"]\n{login}')
    done = check_cannot_start(folder, *names)
    assert "secret" not in done.stderr
    assert "wrong-one" not in done.stderr
    assert streams_of(guarded, user="full", password="secret-full") == []


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection((HOST, port), 0.2).close()
    except OSError:
        return False
    return True


def wait_until(condition: Callable[[], bool], problem: str, seconds: float = 10) -> None:
    """Ask until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.01)

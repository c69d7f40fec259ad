"""The node's HTTP server over real sockets: answers, refusals, slow and many clients, a bounded stop."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import h11
import httpx
import msgspec
import pytest
import uvloop

from phalanx.config import HttpServer
from phalanx.errors import StartError
from phalanx.observe import http as under_test
from phalanx.observe.http import MAX_CONNECTIONS, StatusServer
from phalanx.observe.metrics import CONTENT_TYPE, Metrics
from phalanx.types import AppStatus, Health, NodeStatus, Role


class View:
    """A node that a test can change."""

    def __init__(self) -> None:
        self.of = NodeStatus(
            "prod",
            "n1",
            "1.2.3",
            session="n1.ab",
            session_left_seconds=4.0,
            ready=True,
            connected=True,
            apps=(AppStatus("wiki", Role.ACTIVE, Health.HEALTHY, epoch=12, leader="n1"),),
            labels={"zone": "a"},
        )
        self.alive, self.is_ready = (True, ""), (True, "")
        self.breaks: Exception | None = None

    def app(self, **changes: Any) -> None:
        """Change app wiki."""
        self.of = msgspec.structs.replace(
            self.of, apps=(msgspec.structs.replace(self.of.apps[0], **changes),)
        )

    def status(self) -> NodeStatus:
        if self.breaks is not None:
            raise self.breaks
        return self.of

    def metrics(self) -> bytes:
        return Metrics("prod", "n1", "1.2.3").render(self.of)

    def live(self) -> tuple[bool, str]:
        return self.alive

    def ready(self) -> tuple[bool, str]:
        return self.is_ready


@pytest.fixture
def view() -> View:
    """A healthy node that is active for wiki."""
    return View()


@pytest.fixture
async def server(view: View) -> AsyncIterator[StatusServer]:
    """A server on a free port."""
    server = StatusServer(HttpServer(port=0), view)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(server: StatusServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it."""
    async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=5) as client:
        yield client


def port(server: StatusServer) -> int:
    """The port that the server listens on."""
    return int(server.address.rpartition(":")[2])


async def raw(server: StatusServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare TCP connection."""
    return await asyncio.open_connection("127.0.0.1", port(server))


async def ended(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the server ends the connection within this time."""
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(65536):
                pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return True


# --- what is answered


async def test_health_and_readiness_follow_the_node(client: httpx.AsyncClient, view: View) -> None:
    """200 while all is well, 503 with the reason when not; the two are independent."""
    for path, name in (("/health", "alive"), ("/ready", "is_ready")):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"ok": True, "reason": ""})
        setattr(view, name, (False, "disk full"))
        answer = await client.get(path)
        assert (answer.status_code, answer.json()) == (503, {"ok": False, "reason": "disk full"})
        setattr(view, name, (True, ""))


async def test_status_is_the_node_status_as_json(client: httpx.AsyncClient, view: View) -> None:
    """What the body says reads back as the same NodeStatus."""
    answer = await client.get("/status")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert msgspec.json.decode(answer.content, type=NodeStatus) == view.of


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("health", list(Health))
async def test_role_endpoints_answer_200_for_that_role_only(
    client: httpx.AsyncClient, view: View, role: Role, health: Health
) -> None:
    """active: exactly while active; standby: exactly while a standby that is not unhealthy."""
    view.app(role=role, health=health)
    active, standby = await client.get("/apps/wiki/active"), await client.get("/apps/wiki/standby")
    assert active.status_code == (200 if role is Role.ACTIVE else 503)
    assert standby.status_code == (200 if role is Role.STANDBY and health is not Health.UNHEALTHY else 503)
    body = active.json()
    assert (body["app"], body["node"], body["role"], body["epoch"]) == ("wiki", "n1", role.value, 12)
    assert body["ok"] == (role is Role.ACTIVE)
    assert body["reason"]


async def test_node_whose_session_is_over_does_not_claim_to_be_active(
    client: httpx.AsyncClient, view: View
) -> None:
    """A node that wakes up from a freeze may still hold the role: its own clock says that it is over."""
    view.of = msgspec.structs.replace(view.of, session_left_seconds=-0.5)
    answer = await client.get("/apps/wiki/active")
    assert answer.status_code == 503
    assert "session" in answer.json()["reason"]


async def test_metrics_are_served_as_prometheus_expects(client: httpx.AsyncClient) -> None:
    """The content type is that of the text format."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == CONTENT_TYPE
    assert b'phalanx_app_active{platform="prod",node="n1",app="wiki"} 1' in answer.content


PATHS = ("/health", "/ready", "/status", "/apps/wiki/active", "/apps/wiki/standby", "/metrics")


@pytest.mark.parametrize("path", PATHS)
async def test_head_answers_as_get_without_a_body(client: httpx.AsyncClient, path: str) -> None:
    """HAProxy asks by HEAD if told to: same status, same headers, no body; never cached."""
    get, head = await client.get(path), await client.head(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-length"] == str(len(get.content))
    for answer in (get, head):
        assert answer.headers["cache-control"] == "no-store"
        assert "date" in answer.headers
        assert "server" not in answer.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "STRANGE"])
@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
async def test_other_methods_are_refused(client: httpx.AsyncClient, method: str, path: str) -> None:
    """405 with Allow, whatever the path: nothing can be changed here."""
    answer = await client.request(method, path, content=b"x" if method == "POST" else None)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert "GET" in answer.json()["reason"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health/",
        "/Health",
        "/apps",
        "/apps/wiki",
        "/apps/blog/active",
        "/apps/blog/standby",
        "/apps//active",
        "/apps/..%2fwiki/active",
        "/apps/wiki%00/active",
        "/apps/%f0%9f/active",
        "/docs",
        "/status/x",
    ],
)
async def test_unknown_paths_and_apps_are_404(client: httpx.AsyncClient, path: str) -> None:
    """404 with a reason that helps; no redirects."""
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["reason"]


async def test_error_inside_is_a_500_without_details(
    client: httpx.AsyncClient, view: View, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the exception; the asker learns only that there was one, and the server goes on."""
    view.breaks = RuntimeError("secret detail")
    answer = await client.get("/status")
    assert answer.status_code == 500
    assert answer.headers["cache-control"] == "no-store"
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text
    view.breaks = None
    assert (await client.get("/status")).status_code == 200


async def test_nonsense_gets_400_and_is_not_logged(
    server: StatusServer, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are no HTTP, and heads without end, cost the sender its connection and us no log."""
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET /health\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 99999,
    ):
        reader, writer = await raw(server)
        writer.write(junk + b"\r\n\r\n")
        first = await reader.readline()
        assert first.startswith(b"HTTP/1.1 400")
        writer.close()
    assert (await client.get("/health")).status_code == 200
    assert caplog.text == ""


async def test_upgrade_to_websocket_is_answered_as_a_plain_request(server: StatusServer) -> None:
    """There are no websockets here."""
    reader, writer = await raw(server)
    writer.write(
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


# --- start


async def test_port_in_use_names_address_key_and_remedy(view: View) -> None:
    """The second server on a port is told which key to change."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(StartError) as caught:
            await StatusServer(HttpServer(port=number), view).start()
    message = str(caught.value)
    assert f"127.0.0.1:{number}" in message
    assert "in use" in message
    assert "http.port" in caught.value.remedy
    assert "\n" not in message


async def test_address_of_another_machine_is_refused(view: View) -> None:
    """An address that this machine has not, and a name that has none, name http.host."""
    for host in ("203.0.113.1", "no-such-host.invalid"):
        with pytest.raises(StartError) as caught:
            await StatusServer(HttpServer(host=host, port=0), view).start()
        assert host in str(caught.value)
        assert "http.host" in str(caught.value)


def test_unforeseen_trouble_with_the_address_still_names_the_keys() -> None:
    """Permission and other errors become a StartError that says where."""
    config = HttpServer(port=80)
    assert "1023" in under_test._start_error(config, OSError(errno.EACCES, "Permission denied")).remedy
    assert "http.host" in under_test._start_error(config, OSError(errno.EIO, "I/O error")).remedy


async def test_ipv6_address_is_shown_in_brackets(view: View) -> None:
    """[::1]:port, as it is written in a URL."""
    server = StatusServer(HttpServer(host="::1", port=0), view)
    try:
        await server.start()
    except StartError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert server.address.startswith("[::1]:")
    async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        assert (await client.get("/health")).status_code == 200
    await server.stop()


async def test_signals_stay_with_the_node(view: View) -> None:
    """The server takes over no signal handler: SIGTERM is the platform's."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    server = StatusServer(HttpServer(port=0), view)
    await server.start()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    await server.stop()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# --- slow and many clients


async def test_silent_and_dripping_clients_are_cut_off(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends nothing, a byte now and then, or a body without end has a limited time altogether."""
    monkeypatch.setattr(under_test, "REQUEST_SECONDS", 0.5)
    server = StatusServer(HttpServer(port=0), view)
    await server.start()
    silent, nothing = await raw(server)
    dripping, drip = await raw(server)
    endless, body = await raw(server)
    body.write(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def keep_sending(writer: asyncio.StreamWriter, data: Callable[[int], bytes]) -> None:
        for n in range(100):
            writer.write(data(n))
            await asyncio.sleep(0.05)

    sending = [
        asyncio.create_task(keep_sending(drip, lambda n: b"GET /health HTTP/1.1\r\n"[n : n + 1] or b"x")),
        asyncio.create_task(keep_sending(body, lambda n: b"1\r\nx\r\n")),
    ]
    assert await asyncio.gather(ended(silent, 2), ended(dripping, 2), ended(endless, 2)) == [True] * 3
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    for writer in (nothing, drip, body):
        writer.close()
    await server.stop()


async def test_client_that_does_not_read_is_cut_off(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that nobody takes do not pile up: the requests behind them wait, then the connection ends."""
    monkeypatch.setattr(under_test, "REQUEST_SECONDS", 0.5)
    server = StatusServer(HttpServer(port=0), view)
    await server.start()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port(server)))
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50

        async def send_for_ever() -> None:
            while True:
                await loop.sock_sendall(client, request)

        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            await asyncio.wait_for(send_for_ever(), 10)
    await server.stop()


async def test_more_clients_than_allowed_push_out_the_quietest(
    server: StatusServer, client: httpx.AsyncClient
) -> None:
    """However many connections stand idle, a new client is served; the number of connections is bounded."""
    idle = [await raw(server) for _ in range(MAX_CONNECTIONS + 50)]
    for _ in range(20):
        assert (await client.get("/health")).status_code == 200
        assert len(server._connections) <= MAX_CONNECTIONS
    assert await ended(idle[0][0], 2)
    assert not await ended(idle[-1][0], 0.1)
    for _, writer in idle:
        writer.close()


async def test_many_requests_at_once_are_all_answered(server: StatusServer) -> None:
    """A hundred clients with ten requests each, kept alive, pipelined by nobody: all get 200."""

    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=30) as client:
            return [(await client.get("/apps/wiki/active")).status_code for _ in range(10)]

    codes = await asyncio.gather(*(ask() for _ in range(20)))
    assert {code for each in codes for code in each} == {200}


# --- stop


async def test_stop_does_not_wait_for_open_connections(view: View) -> None:
    """Idle, half-sent and unread connections: stopping takes less than a second, and the port is free."""
    server = StatusServer(HttpServer(port=0), view)
    await server.start()
    number = port(server)
    kept = httpx.AsyncClient(base_url=f"http://{server.address}")
    assert (await kept.get("/health")).status_code == 200
    silent, half = await raw(server), await raw(server)
    half[1].write(b"GET /health HT")
    unread = await raw(server)
    unread[1].write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
    async with asyncio.timeout(10):
        while not any(each.flow.write_paused for each in server._connections):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    began = time.monotonic()
    await server.stop()
    assert time.monotonic() - began < under_test.REQUEST_SECONDS / 2
    assert server.address == ""
    assert not server._connections
    for reader, _ in (silent, half, unread):
        assert await ended(reader, 20)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", number)
    await server.stop()
    again = StatusServer(HttpServer(port=number), view)
    await again.start()
    await again.stop()
    await kept.aclose()
    for _, writer in (silent, half, unread):
        writer.close()


async def test_stop_with_idle_connections_only_is_immediate(
    server: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that wait for nothing are closed at once, in an orderly way."""
    monkeypatch.setattr(under_test, "_STOP_SECONDS", 20.0)
    async with httpx.AsyncClient(base_url=f"http://{server.address}") as kept:
        assert (await kept.get("/health")).status_code == 200
        reader, writer = await raw(server)
        began = time.monotonic()
        await server.stop()
        assert time.monotonic() - began < under_test._STOP_SECONDS / 2
        assert await reader.read() == b""
        writer.close()


def test_the_server_speaks_the_protocol_that_it_is_built_on() -> None:
    """What we use of uvicorn's insides is there; a new version that changes it fails here, not at users'."""
    connection = under_test._Connection
    for name in ("connection_made", "connection_lost", "data_received", "on_response_complete", "shutdown"):
        assert callable(getattr(connection.__mro__[1], name))
    assert issubclass(h11.LocalProtocolError, Exception)
    assert json.loads(under_test._encode({"role": Role.ACTIVE})) == {"role": "active"}


def test_it_works_on_uvloop_too(view: View) -> None:
    """The loop that nodes run on: answers, a taken port, and a stop that waits for no open connection."""

    async def check() -> None:
        server = StatusServer(HttpServer(port=0), view)
        await server.start()
        assert "uvloop" in type(asyncio.get_running_loop()).__module__
        async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
            assert (await client.get("/apps/wiki/active")).status_code == 200
            with pytest.raises(StartError, match="in use"):
                await StatusServer(HttpServer(port=port(server)), view).start()
            reader, writer = await raw(server)
            began = time.monotonic()
            await server.stop()
            assert time.monotonic() - began < under_test.REQUEST_SECONDS / 2
            assert await ended(reader, 20)
            writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check())

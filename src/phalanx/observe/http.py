"""The node's HTTP server: health, readiness, roles, status, metrics. It changes nothing.

HAProxy, a load balancer or a Kubernetes probe needs only status codes: 200 or 503. Bodies are JSON for
people. The server runs in the node's event loop, so it is a guest there: handlers do no I/O, connections
are few and short-lived, and whoever is slow is cut off first.

uvicorn is used for its HTTP protocol only. Its ``Server`` takes over signals, exits the process when a
port is taken, wakes up ten times a second, and waits for idle connections at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Protocol

import h11
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from phalanx.config import HttpServer
from phalanx.config.secret import hide_secrets
from phalanx.errors import StartError
from phalanx.observe.metrics import CONTENT_TYPE
from phalanx.types import AppStatus, Health, NodeStatus, Role

log = logging.getLogger("phalanx.http")
_protocol_log = logging.getLogger("phalanx.http.protocol")
_protocol_log.setLevel(logging.ERROR)  # Whoever sends nonsense must not be able to fill the log.

MAX_CONNECTIONS = 128
"""One more, and the one that has been quiet for longest is cut off."""

IDLE_SECONDS = 5
"""How long a connection may be kept without a request."""

REQUEST_SECONDS = 10.0
"""How long a client may take to send a request and to read the answer."""

_MAX_HEAD_BYTES = 16 * 1024
_STOP_SECONDS = 0.5
_ALLOWED = ("GET", "HEAD")
_encode = msgspec.json.Encoder(enc_hook=hide_secrets).encode


class NodeView(Protocol):
    """What the server shows. All of it is asked in the event loop, and must answer at once."""

    def status(self) -> NodeStatus:
        """The node's own view of itself, now."""
        ...

    def metrics(self) -> bytes:
        """Prometheus' text format."""
        ...

    def live(self) -> tuple[bool, str]:
        """Whether the process works; if not, restarting it may help. With the reason."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether the node can do its part in the platform. With the reason."""
        ...


class StatusServer:
    """Serves a :class:`NodeView` as declared in ``http``. Use :meth:`start`, later :meth:`stop`."""

    def __init__(self, config: HttpServer, view: NodeView) -> None:
        self._config = config
        self._state = ServerState()
        self._connections: dict[_Connection, None] = {}
        """Those that have been quiet for longest come first."""
        self._server: asyncio.Server | None = None
        self._uvicorn = uvicorn.Config(
            _ReadOnly(_application(view)),
            http=H11Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )
        self._uvicorn.load()

    @property
    def address(self) -> str:
        """``host:port`` that it listens on, with the real port; empty while it does not run."""
        if self._server is None or not self._server.sockets:
            return ""
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Listen; requests are served from then on. Raises StartError if the address can't be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _Connection(self._uvicorn, self._state, self._connections),
                host=self._config.host,
                port=self._config.port,
                backlog=MAX_CONNECTIONS,
            )
        except OSError as error:
            raise _start_error(self._config, error) from error
        log.info("http: listening on %s", self.address)

    async def stop(self) -> None:
        """Stop listening and close all connections, idle ones at once. Takes half a second at most."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._connections):
            connection.finish()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                while self._connections:  # noqa: ASYNC110 - a few ms, once
                    await asyncio.sleep(0.005)
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Python 3.12 waits here for connections; all were closed or aborted above.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), _STOP_SECONDS)


class _Connection(H11Protocol):
    """One client. It is cut off when it makes no progress, or when there are too many."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, connections: dict[_Connection, None]
    ) -> None:
        super().__init__(config, state, {})
        # Ours instead of uvicorn's loggers, which may belong to a program that uses uvicorn itself.
        self.logger, self.access_log = _protocol_log, False
        self._all = connections
        self._watchdog: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        while len(self._all) >= MAX_CONNECTIONS:
            next(iter(self._all)).abort()
        self._progress()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.pop(self, None)
        if self._watchdog is not None:
            self._watchdog.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def on_response_complete(self) -> None:
        self._progress()
        super().on_response_complete()

    def _progress(self) -> None:
        """Only whole answers count: a byte now and then must not keep a connection."""
        self._all.pop(self, None)
        self._all[self] = None
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = self.loop.call_later(REQUEST_SECONDS, self.abort)

    def finish(self) -> None:
        """Close after the answer that is being given, if any."""
        try:
            self.shutdown()
        except h11.LocalProtocolError:  # in the middle of a request
            self.abort()

    def abort(self) -> None:
        """Close now, whatever is unsent."""
        self._all.pop(self, None)
        self.transport.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade is not taken; the request is answered as it is. No reason to log twice a request."""


class _ReadOnly:
    """Refuses all methods but GET and HEAD, before anything else is looked at."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in _ALLOWED:
            await self._app(scope, receive, send)
            return
        response = _json(405, {"reason": "only GET and HEAD; this server changes nothing"})
        response.headers["Allow"] = ", ".join(_ALLOWED)
        await response(scope, receive, send)


def _application(view: NodeView) -> Starlette:
    async def health(_: Request) -> Response:
        return _verdict(*view.live())

    async def ready(_: Request) -> Response:
        return _verdict(*view.ready())

    async def status(_: Request) -> Response:
        return _json(200, view.status())

    async def active(request: Request) -> Response:
        return _about_app(view.status(), request.path_params["app"], _is_active)

    async def standby(request: Request) -> Response:
        return _about_app(view.status(), request.path_params["app"], _is_standby)

    async def metrics(_: Request) -> Response:
        return _response(200, view.metrics(), CONTENT_TYPE)

    app = Starlette(
        routes=[
            _route("/health", health),
            _route("/ready", ready),
            _route("/status", status),
            _route("/apps/{app}/active", active),
            _route("/apps/{app}/standby", standby),
            _route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: _not_found, Exception: _broken},
    )
    app.router.redirect_slashes = False
    return app


def _route(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, endpoint, methods=list(_ALLOWED))


def _about_app(
    status: NodeStatus, name: str, verdict: Callable[[NodeStatus, AppStatus], tuple[bool, str]]
) -> Response:
    for app in status.apps:
        if app.name == name:
            yes, reason = verdict(status, app)
            facts = {
                "app": name,
                "node": status.node,
                "role": app.role,
                "epoch": app.epoch,
                "leader": app.leader,
            }
            return _json(200 if yes else 503, {"ok": yes, "reason": reason, **facts})
    known = ", ".join(app.name for app in status.apps) or "none"
    return _json(404, {"reason": f"no such app on node {status.node}; it has: {known}"})


def _is_active(status: NodeStatus, app: AppStatus) -> tuple[bool, str]:
    if app.role is Role.ACTIVE and status.session_left_seconds <= 0 and app.held_seconds <= 0:
        # A node that was frozen answers before it has noticed that its time is over.
        return False, "the node's session is over"
    return app.role is Role.ACTIVE, app.reason or f"the app is {app.role} here"


def _is_standby(_: NodeStatus, app: AppStatus) -> tuple[bool, str]:
    if app.role is Role.STANDBY and app.health is Health.UNHEALTHY:
        return False, app.reason or "the app is unhealthy here"
    return app.role is Role.STANDBY, app.reason or f"the app is {app.role} here"


def _verdict(yes: bool, reason: str) -> Response:
    return _json(200 if yes else 503, {"ok": yes, "reason": reason})


async def _not_found(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    shown = "/health, /ready, /status, /apps/<app>/active, /apps/<app>/standby, /metrics"
    return _json(code, {"reason": f"nothing here; there is {shown}" if code == 404 else "refused"})


async def _broken(request: Request, error: Exception) -> Response:
    """Whoever asks gets no details: they may hold what is nobody's business. The log has them."""
    return _json(500, {"reason": "internal error; see the node's log"})


def _json(code: int, body: object) -> Response:
    return _response(code, _encode(body), "application/json")


def _response(code: int, body: bytes, content_type: str) -> Response:
    headers = {
        "Content-Type": content_type,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Date": formatdate(usegmt=True),
    }
    return Response(body, code, headers)


def _start_error(config: HttpServer, error: OSError) -> StartError:
    where = f"http server on {config.host}:{config.port}"
    if isinstance(error, socket.gaierror):
        return StartError(
            f"{where}: http.host has no address ({error.strerror})",
            "set http.host to an address of this machine",
        )
    if error.errno == errno.EADDRINUSE:
        return StartError(
            f"{where}: the port is in use",
            f"stop what listens there (ss -ltnp 'sport = {config.port}'), or set http.port to another one "
            "(0: any free one)",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return StartError(f"{where}: this machine has no such address", "set http.host to one that it has")
    if error.errno == errno.EACCES:
        return StartError(f"{where}: not permitted", "set http.port to one above 1023")
    return StartError(f"{where}: {error.strerror or error}", "check http.host and http.port")

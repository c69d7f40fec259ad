"""The nats-server that a node runs beside itself.

It lives in a session of its own and survives a crash of its node, so that the loss of a node is not
the loss of a NATS server too. A node that starts again *adopts* the server that still runs with the
same configuration; one with another configuration, or another nats-server program, is stopped first.

One task, owned by :class:`EmbeddedServer` and awaited by ``stop()`` or ``detach()``, waits for the end
of the process and starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from nats.aio.client import Client
from nats.errors import Error as NatsError

from phalanx.bus import embedded_config
from phalanx.bus.binary import nats_server_binary
from phalanx.bus.server_process import ServerProcess
from phalanx.config import EmbeddedNats, NatsOptions
from phalanx.decide.backoff import Backoff
from phalanx.errors import NatsUnusable, StartError

_log = logging.getLogger("phalanx.nats")

LISTEN_SECONDS = 30.0
"""How long a started server may take until it listens (it reads its whole store first)."""

STABLE_SECONDS = 60.0
"""A server that ran this long has not failed at its start: the delay begins small again."""

_TERMINATE_SECONDS = 5.0
_KILL_SECONDS = 5.0


def _ignore(kind: str, detail: str) -> None:
    """Nobody wants to know."""


class EmbeddedServer:
    """One supervised nats-server with JetStream, on its own or in the cluster of the platform's nodes.

    *on_event(kind, detail)* is told what happened: ``started``, ``adopted``, ``replaced`` (a left-over
    was stopped), ``exited``, ``start-failed``, ``stopped``. *restart* is the delay before it is started
    again after failures in a row. Raises ConfigError at once for a declaration that is wrong or would
    leave the server open to strangers.
    """

    def __init__(
        self,
        config: EmbeddedNats,
        *,
        platform: str,
        node: str,
        data_dir: str | Path,
        on_event: Callable[[str, str], None] = _ignore,
        restart: Backoff = Backoff(first=0.2, longest=10.0),  # noqa: B008 - frozen
    ) -> None:
        config = embedded_config.checked(config)
        self._config, self._on_event, self._restart = config, on_event, restart
        self._directory = Path(data_dir).absolute() / "nats"
        self._text = embedded_config.render(config, platform, node, self._directory)
        self._process: ServerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._lock: int | None = None
        self.server_name = embedded_config.name_of(config, platform, node)

    @property
    def options(self) -> NatsOptions:
        """How to connect to this server. Clients learn of the cluster's other servers from it."""
        config = self._config
        scheme = "tls" if config.tls_cert else "nats"
        host = embedded_config.bracketed(embedded_config.local_host(config))
        return NatsOptions(
            urls=(f"{scheme}://{host}:{config.port}",),
            user=config.user,
            password=config.password,
            token=config.token,
            tls_ca=config.tls_ca,
            tls_cert=config.tls_cert if config.tls_ca else "",
            tls_key=config.tls_key if config.tls_ca else "",
            server_name=self.server_name,
            replicas=config.replicas,
        )

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it does not run."""
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    @property
    def log_path(self) -> Path:
        """Where the server logs (at most four files of 10 MB)."""
        return self._directory / "nats.log"

    # --- start

    async def start(self) -> None:
        """Adopt the server that still runs, or start one; return when it listens.

        Raises StartError, with nothing left running, when a port is taken by something else, another
        node uses the same data directory, or the server does not come up.
        """
        if self._supervisor is not None:
            return
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        try:
            if not await self._adopt():
                self._check_ports()
                self._spawn()
                await self._listening()
                self._tell("started", f"pid {self._running.pid}")
        except BaseException:
            await asyncio.shield(self._end_process())
            self._release_lock()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name=f"nats-server {self.server_name}")

    async def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until JetStream answers, which in a cluster needs a majority of its servers.

        Raises NatsUnusable when it does not within *timeout* seconds.
        """
        problem = "no answer"
        try:
            async with asyncio.timeout(timeout):
                while True:
                    problem = await self._jetstream_problem()
                    if not problem:
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            servers = embedded_config.cluster_size(self._config)
            hint = f"; {servers // 2 + 1} of the {servers} servers have to run" if servers > 1 else ""
            raise NatsUnusable(
                f"the embedded nats-server {self.server_name} was not ready after {timeout:g} s: {problem}",
                f"see {self.log_path}{hint}",
            ) from None

    async def _jetstream_problem(self) -> str:
        """What keeps JetStream from answering, by asking it as a client; empty when it answers."""
        client, options = Client(), self.options

        async def ignore(error: Exception) -> None:
            """The outcome below says it all."""

        try:
            await client.connect(
                list(options.urls),
                allow_reconnect=False,
                connect_timeout=2,
                error_cb=ignore,
                user=options.user or None,
                password=options.password.reveal() or None,
                token=options.token.reveal() or None,
                tls=_tls_context(options),
            )
            answer = await client.request("$JS.API.INFO", timeout=1)
            return "" if b'"error"' not in answer.data else answer.data.decode(errors="replace")
        except (OSError, NatsError, TimeoutError) as error:
            return f"{type(error).__name__} {error}".strip()
        finally:
            with contextlib.suppress(OSError, NatsError):
                await client.close()

    async def _adopt(self) -> bool:
        """Whether a left-over server now is ours. One with another configuration is stopped."""
        found = ServerProcess.find(self._directory)
        if found is None:
            return False
        self._process = found
        if found.record.config == self._digest():
            self._tell("adopted", f"pid {found.pid} still ran with this configuration")
            await self._listening()
            return True
        self._tell("replaced", f"pid {found.pid} ran with another configuration, it is stopped")
        await self._end_process()
        return False

    def _check_ports(self) -> None:
        config = self._config
        ports = [("port", config.port)]
        ports += [("cluster_port", config.cluster_port)] if config.routes else []
        ports += [("monitor_port", config.monitor_port)] if config.monitor_port else []
        for field, port in ports:
            family, kind, protocol, _, address = socket.getaddrinfo(
                config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                    probe.listen(1)
                except OSError as error:
                    raise StartError(
                        f"nats-server cannot listen on {config.host}:{port} ({error.strerror})",
                        f"stop what uses it or choose another nats.embedded.{field}",
                    ) from None

    def _spawn(self) -> None:
        path = self._directory / "nats.conf"
        fresh = self._directory / "nats.conf.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(0o600)
        fresh.write_text(self._text)
        fresh.replace(path)
        self._process = ServerProcess.spawn(
            [nats_server_binary(), "-c", str(path)], self._directory / "nats.out", self._digest()
        )
        self._process.record.write(self._directory / "server.json")

    async def _listening(self) -> None:
        address = (embedded_config.local_host(self._config), self._config.port)
        process = self._running
        deadline = time.monotonic() + LISTEN_SECONDS
        while True:
            if not process.is_alive():
                raise StartError(
                    f"nats-server {process.how_it_ended}: {self._last_words()}", f"see {self.log_path}"
                )
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    _, writer = await asyncio.open_connection(*address)
                writer.close()
                return
            if time.monotonic() > deadline:
                raise StartError(
                    f"nats-server does not listen on {address[0]}:{address[1]} after {LISTEN_SECONDS:g} s",
                    f"see {self.log_path}",
                )
            await asyncio.sleep(0.01)

    # --- supervision

    async def _supervise(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            await self._running.wait()
            failures = 1 if time.monotonic() - began > STABLE_SECONDS else failures + 1
            delay = self._restart.delay(failures)
            how = f"{self._running.how_it_ended}; {self._last_words()}"
            self._tell("exited", f"{how}; started again in {delay:g} s", logging.ERROR)
            await asyncio.sleep(delay)
            await self._spawn_again()

    async def _spawn_again(self) -> None:
        failures = 0
        while True:
            try:
                self._spawn()
                break
            except (OSError, StartError) as error:
                failures += 1
                delay = self._restart.delay(failures)
                self._tell("start-failed", f"{error}; tried again in {delay:g} s", logging.ERROR)
                await asyncio.sleep(delay)
        self._tell("started", f"pid {self._running.pid}")

    # --- stop

    async def stop(self, lame_duck_seconds: float = 3.0) -> None:
        """Stop the server and wait for its end. Harmless when done twice.

        In a cluster it first hands its leaderships and clients to the others (lame duck), for at most
        *lame_duck_seconds*; then comes SIGTERM, and after 5 s SIGKILL.
        """
        if self._supervisor is None:
            return
        pid = self.pid
        await self._end_supervision()
        await asyncio.shield(self._end_process(lame_duck_seconds))
        (self._directory / "server.json").unlink(missing_ok=True)
        self._release_lock()
        self._tell("stopped", f"pid {pid}")

    async def detach(self) -> None:
        """End the supervision and leave the server running, for the next node to adopt."""
        await self._end_supervision()
        self._process = None
        self._release_lock()

    async def _end_supervision(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor])
            if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
                _log.error("the supervision of nats-server had failed", exc_info=error)

    async def _end_process(self, lame_duck_seconds: float = 0.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        steps = [(signal.SIGTERM, _TERMINATE_SECONDS), (signal.SIGKILL, _KILL_SECONDS)]
        if self._config.routes and lame_duck_seconds > 0:
            steps.insert(0, (signal.SIGUSR2, lame_duck_seconds))
        for number, seconds in steps:
            process.send(number)
            if await process.wait(seconds):
                return
        self._tell("stop-failed", f"pid {process.pid} did not even obey SIGKILL", logging.ERROR)

    # --- small things

    @property
    def _running(self) -> ServerProcess:
        assert self._process is not None  # only called between start and stop
        return self._process

    def _digest(self) -> str:
        """What a server has to run with to be adopted: this configuration and this program."""
        binary = nats_server_binary()
        status = os.stat(binary)
        what = f"{binary} {status.st_size} {status.st_mtime_ns}\n{self._text}"
        return hashlib.sha256(what.encode()).hexdigest()

    def _last_words(self) -> str:
        """The server's last error, without its time stamp."""
        for path in (self._directory / "nats.out", self.log_path):
            with contextlib.suppress(OSError):
                for line in reversed(path.read_bytes()[-8192:].decode(errors="replace").splitlines()):
                    if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server:"):
                        return "last error logged: " + line.split("] ", 2)[-1].strip()
        return "it logged no error"

    def _take_lock(self) -> None:
        """Hold ``<data_dir>/nats/lock`` while we supervise: two nodes must not fight over one server."""
        descriptor = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise StartError(
                f"another node already runs the nats-server in {self._directory}",
                "give each node its own data_dir",
            ) from None
        self._lock = descriptor

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _tell(self, kind: str, detail: str, level: int = logging.INFO) -> None:
        _log.log(level, "embedded nats-server %s %s: %s", self.server_name, kind, detail)
        try:
            self._on_event(kind, detail)
        except Exception:
            # Whoever listens must not be able to end the supervision.
            _log.exception("on_event(%r, ...) failed", kind)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _tls_context(options: NatsOptions) -> ssl.SSLContext | None:
    if not options.urls[0].startswith("tls:"):
        return None
    context = ssl.create_default_context(cafile=options.tls_ca or None)
    if options.tls_cert:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    return context

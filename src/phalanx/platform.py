"""The public face: declare a platform and its apps, then run this node of it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from phalanx import preflight, system
from phalanx.app import App, NodeApp, PoolApp, RingApp
from phalanx.backends import Holder, make_backend
from phalanx.config import (
    ActivePassive,
    AppConfig,
    Backend,
    Check,
    EmbeddedNats,
    Events,
    Fence,
    HookTimeouts,
    HttpServer,
    Logging,
    NatsOptions,
    PlatformConfig,
    Pool,
    Process,
    Restart,
    Ring,
    SQLite,
    Timings,
    VirtualIP,
    between_apps,
    build_app,
    build_platform,
    with_platform,
)
from phalanx.coord.locks import Lock, Locks, Semaphore
from phalanx.decide.backoff import Backoff
from phalanx.ending import EXIT_FAILED, Ending, leave
from phalanx.errors import AddressError, BackendError, ConfigError, PhalanxError, StartError
from phalanx.hooks import CANCEL_SECONDS
from phalanx.left_overs import end_left_overs
from phalanx.messaging import events as messaging
from phalanx.messaging.api import Api
from phalanx.names import Names
from phalanx.net import make_addresses
from phalanx.node import Node
from phalanx.observe.logs import configure_logging
from phalanx.types import Member, NodeStatus, Role

if TYPE_CHECKING:
    from phalanx.client import PlatformClient
    from phalanx.client_pool import Scaled

log = logging.getLogger("phalanx")

EXIT_BAD_INPUT = 2

END_SECONDS = 30.0
"""What a node may take to end after its last session, besides the deadlines of its ``on_stop`` hooks."""


class Platform:
    """This node of a platform.

    Declare apps with :meth:`app`, then call :meth:`run`, or use it as ``async with`` in your own loop.
    Options left out come from the environment (``PHALANX_NODE``, ``PHALANX_DATA``, ``PHALANX_NATS``,
    ``PHALANX_HTTP``) or have the defaults of docs/configuration.md.

    Raises ConfigError for anything that is wrong, before anything starts.
    """

    def __init__(
        self,
        name: str,
        *,
        node: str | None = None,
        nats: str | Sequence[str] | NatsOptions | EmbeddedNats | None = None,
        data_dir: str | None = None,
        labels: Mapping[str, str] | None = None,
        timings: Timings | Mapping[str, Any] | None = None,
        fence: Fence | str | Sequence[str] | None = None,
        direct: str | None = None,
        http: HttpServer | Mapping[str, Any] | None = None,
        logging: Logging | Mapping[str, Any] | None = None,
    ) -> None:
        self._set_up(
            build_platform(
                name,
                node=node,
                nats=nats,
                data_dir=data_dir,
                labels=labels,
                timings=timings,
                fence=fence,
                direct=direct,
                http=http,
                logging=logging,
            )
        )

    def _set_up(self, config: PlatformConfig) -> None:
        self.config = config
        self._apps: dict[str, NodeApp] = {}
        self._node: Node | None = None
        self._running: asyncio.Task[None] | None = None
        self._owns_process = self._checked = False
        self._ending = Ending()
        self._events = messaging.Events.over(lambda: self._live.bus, Names(config.name), None)
        self._holder = Holder(Path(str(config.data_dir))) if system.LINUX else None

    @classmethod
    def from_config(cls, config: PlatformConfig, apps: Sequence[AppConfig] = ()) -> Platform:
        """A platform from checked declarations, as ``phalanx.config.load_toml`` returns them."""
        platform = cls.__new__(cls)
        platform._set_up(config)
        for app in apps:
            platform._add(app)
        return platform

    @classmethod
    def client(
        cls,
        name: str,
        nats: str | Sequence[str] | NatsOptions | None = None,
        *,
        timeout: float = 5.0,
    ) -> PlatformClient:
        """A client of the platform *name*, in a process that is no node of it.

        As ``async with`` (then :meth:`PlatformClient.api`), or as ``with`` for code without an event loop.
        *nats*: else PHALANX_NATS. *timeout*: how long connecting may take, in seconds. Raises ConfigError.
        """
        from phalanx.client import PlatformClient  # nothing that a node needs

        servers = build_platform(name, node="client", nats=nats).nats
        if not isinstance(servers, NatsOptions):
            raise ConfigError("nats", "embedded", "a client starts no server", "give the URLs of servers")
        return PlatformClient(name, servers, timeout=timeout)

    # --- declaring

    @overload
    def app(
        self,
        name: str,
        pattern: ActivePassive | None = None,
        *,
        backend: Backend | None = None,
        checks: Sequence[Check] | None = None,
        hook_timeouts: HookTimeouts | None = None,
        database: SQLite | str | None = None,
        events: Events | Mapping[str, Any] | bool | None = None,
        vip: VirtualIP | str | Sequence[VirtualIP | str] | None = None,
        restart: Restart | None = None,
        kv_history: int | None = None,
        retry: Backoff | None = None,
    ) -> App: ...
    @overload
    def app(
        self,
        name: str,
        pattern: Ring,
        *,
        checks: Sequence[Check] | None = None,
        hook_timeouts: HookTimeouts | None = None,
        kv_history: int | None = None,
        retry: Backoff | None = None,
    ) -> RingApp: ...
    @overload
    def app(
        self,
        name: str,
        pattern: Pool,
        *,
        backend: Backend | None = None,
        checks: Sequence[Check] | None = None,
        hook_timeouts: HookTimeouts | None = None,
        events: Events | Mapping[str, Any] | bool | None = None,
        restart: Restart | None = None,
        kv_history: int | None = None,
        retry: Backoff | None = None,
    ) -> PoolApp: ...
    def app(
        self,
        name: str,
        pattern: ActivePassive | Pool | Ring | None = None,
        *,
        backend: Backend | None = None,
        checks: Sequence[Check] | None = None,
        hook_timeouts: HookTimeouts | None = None,
        database: SQLite | str | None = None,
        events: Events | Mapping[str, Any] | bool | None = None,
        vip: VirtualIP | str | Sequence[VirtualIP | str] | None = None,
        restart: Restart | None = None,
        kv_history: int | None = None,
        retry: Backoff | None = None,
    ) -> App | PoolApp | RingApp:
        """Declare an app. Raises ConfigError when it is wrong, or exists, or the platform runs already.

        The pattern decides what is returned: ActivePassive (the default) an App, Pool a PoolApp, Ring a
        RingApp.
        """
        return self._add(
            build_app(
                name,
                pattern if pattern is not None else ActivePassive(),
                backend=backend,
                checks=checks,
                hook_timeouts=hook_timeouts,
                database=database,
                events=events,
                vip=vip,
                restart=restart,
                kv_history=kv_history,
                retry=retry,
            )
        )

    def _add(self, config: AppConfig) -> App | PoolApp | RingApp:
        if config.name in self._apps:
            raise ConfigError("apps", config.name, "this app is declared already", "choose another name")
        if self._node is not None:
            raise ConfigError("apps", config.name, "the platform runs already", "declare apps before")
        for error in between_apps([*(app.config for app in self._apps.values()), config]):
            raise error
        for error in with_platform(self.config, config):
            raise error
        app = self._apps[config.name] = self._made(config)
        return app

    def _made(self, config: AppConfig) -> App | PoolApp | RingApp:
        if isinstance(config.pattern, Ring):
            return RingApp(config)
        backend = None
        if config.backend is not None:
            backend = make_backend(config.backend, self.config.name, self.config.node, self._holder)
        if isinstance(config.pattern, Pool):
            return PoolApp(config, backend)
        addresses = make_addresses(config.name, config.vip, self.config.timings.ttl) if config.vip else None
        return App(config, backend, addresses)

    @property
    def apps(self) -> Mapping[str, NodeApp]:
        """The declared apps by name."""
        return dict(self._apps)

    def api(self, app: str) -> Api:
        """The calls of *app*, wherever it runs, to be made while this platform runs. Raises ConfigError."""
        return Api(app, lambda: self._live.caller)

    @property
    def events(self) -> messaging.Events:
        """The events of the whole platform, to be used while it runs."""
        return self._events

    # --- locks of the platform

    @property
    def locks(self) -> Locks:
        """The locks and semaphores of the platform: whatever apps a node runs, they are the same for all
        nodes. Raises StartError while there is no session."""
        locks = self._live.locks
        if locks is None:
            raise StartError("the platform has no session just now", "use its locks while it is started")
        return locks

    def lock(
        self, name: str, *, timeout: float = 10.0, cancel: bool = False
    ) -> AbstractAsyncContextManager[Lock]:
        """A lock of the platform, held through this node's session: ``async with platform.lock("x") as
        held``. See docs/kv-and-locks.md."""
        return self.locks.lock(name, timeout=timeout, cancel=cancel)

    def semaphore(self, name: str, *, permits: int) -> Semaphore:
        """A semaphore of the platform: at most *permits* are held at a time. Raises ConfigError."""
        return Semaphore(lambda: self.locks, name, permits)

    # --- pools

    async def scale(self, app: str, replicas: int | None = None, *, reset: bool = False) -> Scaled:
        """Have *replicas* nodes be active for the pool *app*; see :meth:`PlatformClient.scale`.

        Raises ConfigError for an app that is no pool declared here, StartError while this node does not run.
        """
        from phalanx.client_pool import scale  # nothing that every node needs

        found = self._apps.get(app)
        if not isinstance(found, PoolApp):
            problem = "it is no pool" if found is not None else "it is not declared here"
            raise ConfigError("app", app, problem, "name a Pool(...) of this node, or use Platform.client()")
        node, declared = self._live, found.pattern.replicas
        return await scale(
            node.bus, node.names, app, replicas, by=self.config.node, declared=declared, reset=reset
        )

    # --- running in one's own loop

    async def check(self) -> None:
        """Look for what would keep this node from starting: files, ports, NATS, rights. Makes nothing.

        Raises ConfigError, StartError, BackendError, AddressError. :meth:`start` does this first, unless
        it was done just before.
        """
        await preflight.check(self.config, [app.config for app in self._apps.values()])
        for app in self._apps.values():
            await app.check()
        self._checked = True

    async def start(self) -> None:
        """Start this node; returns once it takes part. Raises StartError, ConfigError; then nothing runs."""
        if self._running is not None:
            raise StartError("this platform runs already", "make another Platform for another node")
        await end_left_overs(Path(str(self.config.data_dir)))
        if not self._checked:
            await self.check()
        self._checked = False
        self._node = node = Node(self.config, self._apps.values())
        node.owns_process = self._owns_process
        if any(isinstance(app.config.backend, Process) for app in self._apps.values()):
            node.beside = self._holder
        if self._owns_process:
            try:
                node.alarm.enable()
            except RuntimeError as error:
                log.warning("the kernel will not end this process at its session's end: %s", error)
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        life = node.run(started, self._on_last_session_over)
        self._running = running = asyncio.create_task(life, name=f"phalanx {self.config.node}")
        try:
            await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._abandon(running)
            raise
        if started.done():
            return
        self._node, self._running = None, None
        running.result()  # raises why it did not start
        raise StartError("the node ended while it started", "see the log")

    async def _abandon(self, running: asyncio.Task[None]) -> None:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        self._node, self._running = None, None

    async def stop(self, reason: str = "the node is stopping") -> None:
        """Hand every app over, then stop this node. Harmless when it does not run.

        Raises what ended the node, if that was an error (InternalError: a part of it had failed).
        """
        running = self._running
        if running is None or self._node is None:
            return
        self._node.stop(reason)
        try:
            await asyncio.shield(running)
        finally:
            if running.done():
                self._node, self._running = None, None

    async def wait(self) -> None:
        """Wait until this node has ended. Raises what ended it, if that was an error."""
        if self._running is not None:
            await asyncio.shield(self._running)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except PhalanxError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # what the body raised goes first

    # --- what is so

    @property
    def _live(self) -> Node:
        if self._node is None:
            raise StartError("the platform does not run", "start it, or use it inside its async with")
        return self._node

    def status(self) -> NodeStatus:
        """This node's view of itself."""
        return self._live.status()

    def members(self) -> dict[str, Member]:
        """The nodes of the platform, as they describe themselves. One that died stays until it returns."""
        return dict(self._live.state.members)

    def live_members(self) -> dict[str, Member]:
        """The members whose session is not over."""
        return self._live.live_members()

    @property
    def http_address(self) -> str:
        """Where this node's HTTP server listens (``host:port``), empty if it does not."""
        return self._live.http_address

    async def wait_for_role(self, app: str, *roles: Role, timeout: float = 30.0) -> Role:
        """Wait until this node's role for *app* is one of *roles*. Raises TimeoutError."""
        return await self._apps[app].wait_for_role(*roles, timeout=timeout)

    # --- running by itself

    def run(self) -> None:
        """Run this node until SIGTERM or SIGINT, which hand its apps over first (twice: at once).

        Configures logging. Ends the process with exit code 2 for bad input or when the node cannot
        start, 1 when it failed later. It does not wait for a hook that does not end: then the process ends
        without another word (no ``finally`` of yours, no ``atexit``), and so it does some seconds after a
        second signal.
        """
        configure_logging(self.config.logging, platform=self.config.name, node=self.config.node)
        self._owns_process = True
        code = _runner()(self._main())
        self._ending.call_off()
        if code:
            sys.exit(code)

    async def _main(self) -> int:
        """One life, and the exit code for it. Does not return if something is left in a hook."""
        code = EXIT_FAILED
        try:
            code = await self._live_until_signal()
        except (ConfigError, StartError, BackendError, AddressError) as error:
            log.error("%s", error)
            code = EXIT_BAD_INPUT
        except PhalanxError as error:
            log.error("%s", error)
        except Exception as error:
            if not self._unfinished_hooks():
                raise
            log.critical("the node failed", exc_info=error)
        if left := self._unfinished_hooks():
            # asyncio and the interpreter would wait for them for ever; the sections have ended.
            log.critical("these hooks do not end, the process ends without them: %s", ", ".join(left))
            leave(code)
        return code

    def _unfinished_hooks(self) -> list[str]:
        return [f"{name} of app {app.name}" for app in self._apps.values() for name in app.hooks.unfinished]

    def _on_last_session_over(self) -> None:
        """Nothing is active any more; what follows is bounded too, even by a hook that blocks the loop."""
        if self._owns_process:
            hooks = sum(
                float(app.config.hook_timeouts.on_stop) + CANCEL_SECONDS for app in self._apps.values()
            )
            self._ending.within(END_SECONDS + hooks, "its last session is over")

    async def _live_until_signal(self) -> int:
        loop = asyncio.get_running_loop()
        starting = asyncio.current_task()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number, starting)
        self._ending.listen(signals)
        try:
            await self.start()
        except asyncio.CancelledError:
            if self._running is None and starting is not None and starting.cancelling():
                return 0  # a signal came while it started
            raise
        await self.wait()
        return 0

    def _on_signal(self, number: signal.Signals, starting: asyncio.Task[Any] | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        node = self._node
        if node is not None and node.has_started:
            node.stop(signal.Signals(number).name)
        elif starting is not None and not starting.cancelling():
            starting.cancel()


def _runner() -> Any:
    if sys.platform != "win32":
        try:
            import uvloop
        except ImportError:
            return asyncio.run
        return uvloop.run
    return asyncio.run

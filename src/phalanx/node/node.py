"""One running node: owns every part, their order of start and stop, and its sessions one after the other.

Life of a node: data directory and its lock → embedded NATS → connection → streams and identity →
membership → (session → apps → end of the session)* → stop, in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from phalanx import system
from phalanx.aio import Background
from phalanx.alarm import Alarm
from phalanx.app import App, NodeApp, PoolApp
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.config import EmbeddedNats, NatsOptions, PlatformConfig
from phalanx.control import Control
from phalanx.coord.fencer import Fencer
from phalanx.coord.hold import Holds
from phalanx.coord.locks import Locks
from phalanx.coord.membership import PlatformState
from phalanx.coord.register import Register
from phalanx.coord.repair import Repair
from phalanx.coord.session import Session
from phalanx.coord.steering import Steering
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import (
    SessionLost,
    StartError,
)
from phalanx.founding import START_PATIENCE_SECONDS, Founding, patiently
from phalanx.messaging.calling import Caller
from phalanx.names import Names
from phalanx.node.keeping import Keeping
from phalanx.node.opening import lock_data_dir, start_server
from phalanx.node.reaching import open_direct
from phalanx.node.sessions import Sessions
from phalanx.node.stopping import Stopping
from phalanx.node.upkeep import StreamCheck, leave_isolated_server, measure_lag, remind_of_pauses
from phalanx.node.view import View
from phalanx.observe.audit import AuditLog
from phalanx.observe.failover_spans import FailoverSpans
from phalanx.observe.http import StatusServer
from phalanx.observe.journal import Journal
from phalanx.observe.metrics import Metrics
from phalanx.ports import Connection
from phalanx.switchover import Planned
from phalanx.types import Member, NodeStatus, Pause, Resource, SessionId
from phalanx.version import VERSION

log = logging.getLogger("phalanx.node")


def timing_of(config: PlatformConfig) -> Timing:
    """The checked durations of the declaration, with the proportions filled in."""
    t = config.timings
    return Timing.of(
        float(t.ttl),
        renew_every=t.renew_every,  # pyright: ignore[reportArgumentType]
        fence_budget=t.fence_budget,  # pyright: ignore[reportArgumentType]
        grace=t.grace,  # pyright: ignore[reportArgumentType]
        stall_limit=t.stall_limit,  # pyright: ignore[reportArgumentType]
    )


class Node:
    """Made and driven by :class:`phalanx.Platform`."""

    def __init__(self, config: PlatformConfig, apps: Iterable[NodeApp]) -> None:
        self.config, self.names, self.node = config, Names(config.name), config.node
        self.timing = timing_of(config)
        self.apps = {app.name: app for app in apps}
        self.data_dir = Path(str(config.data_dir))
        self.journal: Journal
        self.bus: NatsBus
        self.caller: Caller
        self.state: PlatformState
        self._register: Register
        self._sessions: Sessions | None = None
        self._metrics = Metrics(config.name, config.node, VERSION)
        self.alarm = Alarm()
        self.holds = Holds(self.timing, self.node, self._leads, self._is_fenced)
        self.fencer: Fencer | None = None
        """Fences others before a takeover; None before the platform's state is known."""
        self.beside: contextlib.AbstractAsyncContextManager[object] | None = None
        """What the node's programs need as long as it lives, from its lock on its data directory on."""
        self._stopping = Stopping(self._look)
        self._keeping = Keeping(self.apps, self._stopping)
        self.disconnected_at: float | None = None
        self._since = system.wall()
        self._problems: dict[str, str] = {}
        self._local_server = ""
        self.http_address = ""
        self._background = Background(log)

    # --- what others look at

    @property
    def session(self) -> Session | None:
        """The present one."""
        return self._sessions.current if self._sessions is not None else None

    @property
    def locks(self) -> Locks | None:
        """The platform's locks; None while no session serves."""
        return self._sessions.locks if self._sessions is not None else None

    @property
    def has_started(self) -> bool:
        """Whether it takes part, or did."""
        return self._sessions is not None and self._sessions.has_started

    @property
    def stop_reason(self) -> str:
        """Why it is to stop; empty while it is not."""
        return self._stopping.reason

    @property
    def in_a_hurry(self) -> bool:
        """Whether it is to stop without grace."""
        return self._stopping.in_a_hurry

    @property
    def owns_process(self) -> bool:
        """Whether the process ends with the node: only then can anything be left to the keeper."""
        return self._keeping.owns_process

    @owns_process.setter
    def owns_process(self, owns: bool) -> None:
        self._keeping.owns_process = owns

    def keeps(self, app: NodeApp) -> bool:
        """Whether *app* is not to change hands although the node stops now."""
        return self._keeping.keeps(app)

    # --- the whole life

    async def run(
        self, started: asyncio.Future[None] | None = None, on_over: Callable[[], None] = lambda: None
    ) -> None:
        """From start to stop. *started* is done once the node takes part; *on_over* is told when no session
        comes any more, so that nothing is active. Raises StartError, InternalError and others."""
        async with contextlib.AsyncExitStack() as stack:
            sessions = await self._open(stack)
            lives = asyncio.create_task(sessions.run(started), name="sessions")
            try:
                await lives
            finally:
                if not lives.done():
                    lives.cancel()
                    await asyncio.gather(lives, return_exceptions=True)
                on_over()
                with contextlib.suppress(OSError):
                    system.notify("STOPPING=1")
        if self._stopping.failure is not None:
            raise self._stopping.failure

    def stop(self, reason: str = "the node is stopping", failure: BaseException | None = None) -> None:
        """Hand everything over and end. Asked a second time it ends without grace.

        *failure*: why it has to, if that is a bug; :meth:`run` raises InternalError at the end then.
        """
        self._stopping.ask(reason, failure)

    def _leads(self, app: str) -> bool:
        return app in self.apps and self.apps[app].has_section

    def _is_fenced(self, session: SessionId) -> bool:
        note = self.state.fenced.get(session.node)
        return note is not None and note.session == session

    def _look(self) -> None:
        if self._sessions is not None:
            self._sessions.look()

    async def _open(self, stack: contextlib.AsyncExitStack) -> Sessions:
        """Everything that outlives a session. What was opened is on *stack*."""
        lock_data_dir(stack, self.data_dir)
        if self.beside is not None:
            await stack.enter_async_context(self.beside)
        audit = AuditLog(self.names, self.node, self.data_dir / "audit")
        stack.callback(audit.close)
        self.audit = audit
        self.journal = Journal(audit, self._metrics)
        self._metrics.read_undelivered(lambda: audit.undelivered)
        self._metrics.read_renewals(lambda: self._sessions.renewals if self._sessions is not None else 0)
        for app in self.apps:
            self._metrics.declare_app(app)
        with_events = [app for app in self.apps.values() if isinstance(app, App | PoolApp)]
        self._metrics.read_events(lambda: [each for app in with_events for each in app.event_counts()])
        options = await self._find_nats(stack)
        self.bus = await NatsBus.connect(
            options, name=f"phalanx {self.names.platform}/{self.node}", ping_interval=self._ping_interval
        )
        stack.push_async_callback(self.bus.close)
        stack.push_async_callback(self._background.close)
        self.journal.on_settled = FailoverSpans(self.bus, self.names, self._background).begin
        self.caller = Caller(lambda: self.bus, self.names, self.node)
        stack.push_async_callback(self.caller.close)
        stack.callback(self.bus.on_connection(self._on_connection))
        await self._found()
        delivering = asyncio.create_task(audit.run(self.bus), name="audit delivery")
        stack.push_async_callback(self._end_delivery, delivering)
        await self._watch_platform(stack)
        self._sessions = sessions = Sessions(
            self.config,
            self.apps,
            self.timing,
            bus=self.bus,
            options=options,
            state=self.state,
            register=self._register,
            journal=self.journal,
            watched=self,
            stopping=self._stopping,
            keeping=self._keeping,
            background=self._background,
            describe=self._describe,
            use_streams=self._use_streams,
            holds=self.holds,
            on_renewed=self._move_alarm,
        )
        if await open_direct(stack, self.config, self.names, self.state, self.holds):
            self._own(stack, self.holds.run(), "holding")
            self._metrics.read_ignored_datagrams(lambda: self.holds.ignored)
        await self._start_http(stack)
        for app in self.apps.values():
            await app.start(self)
            stack.push_async_callback(app.stop)
        self.state.on_pauses(self._on_pauses)
        self.state.on_fenced(self._on_fenced)
        self._on_pauses()
        self.journal.node("started", version=VERSION, nats_server=self.bus.server_name)
        stack.callback(lambda: self.journal.node("stopped", reason=self.stop_reason))
        return sessions

    async def _end_delivery(self, delivering: asyncio.Task[None]) -> None:
        if not await self.audit.flush(1.0):
            log.warning("%d audit entries stay on disk for the next start", self.audit.undelivered)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)

    @property
    def _ping_interval(self) -> float:
        # Three unanswered pings give a server up: within a third of the TTL, so that the session outlives it.
        return max(0.1, self.timing.ttl / 10)

    async def _find_nats(self, stack: contextlib.AsyncExitStack) -> NatsOptions:
        """How to reach NATS; an embedded server is started first."""
        nats = self.config.nats
        if isinstance(nats, NatsOptions):
            self._local_server, self._replicas = nats.server_name, nats.replicas
            return nats
        assert isinstance(nats, EmbeddedNats)
        server = await start_server(
            stack,
            nats,
            platform=self.names.platform,
            node=self.node,
            data_dir=self.data_dir,
            on_event=self._on_server_event,
        )
        self._local_server, self._replicas = server.server_name, nats.replicas
        return server.options

    def _on_server_event(self, kind: str, detail: str) -> None:
        self.journal.nats(f"server-{kind}", detail, logging.WARNING if kind == "exited" else logging.INFO)

    async def _found(self) -> None:
        """The streams, buckets and identity of the platform, made or found."""
        founding = Founding(self.bus, self.names, self.node, self.data_dir, self.journal)
        histories = {name: app.config.kv_history for name, app in self.apps.items()}
        databases = [name for name, app in self.apps.items() if app.config.database is not None]
        declared = [
            (name, app.events_config) for name, app in self.apps.items() if isinstance(app, App | PoolApp)
        ]
        kept = {name: events for name, events in declared if events is not None}
        await patiently(
            lambda: founding.run(self._replicas, histories, databases, kept), "set up the platform in NATS"
        )
        self.state, self._streams = founding.state, founding.streams

    async def _watch_platform(self, stack: contextlib.AsyncExitStack) -> None:
        stack.push_async_callback(self.state.close)
        try:
            async with asyncio.timeout(START_PATIENCE_SECONDS):
                await self.state.start()
                streams = self.state.streams or self._streams
                self._register = Register(self.bus, self.names, streams, self.timing)
                self._own(stack, self._register.run(), "session register")
                self.state.on_streams(self._use_streams)
                await self._register.ready.wait()
        except TimeoutError:
            raise StartError(
                f"the platform's state could not be read within {START_PATIENCE_SECONDS:g} s",
                "check the NATS servers; phalanx doctor says more",
            ) from None
        self._repair = Repair(
            self.bus,
            self.names,
            self.state,
            self._register,
            self.journal,
            self._place_session_stream,
        )
        self._own(stack, self._repair.run(), "session stream repair")
        self.fencer = Fencer(
            self.config.fence,
            self.bus,
            self.names,
            self.node,
            self.state,
            self.journal,
            self.register,
            self.unregister,
        )
        databases = [name for name, app in self.apps.items() if app.config.database is not None]
        self._steering = Steering(self.bus, self.names, self._local_server, self.journal, databases)
        self._own(stack, self._steering.run(self._active_apps), "steering")
        check = StreamCheck(self.bus, self.names, self.apps.values(), self.journal, self._problems)
        self._own(stack, check.run(), "stream check")
        self._own(stack, measure_lag(self._metrics), "loop lag")
        self._own(stack, remind_of_pauses(self.apps.values()), "pause reminder")
        isolated = leave_isolated_server(self.bus, self._register, self.timing.ttl, lambda: self.session)
        self._own(stack, isolated, "isolated server")
        planned = Planned(self.bus, self.names, self.state, self.apps, self.journal)
        self._own(stack, planned.run(), "planned switchovers")
        control = Control(self)
        await control.start()
        stack.push_async_callback(control.stop)

    def _on_fenced(self) -> None:
        for app in self.apps.values():
            app.on_fenced()

    def _on_pauses(self) -> None:
        for app in self.apps.values():
            app.on_pauses()
        self._keeping.tell()
        self._look()

    async def _place_session_stream(self, stream: str, avoid: set[str]) -> str | None:
        return await provision.place_session_stream(self.bus, self.names, stream, avoid)

    def _own(self, stack: contextlib.AsyncExitStack, work: object, name: str) -> None:
        """A task for the whole life of the node. Its failure is a failure of the node."""
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]

        def done(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and (error := ended.exception()) is not None:
                log.critical("the task %s failed", name, exc_info=error)
                self._problems[name] = f"the task {name} failed: {error}"
                self.stop(f"internal error in {name}", error)

        task.add_done_callback(done)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(end)

    def _use_streams(self, streams: StreamList) -> None:
        async def use() -> None:
            # The observer first: that the session is seen under a list must mean that this node judges by it.
            await self._register.use_streams(streams)
            if self.session is not None:
                self.session.use_streams(streams)

        self._background.spawn(use(), "use streams")

    def _active_apps(self) -> list[str]:
        # Of others several nodes are active: each would move the leader off its own host, to the next one's.
        return [app.name for app in self.apps.values() if app.is_active and isinstance(app, App)]

    async def _start_http(self, stack: contextlib.AsyncExitStack) -> None:
        if not self.config.http.enabled:
            return
        server = StatusServer(self.config.http, self.view)
        await server.start()
        self.http_address = server.address
        stack.push_async_callback(server.stop)

    def _describe(self, session: SessionId) -> Member:
        return Member(
            self.node,
            session,
            self._since,
            VERSION,
            socket.gethostname(),
            os.getpid(),
            dict(self.config.labels),
            tuple(self.apps),
            self.http_address,
            self._local_server or self.bus.server_name,
            self.timing.ttl,
        )

    def _move_alarm(self) -> None:
        """The session was renewed, or what may outlive it has changed: when what is active has to be gone."""
        session = self.session
        if session is None:
            return
        rights = [session.right_until(app.name) for app in self.apps.values() if app.has_section]
        # After the guard should have fenced and the keeper should have killed.
        self.alarm.move(min(rights, default=session.valid_until) - self.timing.fence_budget / 4)

    # --- for apps (NodeParts)

    @property
    def pauses(self) -> Mapping[str, Pause]:
        """What is paused, by app; see PlatformState."""
        return self.state.pauses

    async def register(self, resource: Resource) -> None:
        """Tell the keeper what is about to run. Raises SessionLost."""
        if self.session is None:
            raise SessionLost("none", "the node has no session")
        await self.session.register(resource)

    def unregister(self, resource_id: str) -> None:
        """Tell the keeper that it has ended."""
        if self.session is not None:
            self.session.unregister(resource_id)

    def on_stuck(self, app: str, reason: str) -> None:
        """A section of it does not end."""
        if self._sessions is not None:
            self._sessions.on_stuck(app, reason)

    def section_begins(self) -> None:
        """Something of an active section is about to run in this process."""
        self._move_alarm()
        self.alarm.begin()

    def section_has_ended(self) -> None:
        """Nothing of it runs any more."""
        self.alarm.end()
        # Once it counts as ended: else its deadline would end those that go on.
        asyncio.get_running_loop().call_soon(self._move_alarm)

    def on_app_changed(self, app: str) -> None:
        """A role has changed."""
        self._keeping.tell()
        if self.apps[app].is_active:
            self._steering.look()

    # --- connection

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            away = system.now() - self.disconnected_at if self.disconnected_at is not None else 0.0
            self.disconnected_at = None
            self.journal.nats("connected", f"to {self.bus.server_name}, after {away:.2f} s")
        elif event is Connection.DISCONNECTED and self.disconnected_at is None:
            self.disconnected_at = system.now()
            self.journal.nats("disconnected", level=logging.WARNING)
        self._look()

    # --- what is shown

    @property
    def view(self) -> View:
        """What is shown of it; harmless to ask at any time after the start."""
        return View(
            self.config,
            self.apps,
            self._problems,
            bus=self.bus,
            sessions=lambda: self._sessions,
            state=self.state,
            register=self._register,
            stopping=self._stopping,
            metrics=self._metrics,
        )

    def status(self) -> NodeStatus:
        """This node's view of itself."""
        return self.view.status()

    def live_members(self) -> dict[str, Member]:
        """The members whose session is not over."""
        return self.view.live_members()


__all__ = ["Node", "timing_of"]

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
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.alarm import Alarm
from phalanx.app import App
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.config import EmbeddedNats, NatsOptions, PlatformConfig
from phalanx.control import Control
from phalanx.coord.fencer import Fencer
from phalanx.coord.membership import PlatformState
from phalanx.coord.register import Register
from phalanx.coord.repair import Repair
from phalanx.coord.session import Session
from phalanx.coord.steering import Steering
from phalanx.coord.takeup import take_up
from phalanx.decide.backoff import Backoff
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import (
    BusError,
    InternalError,
    SessionLost,
    StartError,
)
from phalanx.founding import START_PATIENCE_SECONDS, Founding, patiently
from phalanx.guard import Guard, die
from phalanx.keeper import wire
from phalanx.names import Names
from phalanx.observe.audit import AuditLog
from phalanx.observe.http import StatusServer
from phalanx.observe.journal import Journal
from phalanx.observe.metrics import Metrics
from phalanx.ports import Connection
from phalanx.switchover import Planned
from phalanx.types import Member, NodeStatus, Pause, Resource, Role, SessionId
from phalanx.version import VERSION

log = logging.getLogger("phalanx.node")

STUCK_SECONDS = 10.0
"""A section that should have ended and does not: after this long the node kills itself."""

VANISHED_LOOK_SECONDS = 10.0
"""Between looks whether all streams are there."""

PAUSE_REMINDER_SECONDS = 600.0
"""Between log lines that say that an app is still paused: a pause that was forgotten is an outage to come."""

SESSION_RETRY = Backoff(first=0.2, longest=5.0)


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

    def __init__(self, config: PlatformConfig, apps: Iterable[App]) -> None:
        self.config, self.names, self.node = config, Names(config.name), config.node
        self.timing = timing_of(config)
        self.apps = {app.name: app for app in apps}
        self.data_dir = Path(str(config.data_dir))
        self.session: Session | None = None
        self.journal: Journal
        self.bus: NatsBus
        self.state: PlatformState
        self._register: Register
        self._metrics = Metrics(config.name, config.node, VERSION)
        self.alarm = Alarm()
        self.fencer: Fencer | None = None
        """Fences others before a takeover; None before the platform's state is known."""
        self.has_started = False
        self.owns_process = False
        """Whether the process ends with the node: only then can anything be left to the keeper."""
        self.beside: contextlib.AbstractAsyncContextManager[object] | None = None
        """What the node's programs need as long as it lives, from its lock on its data directory on."""
        self._kept: set[str] = set()
        self._keep_told = wire.Keep(())
        self._earlier_renewals = 0
        self._stopping = asyncio.Event()
        self.stop_reason = ""
        self._failure: InternalError | None = None
        self._asked_to_stop = 0
        self._guard: Guard | None = None
        self.in_a_hurry = False
        self._serving = asyncio.Event()
        self.disconnected_at: float | None = None
        self._member: Member | None = None
        self._previous: SessionId | None = None
        self._since = system.wall()
        self._problems: dict[str, str] = {}
        self._local_server = ""
        self.http_address = ""
        self._background = Background(log)

    # --- the whole life

    async def run(
        self, started: asyncio.Future[None] | None = None, on_over: Callable[[], None] = lambda: None
    ) -> None:
        """From start to stop. *started* is done once the node takes part; *on_over* is told when no session
        comes any more, so that nothing is active. Raises StartError, InternalError and others."""
        async with contextlib.AsyncExitStack() as stack:
            await self._open(stack)
            lives = asyncio.create_task(self._lives(started), name="sessions")
            try:
                await lives
            finally:
                if not lives.done():
                    lives.cancel()
                    await asyncio.gather(lives, return_exceptions=True)
                on_over()
                with contextlib.suppress(OSError):
                    system.notify("STOPPING=1")
        if self._failure is not None:
            raise self._failure

    def stop(self, reason: str = "the node is stopping", failure: BaseException | None = None) -> None:
        """Hand everything over and end. Asked a second time it ends without grace.

        *failure*: why it has to, if that is a bug; :meth:`run` raises InternalError at the end then.
        """
        if failure is None:
            self._asked_to_stop += 1
            self.in_a_hurry = self._asked_to_stop > 1
        elif self._failure is None:
            self._failure = InternalError(reason.removeprefix("internal error in "), failure)
            self._failure.__cause__ = failure
        self.stop_reason = self.stop_reason or reason
        self._stopping.set()
        self._look()

    def _look(self) -> None:
        if self._guard is not None:
            self._guard.wake()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Everything that outlives a session. What was opened is on *stack*."""
        self._lock_data_dir(stack)
        if self.beside is not None:
            await stack.enter_async_context(self.beside)
        audit = AuditLog(self.names, self.node, self.data_dir / "audit")
        stack.callback(audit.close)
        self.audit = audit
        self.journal = Journal(audit, self._metrics)
        self._metrics.read_undelivered(lambda: audit.undelivered)
        self._metrics.read_renewals(self._renewals)
        for app in self.apps:
            self._metrics.declare_app(app)
        options = await self._start_embedded(stack)
        self._options = options
        self.bus = await NatsBus.connect(
            options, name=f"phalanx {self.names.platform}/{self.node}", ping_interval=self._ping_interval
        )
        stack.push_async_callback(self.bus.close)
        stack.push_async_callback(self._background.close)
        stack.callback(self.bus.on_connection(self._on_connection))
        await self._found()
        delivering = asyncio.create_task(audit.run(self.bus), name="audit delivery")
        stack.push_async_callback(self._end_delivery, delivering)
        await self._watch_platform(stack)
        await self._start_http(stack)
        for app in self.apps.values():
            await app.start(self)
            stack.push_async_callback(app.stop)
        self.state.on_pauses(self._on_pauses)
        self.state.on_fenced(self._on_fenced)
        self._on_pauses()
        self.journal.node("started", version=VERSION, nats_server=self.bus.server_name)
        stack.callback(lambda: self.journal.node("stopped", reason=self.stop_reason))

    async def _end_delivery(self, delivering: asyncio.Task[None]) -> None:
        if not await self.audit.flush(1.0):
            log.warning("%d audit entries stay on disk for the next start", self.audit.undelivered)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)

    @property
    def _ping_interval(self) -> float:
        # Three unanswered pings give a server up: within a third of the TTL, so that the session outlives it.
        return max(0.1, self.timing.ttl / 10)

    def _lock_data_dir(self, stack: contextlib.AsyncExitStack) -> None:
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = system.lock_file(self.data_dir / "lock")
        except BlockingIOError as error:
            raise StartError(
                f"another node runs in {self.data_dir} ({error.strerror})",
                "give each node its own data_dir (PHALANX_DATA)",
            ) from None
        except OSError as error:
            raise StartError(
                f"the data directory {self.data_dir} cannot be used ({error.strerror})",
                "set data_dir (or PHALANX_DATA) to a folder that this user can write",
            ) from None
        stack.callback(lock.release)

    async def _start_embedded(self, stack: contextlib.AsyncExitStack) -> NatsOptions:
        nats = self.config.nats
        if isinstance(nats, NatsOptions):
            self._local_server, self._replicas = nats.server_name, nats.replicas
            return nats
        assert isinstance(nats, EmbeddedNats)
        from phalanx.bus.embedded import EmbeddedServer

        server = EmbeddedServer(
            nats,
            platform=self.names.platform,
            node=self.node,
            data_dir=self.data_dir,
            on_event=self._on_server_event,
        )
        await server.start()
        stack.push_async_callback(server.stop)
        await server.wait_ready(60.0)
        self._local_server, self._replicas = server.server_name, nats.replicas
        return server.options

    def _on_server_event(self, kind: str, detail: str) -> None:
        self.journal.nats(f"server-{kind}", detail, logging.WARNING if kind == "exited" else logging.INFO)

    async def _found(self) -> None:
        """The streams, buckets and identity of the platform, made or found."""
        founding = Founding(self.bus, self.names, self.node, self.data_dir, self.journal)
        histories = {name: app.config.kv_history for name, app in self.apps.items()}
        databases = [name for name, app in self.apps.items() if app.config.database is not None]
        await patiently(
            lambda: founding.run(self._replicas, histories, databases), "set up the platform in NATS"
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
        self._own(stack, self._watch_streams(), "stream check")
        self._own(stack, self._measure_lag(), "loop lag")
        self._own(stack, self._remind_of_pauses(), "pause reminder")
        self._own(stack, self._leave_isolated_server(), "isolated server")
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
        self._tell_keep()
        self._look()

    async def _remind_of_pauses(self) -> None:
        while True:
            await asyncio.sleep(PAUSE_REMINDER_SECONDS)
            for app in self.apps.values():
                if (pause := app.pause) is not None:
                    since = (system.wall() - pause.since) / 60
                    log.warning("app %s: still %s, for %.0f min now", app.name, pause, since)

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
        return [app.name for app in self.apps.values() if app.is_active]

    async def _watch_streams(self) -> None:
        """Say so when a stream vanishes while everything runs: nothing else would be noticed but errors."""
        while True:
            await asyncio.sleep(VANISHED_LOOK_SECONDS)
            for stream, what in self._streams_needed().items():
                if (gone := await self._has_vanished(stream)) is None:
                    continue
                key = f"stream {stream}"
                if not gone:
                    self._problems.pop(key, None)
                elif key not in self._problems:
                    self._problems[key] = f"{what} has vanished; see docs/operations.md"
                    action = "bucket-vanished" if stream.startswith("KV_") else "stream-vanished"
                    self.journal.platform(action, self._problems[key], logging.CRITICAL)
            for app in self.apps.values():
                if app.database is not None:
                    stream = self.names.wal_stream(app.name)
                    app.database.note_missing(self._problems.get(f"stream {stream}", ""))

    def _streams_needed(self) -> dict[str, str]:
        """What has to be there, once it was made, and how to call it."""
        names = self.names
        buckets = [names.platform_bucket, *(names.app_bucket(name) for name in self.apps)]
        needed = {names.bucket_stream(bucket): f"the bucket {bucket!r}" for bucket in buckets}
        for name in (app.name for app in self.apps.values() if app.database is not None):
            log_stream, objects = names.wal_stream(name), names.object_stream(names.snapshots_bucket(name))
            needed[log_stream] = f"the stream {log_stream!r}, the log of the database of app {name!r},"
            needed[objects] = f"the stream {objects!r}, the object store of app {name!r},"
        return needed

    async def _has_vanished(self, stream: str) -> bool | None:
        """None: nobody can tell now. A server that has just started may not know all streams yet."""
        try:
            for _ in range(3):
                if await provision.stream_info(self.bus, stream) is not None:
                    return False
                await asyncio.sleep(0.5)
        except BusError:
            return None  # NATS is away: that is told elsewhere
        return True

    async def _measure_lag(self) -> None:
        interval = system.watchdog_interval() or 1.0
        while True:
            before = system.now()
            await asyncio.sleep(min(1.0, interval))
            self._metrics.set_loop_lag(max(0.0, system.now() - before - min(1.0, interval)))
            # Also without a session: a restart would bring no NATS back, but would end an embedded server.
            if system.watchdog_interval() is not None:
                with contextlib.suppress(OSError):
                    system.notify("WATCHDOG=1")

    async def _leave_isolated_server(self) -> None:
        """A server that answers pings but has lost its routes tells us nothing of the others any more."""
        patience = max(1.0, 0.4 * self.timing.ttl)
        left_at = system.now()
        while True:
            await asyncio.sleep(patience / 4)
            session = self.session
            if session is None or not session.is_valid or not self.bus.is_connected:
                left_at = system.now()
            elif system.now() - max(left_at, self._register.heard_at) > patience:
                # The session is renewed all the time, so its own renewals at least should have come.
                left_at = system.now()
                await self.bus.switch_server(f"no session was heard of for {patience:g} s")

    async def _start_http(self, stack: contextlib.AsyncExitStack) -> None:
        if not self.config.http.enabled:
            return
        server = StatusServer(self.config.http, self)
        await server.start()
        self.http_address = server.address
        stack.push_async_callback(server.stop)

    # --- sessions

    async def _lives(self, started: asyncio.Future[None] | None) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._live(started, failures)
                failures = 0
            except (SessionLost, StartError, BusError, TimeoutError) as error:
                if self._stopping.is_set():
                    return
                if isinstance(error, StartError) and not self.has_started:
                    raise  # later on it is tried again: the id may be held by this node's own last session
                if started is not None and not started.done() and failures >= 3:
                    raise StartError(
                        f"no session: {error}", "check the NATS servers; phalanx doctor says more"
                    ) from error
                failures += 1
                self.journal.node("no-session", reason=str(error), level=logging.ERROR)
                await wait_at_most(self._stopping, SESSION_RETRY.delay(failures))

    async def _live(self, started: asyncio.Future[None] | None, failures: int) -> None:
        """One session, from its start to its end. *failures*: attempts in a row that came to nothing."""
        session = await self._take_up() or Session(SessionId.new(self.node), self.timing)
        session.on_renewed = self._on_renewed
        session.on_noted = self._on_noted
        try:
            await self._unless_stopping(self._begin_session(session, failures))
            await self._serve(session, started)
        finally:
            self._serving.clear()
            await self._end_session(session)

    async def _take_up(self) -> Session | None:
        """The session that an earlier life of this node has left to its keeper in a pause, if any."""
        if self._previous is not None:
            return None
        apps = tuple(app.name for app in self.apps.values() if app.can_adopt)
        wish = wire.Attach(apps, self.names.platform, self.node, self.timing, self._options)
        began = system.now()
        session = await take_up(self.data_dir, wish)
        if session is not None:
            running = ", ".join(sorted({resource.app for resource in session.adopted})) or "nothing"
            seconds = system.now() - began
            self.journal.node(
                "session-taken-up", duration_seconds=seconds, session=str(session.id), runs=running
            )
        return session

    async def _unless_stopping(self, work: Coroutine[Any, Any, None]) -> None:
        """Do *work*, which may wait long for NATS; but when the node is to stop raise SessionLost."""
        task = asyncio.create_task(work, name="begin session")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise SessionLost(str(self._previous), "the node is stopping")
        task.result()

    async def _begin_session(self, session: Session, failures: int) -> None:
        began = system.now()
        # On a host that is overloaded a keeper may need longer than that to come up: each time it gets more,
        # or it would be begun for ever. (A node that has just been started rather says what is wrong.)
        patience = max(5.0, 2 * self.timing.ttl) * 2 ** (min(failures, 3) if self.has_started else 0)
        if self._previous is not None:
            await self._observe_anew(self._previous)
        self._previous = session.id
        if session.is_taken_up:
            session.use_streams(self._register.streams)
        else:
            await session.start(
                self.names.platform,
                self._register.streams,
                self._options,
                self.data_dir,
                patience,
                self.config.logging,
            )
        self.session = session
        self._keep_told = wire.Keep(())
        self._register.me = session.id
        member = self._member = self._describe(session)
        await self._check_streams()
        await patiently(
            lambda: self.state.claim_member(member, self._register, self.timing.observe + 1.0),
            "take the node id",
        )
        self.journal.node(
            "session-established", duration_seconds=system.now() - began, session=str(session.id)
        )

    async def _observe_anew(self, previous: SessionId) -> None:
        """After an earlier session, whose end this process vouches for.

        The node may have slept through changes of the list of session streams: what it judged by before is
        worth nothing.
        """
        await self._register.bury_own(previous, "its node starts over")
        found = await self.state.read(self.names.SESSIONS_KEY, StreamList)
        if found is not None:
            await self._register.start_over(found[0])
            async with asyncio.timeout(START_PATIENCE_SECONDS):
                await self._register.ready.wait()

    def _on_renewed(self, valid_until: float) -> None:
        # After the guard should have fenced and the keeper should have killed.
        self.alarm.move(valid_until - self.timing.fence_budget / 4)

    def _on_noted(self, action: str, reason: str) -> None:
        self.journal.node(action, reason=reason, level=logging.ERROR)

    async def _check_streams(self) -> None:
        """The list may have been replaced while the session was being made, unseen by who replaced it."""
        found = await self.state.read(self.names.SESSIONS_KEY, StreamList)
        used = self._register.streams
        if found is not None and found[0].generation != used.generation:
            self._use_streams(found[0])
            raise SessionLost(
                str(self._previous), f"the list of session streams is at generation {found[0].generation} now"
            )

    def _describe(self, session: Session) -> Member:
        return Member(
            self.node,
            session.id,
            self._since,
            VERSION,
            socket.gethostname(),
            os.getpid(),
            dict(self.config.labels),
            tuple(self.apps),
            self.http_address,
            self._local_server or self.bus.server_name,
        )

    async def _serve(self, session: Session, started: asyncio.Future[None] | None) -> None:
        serving = [
            asyncio.create_task(app.serve(session, self._register), name=f"app {app.name}")
            for app in self.apps.values()
        ]
        watch = self._guard = Guard(self.apps.values(), session, self.timing, self, self.journal)
        guard = asyncio.create_task(watch.run(), name="guard")
        self._serving.set()
        self.has_started = True
        if started is not None and not started.done():
            started.set_result(None)
        with contextlib.suppress(OSError):
            system.notify("READY=1")
        try:
            done, _ = await asyncio.wait({guard, *serving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not guard and not task.cancelled() and (error := task.exception()) is not None:
                    log.critical("%s failed", task.get_name(), exc_info=error)
                    self.stop(f"internal error in {task.get_name()}", error)
            await guard
        finally:
            guard.cancel()
            await watch.fence_all("the session ends")
            for task in serving:
                task.cancel()
            await asyncio.gather(guard, *serving, return_exceptions=True)

    def on_stuck(self, app: str, reason: str) -> None:
        """A section does not end: give it some time, hand the other apps over, then end the node."""
        stuck = self.apps[app]

        async def wait() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STUCK_SECONDS):
                    await stuck.wait_ended()
                return
            # What keeps this section may outlive the node, and then the keeper holds the session for it. The
            # other apps must not be held with it.
            if self._guard is not None:
                await self._guard.hand_over_others(stuck)
            if stuck.has_section:
                die(self.journal, f"app {app} does not end ({reason})")

        self._background.spawn(wait(), f"stuck {app}")

    async def _end_session(self, session: Session) -> None:
        """All sections have ended: say so to everybody."""
        lost = session.lost.is_set()
        if lost:
            self.journal.node("session-lost", reason=session.lost_reason, level=logging.ERROR)
        elif session.established.is_set() and await self._leave(session):
            self.journal.node("left-in-pause", reason=self.stop_reason, apps=", ".join(sorted(self._kept)))
        elif session.established.is_set():
            # While others may have to fence it, its member key says on which host.
            if not await session.release(self.stop_reason or "starting over"):
                log.warning("session %s: nobody confirmed its end; it expires", session.id)
            elif self._member is not None and self._stopping.is_set() and self.bus.is_connected:
                await self.state.remove_member(self.node, self._member)
        await session.close()
        self._earlier_renewals += session.renewals
        self.session = None

    # --- in a pause

    def keeps(self, app: App) -> bool:
        """Whether *app* does not change hands although the node stops now; asked once, and remembered."""
        session = self.session
        able = self.owns_process and not self.in_a_hurry and session is not None and session.is_valid
        if able and app.is_paused and app.has_section:
            self._kept.add(app.name)
        return app.name in self._kept

    def _keep_of(self, kept: Iterable[str]) -> wire.Keep:
        apps = tuple(sorted(kept))
        return wire.Keep(apps, tuple(name for name in self.apps if name not in apps))

    def _tell_keep(self) -> None:
        """Have the keeper know what is not to change hands should this process die."""
        active = {app.name for app in self.apps.values() if app.is_paused and app.is_active}
        keep = self._keep_of(active | self._kept) if active or self._kept else wire.Keep(())
        if self.session is not None and keep != self._keep_told:
            self._keep_told = keep
            self.session.keep(keep)

    async def _leave(self, session: Session) -> bool:
        """Leave the session to its keeper, if something is paused. False: it is still ours to end."""
        return bool(self._kept) and await session.leave(self._keep_of(self._kept))

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

    def section_begins(self) -> None:
        """Something of an active section is about to run in this process."""
        self.alarm.begin()

    def section_has_ended(self) -> None:
        """Nothing of it runs any more."""
        self.alarm.end()

    def on_app_changed(self, app: str) -> None:
        """A role has changed."""
        self._tell_keep()
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

    # --- what is shown (NodeView)

    def status(self) -> NodeStatus:
        """This node's view of itself."""
        session = self.session
        ready, _ = self.ready()
        return NodeStatus(
            self.names.platform,
            self.node,
            VERSION,
            str(session.id) if session is not None else "",
            max(0.0, session.valid_until - system.now()) if session is not None and session.is_valid else 0.0,
            ready,
            self.bus.is_connected,
            self.bus.server_name,
            tuple(app.status() for app in self.apps.values()),
            dict(self.config.labels),
            (*self._problems.values(), *self._database_problems()),
        )

    def _database_problems(self) -> Iterator[str]:
        for app in self.apps.values():
            if app.database is not None and (problem := app.database.brief().problem):
                yield f"app {app.name}: {problem}"

    def live_members(self) -> dict[str, Member]:
        """The members whose session is not over."""
        members = self.state.members.items()
        return {node: member for node, member in members if not self._register.is_over(member.session)}

    def _renewals(self) -> int:
        return self._earlier_renewals + (self.session.renewals if self.session is not None else 0)

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.render(self.status())

    def live(self) -> tuple[bool, str]:
        """Whether the process works at all."""
        return True, "the event loop runs"

    def ready(self) -> tuple[bool, str]:
        """Whether this node takes part: it has a session, a connection, and no app that is barred."""
        if self.session is None or not self.session.is_valid or not self._serving.is_set():
            return False, "no session"
        if not self.bus.is_connected:
            return False, "no connection to NATS"
        if self._stopping.is_set():
            return False, "stopping"
        for app in self.apps.values():
            if app.role in (Role.STARTING, Role.INELIGIBLE, Role.STOPPED):
                return False, f"app {app.name} is {app.role}: {app.status().reason}"
        return True, "takes part"


__all__ = ["Node", "timing_of"]

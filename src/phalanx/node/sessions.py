"""The sessions of a node, one after the other: each begins, serves the apps, and ends before the next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.app import NodeApp
from phalanx.config import NatsOptions, PlatformConfig
from phalanx.coord.hold import Holds
from phalanx.coord.locks import Locks
from phalanx.coord.membership import PlatformState
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.coord.takeup import take_up
from phalanx.decide.backoff import Backoff
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, SessionLost, StartError
from phalanx.founding import START_PATIENCE_SECONDS, patiently
from phalanx.guard import Guard, Watched, die
from phalanx.keeper import wire
from phalanx.names import Names
from phalanx.node.keeping import Keeping
from phalanx.node.stopping import Stopping
from phalanx.observe.journal import Journal
from phalanx.ports import Bus
from phalanx.types import Member, SessionId

log = logging.getLogger("phalanx.node")

STUCK_SECONDS = 10.0
"""A section that should have ended and does not: after this long the node kills itself."""

SESSION_RETRY = Backoff(first=0.2, longest=5.0)


class Sessions:
    """At most one session at a time. When one has ended nothing of it is active any more.

    *options*: how a keeper reaches NATS. *describe* gives the node's member entry under a session;
    *use_streams* is told of a list of session streams that is newer than the one in use.
    """

    def __init__(
        self,
        config: PlatformConfig,
        apps: Mapping[str, NodeApp],
        timing: Timing,
        *,
        bus: Bus,
        options: NatsOptions,
        state: PlatformState,
        register: Register,
        journal: Journal,
        watched: Watched,
        stopping: Stopping,
        keeping: Keeping,
        background: Background,
        describe: Callable[[SessionId], Member],
        use_streams: Callable[[StreamList], None],
        holds: Holds,
        on_renewed: Callable[[], None],
    ) -> None:
        self._config, self._apps, self._timing = config, apps, timing
        self._names, self._node, self._data_dir = Names(config.name), config.node, Path(str(config.data_dir))
        self._bus, self._options, self._state, self._register = bus, options, state, register
        self._journal, self._watched, self._stopping, self._keeping = journal, watched, stopping, keeping
        self._background, self._describe, self._use_streams = background, describe, use_streams
        self._holds, self._on_renewed = holds, on_renewed
        self.current: Session | None = None
        self.locks: Locks | None = None
        """The platform's locks, held through the present one while it serves."""
        self.has_started = False
        """Whether there was one that served."""
        self.is_serving = False
        """Whether the present one serves."""
        self._guard: Guard | None = None
        self._previous: SessionId | None = None
        self._member: Member | None = None
        self._earlier_renewals = 0

    @property
    def renewals(self) -> int:
        """How often a session of this node was renewed, on one stream each."""
        return self._earlier_renewals + (self.current.renewals if self.current is not None else 0)

    def look(self) -> None:
        """Something has changed that may end the present one: see :class:`phalanx.guard.Watched`."""
        if self._guard is not None:
            self._guard.wake()

    async def run(self, started: asyncio.Future[None] | None) -> None:
        """One after the other, until the node is to stop. *started* is done once the first one serves."""
        failures = 0
        while not self._stopping.is_asked:
            try:
                await self._live(started, failures)
                failures = 0
            except (SessionLost, StartError, BusError, TimeoutError) as error:
                if self._stopping.is_asked:
                    return
                if isinstance(error, StartError) and not self.has_started:
                    raise  # later on it is tried again: the id may be held by this node's own last session
                if started is not None and not started.done() and failures >= 3:
                    raise StartError(
                        f"no session: {error}", "check the NATS servers; phalanx doctor says more"
                    ) from error
                failures += 1
                self._journal.node("no-session", reason=str(error), level=logging.ERROR)
                await wait_at_most(self._stopping.event, SESSION_RETRY.delay(failures))

    async def _live(self, started: asyncio.Future[None] | None, failures: int) -> None:
        """One session, from its start to its end. *failures*: attempts in a row that came to nothing."""
        session = await self._take_up() or Session(SessionId.new(self._node), self._timing)
        session.on_renewed = lambda moment: self._on_renewed()
        session.on_extended = self._on_extended
        session.on_noted = self._on_noted
        try:
            await self._unless_stopping(self._begin_session(session, failures))
            await self._serve(session, started)
        finally:
            self.is_serving = False
            await self._end_session(session)

    async def _take_up(self) -> Session | None:
        """The session that an earlier life of this node has left to its keeper in a pause, if any."""
        if self._previous is not None:
            return None
        apps = tuple(app.name for app in self._apps.values() if app.can_adopt)
        wish = wire.Attach(apps, self._config.name, self._node, self._timing, self._options)
        began = system.now()
        session = await take_up(self._data_dir, wish)
        if session is not None:
            running = ", ".join(sorted({resource.app for resource in session.adopted})) or "nothing"
            seconds = system.now() - began
            self._journal.node(
                "session-taken-up", duration_seconds=seconds, session=str(session.id), runs=running
            )
        return session

    async def _unless_stopping(self, work: Coroutine[Any, Any, None]) -> None:
        """Do *work*, which may wait long for NATS; but when the node is to stop raise SessionLost."""
        task = asyncio.create_task(work, name="begin session")
        stop = asyncio.create_task(self._stopping.event.wait(), name="stop")
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
        patience = max(5.0, 2 * self._timing.ttl) * 2 ** (min(failures, 3) if self.has_started else 0)
        if self._previous is not None:
            await self._observe_anew(self._previous)
        self._previous = session.id
        if session.is_taken_up:
            session.use_streams(self._register.streams)
        else:
            await session.start(
                self._config.name,
                self._register.streams,
                self._options,
                self._data_dir,
                patience,
                self._config.logging,
            )
        self.current = session
        self._keeping.begin(session)
        self._register.me = session.id
        member = self._member = self._describe(session.id)
        await self._check_streams()
        await patiently(
            lambda: self._state.claim_member(member, self._register, self._timing.observe + 1.0),
            "take the node id",
        )
        self._journal.node(
            "session-established", duration_seconds=system.now() - began, session=str(session.id)
        )

    async def _observe_anew(self, previous: SessionId) -> None:
        """After an earlier session, whose end this process vouches for.

        The node may have slept through changes of the list of session streams: what it judged by before is
        worth nothing.
        """
        await self._register.bury_own(previous, "its node starts over")
        found = await self._state.read(self._names.SESSIONS_KEY, StreamList)
        if found is not None:
            await self._register.start_over(found[0])
            async with asyncio.timeout(START_PATIENCE_SECONDS):
                await self._register.ready.wait()

    def _on_extended(self) -> None:
        self._on_renewed()
        self.look()

    def _on_noted(self, action: str, reason: str) -> None:
        self._journal.node(action, reason=reason, level=logging.ERROR)

    async def _check_streams(self) -> None:
        """The list may have been replaced while the session was being made, unseen by who replaced it."""
        found = await self._state.read(self._names.SESSIONS_KEY, StreamList)
        used = self._register.streams
        if found is not None and found[0].generation != used.generation:
            self._use_streams(found[0])
            raise SessionLost(
                str(self._previous), f"the list of session streams is at generation {found[0].generation} now"
            )

    async def _serve(self, session: Session, started: asyncio.Future[None] | None) -> None:
        serving = [
            asyncio.create_task(app.serve(session, self._register), name=f"app {app.name}")
            for app in self._apps.values()
        ]
        watch = self._guard = Guard(
            self._apps.values(), session, self._holds, self._timing, self._watched, self._journal
        )
        guard = asyncio.create_task(watch.run(), name="guard")
        self.locks = locks = Locks(self._bus, self._names, None, session, self._register)
        self.is_serving = self.has_started = True
        if started is not None and not started.done():
            started.set_result(None)
        with contextlib.suppress(OSError):
            system.notify("READY=1")
        try:
            done, _ = await asyncio.wait({guard, *serving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not guard and not task.cancelled() and (error := task.exception()) is not None:
                    log.critical("%s failed", task.get_name(), exc_info=error)
                    self._stopping.ask(f"internal error in {task.get_name()}", error)
            await guard
        finally:
            guard.cancel()
            await watch.fence_all("the session ends")
            for task in serving:
                task.cancel()
            await asyncio.gather(guard, *serving, return_exceptions=True)
            self.locks = None
            await locks.close()

    def on_stuck(self, app: str, reason: str) -> None:
        """A section does not end: give it some time, hand the other apps over, then end the node."""
        stuck = self._apps[app]

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
                die(self._journal, f"app {app} does not end ({reason})")

        self._background.spawn(wait(), f"stuck {app}")

    async def _end_session(self, session: Session) -> None:
        """All sections have ended: say so to everybody."""
        lost = session.lost.is_set()
        if lost:
            self._journal.node("session-lost", reason=session.lost_reason, level=logging.ERROR)
        elif session.established.is_set() and await self._keeping.leave(session):
            self._journal.node(
                "left-in-pause", reason=self._stopping.reason, apps=", ".join(sorted(self._keeping.kept))
            )
        elif session.established.is_set():
            # While others may have to fence it, its member key says on which host.
            if not await session.release(self._stopping.reason or "starting over"):
                log.warning("session %s: nobody confirmed its end; it expires", session.id)
            elif self._member is not None and self._stopping.is_asked and self._bus.is_connected:
                await self._state.remove_member(self._node, self._member)
        await session.close()
        self._earlier_renewals += session.renewals
        self.current = self._keeping.session = None


__all__ = ["Sessions"]

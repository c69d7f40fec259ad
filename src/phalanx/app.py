"""One app on one node: what it declares, and what it is made of while its platform runs."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from phalanx import system
from phalanx.config import AppConfig
from phalanx.coord.election import Election, Reign
from phalanx.coord.fencer import Fencer
from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Lock, Locks
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.decide.activation import STEP_ASIDE_SECONDS, Failures
from phalanx.decide.pause import Cause, ends_section, pause_of
from phalanx.decide.restart import FailOver, RestartIn
from phalanx.errors import (
    AddressError,
    BackendError,
    FenceFailed,
    HookFailed,
    NotActive,
    Paused,
    StartError,
)
from phalanx.hooks import Hooks
from phalanx.names import Names
from phalanx.observe.health import HealthMonitor
from phalanx.observe.journal import Journal
from phalanx.ports import AddressClaim, Backend, Bus, Fence, SectionAddresses, SectionContext
from phalanx.program import Program, RestartPolicy
from phalanx.section import Section
from phalanx.types import (
    AppStatus,
    Candidate,
    Health,
    LeaderRecord,
    Pause,
    Resource,
    Role,
    Standing,
    Succession,
)

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.control_db import DatabaseControl
    from phalanx.data.database import ActiveDatabase, AppDatabase, Database

log = logging.getLogger("phalanx.app")

F = TypeVar("F", bound=Callable[..., Any])

MAX_WAITING_EVENTS = 64
"""Leader and health changes that wait for their hook; older ones make room and are logged."""

NEWS_LINGER_SECONDS = 0.02
"""Hooks that only tell of a change leave the machine to the failover that goes on just then."""

SUCCESSOR_NONE = "no other eligible node"


class LeaderChange(msgspec.Struct, frozen=True):
    """What ``on_leader_change`` is told. ``leader`` is a node id, None while nobody leads."""

    app: str
    leader: str | None
    previous: str | None
    epoch: int
    reason: str = ""


class HealthChange(msgspec.Struct, frozen=True):
    """What ``on_health_change`` is told."""

    app: str
    health: Health
    reason: str


class AppContext:
    """What ``on_start`` and ``on_stop`` get. There may be no session then, so there are no locks here."""

    def __init__(self, app: App) -> None:
        self.app, self.node, self.kv = app.name, app.node, app.kv


class ActiveContext:
    """What ``on_active`` and ``on_passive`` get: everything that belongs to one active section.

    Writes through ``kv`` and ``lock`` carry the epoch; once another node leads the server refuses them
    (``Fenced``).
    """

    def __init__(
        self,
        app: str,
        node: str,
        epoch: int,
        fence: Fence,
        kv: AppKV,
        locks: Locks,
        database: AppDatabase | None = None,
    ) -> None:
        self.app, self.node, self.epoch, self.kv = app, node, epoch, kv
        self._database = database.active if database is not None else None
        self.fence = fence
        self._locks = locks
        self.cancelled_event = asyncio.Event()
        self.ready_event = asyncio.Event()
        self.is_cooperative = False
        self._loop = asyncio.get_running_loop()

    @property
    def cancelled(self) -> asyncio.Event:
        """Set when the section has to end.

        An ``on_active`` that has looked at this is given the time of ``hook_timeouts.on_passive`` to end
        by itself; one that has not is cancelled (``asyncio.CancelledError``) at once.
        """
        self.is_cooperative = True
        return self.cancelled_event

    @property
    def db(self) -> ActiveDatabase:
        """The app's live database. Raises StartError for an app that declares none."""
        if self._database is None:
            raise StartError(f"app {self.app!r} has no database", "declare one: database=SQLite(path)")
        return self._database

    @property
    def is_cancelled(self) -> bool:
        """Whether the section has to end. Also for hooks that run in a thread."""
        self.is_cooperative = True
        return self.cancelled_event.is_set()

    def ready(self) -> None:
        """Say that the app serves now, from an ``on_active`` that goes on running. From any thread."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self.ready_event.set()
        else:
            self._loop.call_soon_threadsafe(self.ready_event.set)

    def lock(self, name: str, *, timeout: float = 10.0) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held under this epoch. *timeout* in seconds."""
        return self._locks.lock(name, timeout=timeout)


class NodeParts(Protocol):
    """What an app gets from its node."""

    @property
    def bus(self) -> Bus: ...
    @property
    def names(self) -> Names: ...
    @property
    def node(self) -> str: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def fencer(self) -> Fencer | None: ...
    @property
    def pauses(self) -> Mapping[str, Pause]: ...

    async def register(self, resource: Any) -> None: ...
    def unregister(self, resource_id: str) -> None: ...
    def on_stuck(self, app: App, reason: str) -> None: ...
    def on_app_changed(self, app: App) -> None: ...
    def section_begins(self) -> None: ...
    def section_has_ended(self) -> None: ...


class App:
    """An active-passive app. Made by :meth:`phalanx.Platform.app`, never directly."""

    def __init__(
        self, config: AppConfig, backend: Backend | None, addresses: SectionAddresses | None = None
    ) -> None:
        self.config, self.name = config, config.name
        self._backend, self._addresses = backend, addresses
        self.hooks = Hooks(config.name, config.hook_timeouts, self._on_hook_run)
        self.health = HealthMonitor(config.name, config.checks, self._on_health)
        self._role, self._since, self._reason = Role.STOPPED, system.wall(), ""
        self._failures = Failures()
        self._policy = RestartPolicy(config.restart, self)
        self._activating_since = self._standing_down_since = 0.0
        self._highest_epoch = 0
        self._succession: Succession | None = None
        """How this node came to lead, the last time it did."""
        self._healthy_since = 0.0
        """When the present section gave its first healthy answer; Unix seconds, 0: it has not."""
        self._left_behind = ""
        self._parts: NodeParts | None = None
        self._session: Session | None = None
        self._election: Election | None = None
        self._locks: Locks | None = None
        self._kv: AppKV | None = None
        self.database: AppDatabase | None = None
        """The app's database on this node, while the node runs and the app declares one."""
        self._database_control: DatabaseControl | None = None
        self._section: Section | None = None
        self._context: ActiveContext | None = None
        self._has_standby_checks = any(check.when == "always" for check in config.checks)
        self._started = False
        self._barred = self._leaving = ""
        self._waits_for_fence = False
        self._pause_known: Pause | None = None
        self._keeps_key = False
        self._target: str | None = None
        self._events: deque[tuple[str, object]] = deque()
        self._event_waits = asyncio.Event()
        self._changed = asyncio.Event()
        self._ended, self._idle = asyncio.Event(), asyncio.Event()
        self._ended.set()
        self._idle.set()
        self._when_idle: Callable[[], None] | None = None

    # --- declaring

    def on_start(self, function: F) -> F:
        """Runs once when the node starts, before it may become active. A failure bars the node."""
        self.hooks.add("on_start", function)
        return function

    def on_stop(self, function: F) -> F:
        """Runs once when the node stops, after the app has been handed over."""
        self.hooks.add("on_stop", function)
        return function

    def on_active(self, function: F) -> F:
        """Runs when this node becomes active, with an :class:`ActiveContext`.

        The app is active when it returns or calls ``ctx.ready()``. It may go on running for the whole
        section; it is cancelled when the section ends.
        """
        self.hooks.add("on_active", function)
        return function

    def on_passive(self, function: F) -> F:
        """Runs at a graceful end of the active section, after ``on_active`` has ended."""
        self.hooks.add("on_passive", function)
        return function

    def on_leader_change(self, function: F) -> F:
        """Runs on every node when the leader changes, with a :class:`LeaderChange`."""
        self.hooks.add("on_leader_change", function)
        return function

    def on_health_change(self, function: F) -> F:
        """Runs when the verdict of this node's health checks changes, with a :class:`HealthChange`."""
        self.hooks.add("on_health_change", function)
        return function

    async def check(self) -> None:
        """Look for what would keep its backend and its addresses from this host; makes nothing.

        Raises BackendError, AddressError (step ``prepare``).
        """
        for problem in await self.problems():
            raise problem

    async def problems(self) -> list[BackendError | AddressError]:
        """What :meth:`check` would raise, all of it."""
        found: list[BackendError | AddressError] = []
        try:
            if self._backend is not None:
                await self._backend.prepare(self.name)
        except BackendError as error:
            found.append(error)
        try:
            if self._addresses is not None:
                await self._addresses.check()
        except AddressError as error:
            found.append(error)
        return found

    async def address_claims(self) -> tuple[AddressClaim, ...]:
        """Which of its addresses other hosts answer for just now. Raises AddressError."""
        return await self._addresses.claims() if self._addresses is not None else ()

    # --- what is so

    @property
    def node(self) -> str:
        """This node's id. Raises StartError before the platform was started."""
        return self._running_parts.node

    @property
    def role(self) -> Role:
        """What this node is for the app."""
        return self._role

    @property
    def is_active(self) -> bool:
        """Whether this node is active for the app."""
        return self._role is Role.ACTIVE

    @property
    def epoch(self) -> int:
        """The epoch of the present section of this node. Raises NotActive outside of one."""
        if self._context is None:
            raise NotActive(self.name)
        return self._context.epoch

    @property
    def leader(self) -> str | None:
        """The node that leads, as this node knows; None while nobody does."""
        record = self._election.leader if self._election is not None else None
        return record.session.node if record is not None and record.session is not None else None

    @property
    def kv(self) -> AppKV:
        """The app's own key-value store, for any node and any role (not fenced: see ``ctx.kv``)."""
        if self._kv is None:
            raise StartError(f"app {self.name!r} has no KV yet", "use it while the platform runs")
        return self._kv

    @property
    def db(self) -> Database:
        """The app's database on this node. Raises StartError without one, or outside of its run."""
        if self.database is None:
            raise StartError(
                f"app {self.name!r} has no database now",
                "declare one (database=SQLite(path)) and use it while the platform runs",
            )
        return self.database.public

    @property
    def locks(self) -> Locks:
        """The app's locks."""
        if self._locks is None:
            raise StartError(f"app {self.name!r} has no locks yet", "use them while the platform runs")
        return self._locks

    def lock(self, name: str, *, timeout: float = 10.0) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held through this node's session: ``async with app.lock("x") as held``."""
        return self.locks.lock(name, timeout=timeout)

    @property
    def _running_parts(self) -> NodeParts:
        if self._parts is None:
            raise StartError(f"app {self.name!r} does not run yet", "start its platform first")
        return self._parts

    @property
    def pause(self) -> Pause | None:
        """The pause that the app is under, its own or its platform's, as far as this node knows."""
        return pause_of(self.name, self._parts.pauses) if self._parts is not None else None

    @property
    def is_paused(self) -> bool:
        """Whether nothing of the app may change hands."""
        return self.pause is not None

    def candidates(self) -> tuple[Candidate, ...]:
        """The standing offers of all nodes to lead the app, as this node knows them."""
        return tuple(self._election.candidates.values()) if self._election is not None else ()

    def status(self) -> AppStatus:
        """The app on this node, as /status shows it."""
        leader = self._election.leader if self._election is not None else None
        return AppStatus(
            self.name,
            self._role,
            self.health.verdict,
            leader.revision if leader is not None and leader.session is not None else 0,
            self.leader,
            self._since,
            self._reason,
            self.database.brief() if self.database is not None else None,
            self._section.program.status() if self._section is not None and self._section.program else None,
            self.pause,
            self._standing(),
            self.unkept_because() if self._role is Role.ACTIVE else "",
            self.health.reason,
        )

    def _standing(self) -> Standing:
        section, election = self._section, self._election
        pattern, aside = self.config.pattern, self._failures.not_before - system.now()
        # Only looked at: the role that is acted on is set where changes are heard of.
        eligible = not self._ineligible_because(acts_on_it=False) and aside <= 0
        if section is not None:
            eligible = self._role is Role.ACTIVE and self.health.verdict is not Health.UNHEALTHY
        return Standing(
            eligible,
            pattern.priority,
            pattern.no_failover,
            system.wall() + aside if section is None and aside > 0 else 0.0,
            self._failures.count,
            section.step if section is not None else "",
            section.step_since if section is not None and section.step else 0.0,
            self._healthy_since if section is not None else 0.0,
            self._succession if section is not None else None,
            (election.named or "") if election is not None else "",
            self._session.timing.ttl if self._session is not None else 0.0,
        )

    async def wait_for_role(self, *roles: Role, timeout: float) -> Role:
        """Wait until this node's role is one of *roles*. Raises TimeoutError after *timeout* seconds."""
        async with asyncio.timeout(timeout):
            while self._role not in roles:
                await self._changed.wait()
        return self._role

    @property
    def left_behind(self) -> str:
        """What the last graceful end of a section here could not put into the log; empty: nothing."""
        return self._left_behind

    async def fail_over(self, epoch: int, reason: str, to: str | None = None) -> str | None:
        """End this node's active section of *epoch* at once, without grace. Returns who is named to follow.

        Raises NotActive (also for another epoch: such a request comes too late), Paused; ConfigError for a
        node *to* that is no candidate.
        """
        election, section = self._election, self._section
        if election is None or section is None or int(section.reign.epoch) != epoch:
            raise NotActive(self.name)
        self._check_not_paused()
        successor = election.check_successor(to) if to is not None else election.successor()
        self._step_aside(successor)
        self._journal_app(
            "failing-over", f"{reason}; to {successor or SUCCESSOR_NONE}", level=logging.WARNING
        )
        section.fence(reason)
        await self.wait_idle()
        return successor

    def _check_not_paused(self) -> None:
        if (pause := self.pause) is not None:
            raise Paused(self.name, str(pause), whole=self.name not in self._running_parts.pauses)

    def _step_aside(self, successor: str | None) -> None:
        self._target = successor
        self._failures = Failures(
            self._failures.count, system.now() + STEP_ASIDE_SECONDS, self._failures.reason
        )

    def check_successor(self, node: str | None) -> str | None:
        """Who would follow this node, *node* if given; None: nobody could. Raises NotActive, and ConfigError
        for a node that is no candidate."""
        if self._election is None or self._section is None:
            raise NotActive(self.name)
        if node is not None:
            return self._election.check_successor(node)
        return self._election.successor()

    async def step_down(self, reason: str = "asked to step down", to: str | None = None) -> str | None:
        """End this node's active section gracefully; another node takes over. Returns who is named for it.

        *to*: the node to hand over to. Raises NotActive, Paused, and ConfigError for a node that is no
        candidate.
        """
        election, section = self._election, self._section
        if election is None or section is None:
            raise NotActive(self.name)
        self._check_not_paused()
        successor = election.check_successor(to) if to is not None else election.successor()
        self._step_aside(successor)
        self._journal_app("handing-over", f"{reason}; to {successor or SUCCESSOR_NONE}")
        section.reign.end(reason)
        await self.wait_idle()
        return successor

    # --- life on a node

    async def start(self, parts: NodeParts) -> None:
        """Run ``on_start``. A failure bars this node from the app; the others are not affected."""
        self._parts = parts
        names = parts.names
        self._kv = AppKV(parts.bus, names, self.name)
        self._set_role(Role.STARTING)
        if self.config.database is not None:
            from phalanx.control_db import DatabaseControl
            from phalanx.data.database import AppDatabase

            self.database = AppDatabase(
                self.name,
                self.config.database,
                parts,
                report=self._journal_app,
                on_change=self._on_surroundings,
                on_lost=self._on_database_lost,
            )
            self.database.standbys = self._standbys
            self._database_control = DatabaseControl(parts.bus, parts.names, parts.node, self.database)
            await self._database_control.start()
            await self.database.start()
        if self._addresses is not None:
            await self._addresses.start(self._on_surroundings)
        if "on_start" in self.hooks:
            try:
                await self.hooks.call("on_start", AppContext(self))
            except HookFailed as error:
                self._barred = str(error)
                self._journal_app("hook-failed", str(error), level=logging.ERROR)
        self._started = True

    async def stop(self) -> None:
        """Run ``on_stop``. The active section has ended before."""
        if not self._started:
            return
        try:
            await self.hooks.call("on_stop", AppContext(self))
        except HookFailed as error:
            self._journal_app("hook-failed", str(error), level=logging.ERROR)
        self.hooks.close()
        if self.database is not None and self._database_control is not None:
            await self._database_control.stop()
            await self.database.close()
            self.database = self._database_control = None
        if self._addresses is not None:
            await self._addresses.close()
        self._set_role(Role.STOPPED)
        self._started = False

    async def serve(self, session: Session, register: Register) -> None:
        """Take part in the election under *session* until cancelled. The guard ends the section before."""
        parts = self._running_parts
        self._session, self._leaving, self._keeps_key = session, "", False
        self._locks = locks = Locks(parts.bus, parts.names, self.name, session, register)
        self._election = election = Election(
            parts.bus,
            parts.names,
            self.name,
            session,
            register,
            priority=self.config.pattern.priority,
            no_failover=self.config.pattern.no_failover,
            highest=self._highest_epoch,
            adopted=max((resource.epoch for resource in self._adopted), default=0),
            handicap=self.database.handicap_seconds if self.database is not None else lambda: 0.0,
            fences=parts.fencer is not None and parts.fencer.has_command,
            paused=lambda: self.is_paused,
            on_leader=self._on_leader,
            on_acquired=self._on_acquired,
        )
        self._offer_candidacy()
        self._set_role(self._passive_role())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(election.run(), name=f"{self.name} election")
                tasks.create_task(self.health.run(), name=f"{self.name} health")
                tasks.create_task(self._run_events(), name=f"{self.name} events")
                while True:
                    reign = await election.next_reign()
                    await self._run_reign(election, reign)
        finally:
            self._highest_epoch = election.highest
            await locks.close()
            self._election, self._locks, self._session = None, None, None
            if self._started:
                self._set_role(self._passive_role())

    async def _run_reign(self, election: Election, reign: Reign) -> None:
        parts = self._running_parts
        self._ended.clear()
        self._idle.clear()
        began = system.now()
        try:
            parts.section_begins()
            try:
                section = await self._run_section(reign, parts)
            finally:
                self._section = self._context = None
                parts.section_has_ended()
                self._ended.set()
            await self._after_section(election, section, system.now() - began)
        finally:
            self._idle.set()
            if self._when_idle is not None:
                self._when_idle()

    async def _run_section(self, reign: Reign, parts: NodeParts) -> Section:
        epoch = int(reign.epoch)
        assert self._session is not None and self._locks is not None  # noqa: PT018 - serve() has set both
        session = self._session
        context = ActiveContext(
            self.name,
            parts.node,
            epoch,
            reign.fence,
            AppKV(parts.bus, parts.names, self.name, fence=lambda: reign.fence, epoch=lambda: epoch),
            self._locks.under(reign.fence, epoch),
            self.database,
        )
        resources = SectionContext(
            parts.names.platform,
            parts.node,
            self.name,
            epoch,
            parts.register,
            parts.unregister,
            str(self.database.live) if self.database is not None else "",
            lambda: session.valid_until - system.now() if session.is_valid else 0.0,
            self.health.tell,
        )
        adopted = next((resource for resource in self._adopted if resource.epoch == epoch), None)
        if adopted is not None:
            reign.unfenced = ()  # it was fenced before that could run: by now it may have returned
        section = Section(
            reign,
            resources,
            self.hooks,
            Program(self._backend, resources, self._policy) if self._backend is not None else None,
            context,
            database=self.database,
            addresses=self._addresses,
            fence_previous=(lambda: self._fence_previous(reign)) if reign.unfenced else None,
            on_active_timeout=float(self.config.hook_timeouts.on_active),
            on_passive_timeout=float(self.config.hook_timeouts.on_passive),
            on_role=self._on_section_role,
            on_step=self._on_step,
            paused=lambda: self.is_paused,
            on_held=self._on_held,
            adopted=adopted,
        )
        self._section, self._context, self._target = section, context, None
        self._healthy_since = 0.0
        self._set_role(Role.ACTIVATING)
        self._activating_since = system.now()
        watch_stuck = asyncio.create_task(self._watch_stuck(section))
        try:
            await section.run()
        finally:
            watch_stuck.cancel()
        return section

    async def _fence_previous(self, reign: Reign) -> None:
        fencer = self._running_parts.fencer
        if fencer is not None:
            await fencer.fence(self.name, int(reign.epoch), reign.unfenced)
        reign.unfenced = ()

    def on_fenced(self) -> None:
        """A node was said to be off: a takeover that waits for that is tried again now."""
        if self._waits_for_fence:
            self._waits_for_fence = False
            self._failures = msgspec.structs.replace(self._failures, not_before=system.now())
            self._offer_candidacy()

    async def _watch_stuck(self, section: Section) -> None:
        await section.stuck.wait()
        self._running_parts.on_stuck(self, section.reign.reason)

    async def _after_section(self, election: Election, section: Section, lasted: float) -> None:
        """The section has ended: count failures, say who is next, give the key back."""
        now = system.now()
        if self._keeps_key:
            election.keep_key(section.reign)
            action = "left-running" if section.is_left else "ended-in-pause"
            self._journal_app(action, section.reign.reason, lasted, epoch=int(section.reign.epoch))
            self._set_role(self._passive_role(), section.reign.reason)
            return
        self._running_parts.journal.stood_down(self.name, now - self._standing_down_since)
        reason, epoch = section.reign.reason, int(section.reign.epoch)
        self._left_behind = section.left_behind
        self._waits_for_fence = isinstance(section.failure, FenceFailed)
        if section.failure is not None:
            self._count_failure(str(section.failure), section.steady_seconds)
            delay = self._failures.not_before - now
            action = "activation-failed" if section.active_since is None else "section-failed"
            self._journal_app(
                action,
                f"{section.failure}; failure {self._failures.count} in a row, not before {delay:.1f} s again",
                level=logging.ERROR,
                epoch=epoch,
            )
        elif section.active_since is not None:
            self._failures = self._failures.was_active(section.steady_seconds)
        self._offer_candidacy()
        successor = self._target if self._target is not None else election.successor()
        await election.release(section.reign, reason, successor)
        self._journal_app("released", f"{reason}; next: {successor or SUCCESSOR_NONE}", lasted, epoch=epoch)
        self._set_role(self._passive_role(), reason)

    def end_section(self, reason: str) -> None:
        """Ask the active section to end gracefully, naming a successor. Nothing to do if there is none."""
        if self._section is not None:
            if self._election is not None and not self._section.reign.ending.is_set():
                self._target = self._election.successor()
                self._journal_app("handing-over", f"{reason}; to {self._target or SUCCESSOR_NONE}")
            self._section.reign.end(reason)

    def bar(self, reason: str) -> None:
        """This node is no candidate any more under this session: the session is being given up."""
        self._leaving = reason
        self._offer_candidacy()
        if self._section is None and self._started:
            self._set_role(self._passive_role())

    def fence(self, reason: str) -> None:
        """End the active section at once."""
        if self._section is not None:
            self._section.fence(reason)

    async def wait_ended(self) -> None:
        """Wait until nothing of a section runs here."""
        await self._ended.wait()

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`."""
        await self._idle.wait()

    @property
    def is_idle(self) -> bool:
        """Whether no section runs here, and the last one's leader key was given back (or tried to)."""
        return self._idle.is_set()

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        self._when_idle = callback

    @property
    def has_section(self) -> bool:
        """Whether something of an active section may run here."""
        return not self._ended.is_set()

    # --- pause

    def on_pauses(self) -> None:
        """Something was paused or resumed; if it was this app, what was only reported counts now."""
        before, self._pause_known = self._pause_known, self.pause
        if self._pause_known == before:
            return
        if self._pause_known is not None:
            log.warning("app %s: %s; nothing changes hands until it is resumed", self.name, self._pause_known)
        else:
            log.warning("app %s: resumed", self.name)
        if self._election is not None and self._pause_known is None:
            self._election.on_resumed()
        if self._section is not None:
            self._section.look()
            if self.health.verdict is Health.UNHEALTHY:
                self._on_unhealthy(self._section, f"unhealthy: {self.health.reason}")
        self._wake()

    def unkept_because(self) -> str:
        """Why what is active here would end with the node, even in a pause; empty if it would not."""
        if not self.can_adopt:
            if self.database is not None:
                return "its database is captured by the node"
            if self._addresses is not None:
                return "its addresses are kept by the node"
            return "its hooks are code inside the node"
        if not all(resource.adoptable for resource in self._registered):
            return "its program is a child of the node"
        return ""

    @property
    def can_adopt(self) -> bool:
        """Whether all that it runs can outlive a node, by its kind: a program of its own and nothing else."""
        has_hooks = "on_active" in self.hooks or "on_passive" in self.hooks
        apart = has_hooks or self.config.database is not None or self._addresses is not None
        return self._backend is not None and not apart

    @property
    def _registered(self) -> list[Resource]:
        known = self._session.registered.values() if self._session is not None else ()
        return [resource for resource in known if resource.app == self.name]

    @property
    def _adopted(self) -> list[Resource]:
        """What an earlier life of the node has left of it. Its reign goes on, or the session is given up."""
        known = self._session.adopted if self._session is not None else ()
        return [resource for resource in known if resource.app == self.name]

    def _check_adopted(self, leader: LeaderRecord) -> None:
        """What was left running runs under the leader key, or not at all: that it is another's cannot be."""
        session = self._session
        if session is None or self._section is not None or leader.session == session.id:
            return
        if any(resource.id in session.registered for resource in self._adopted):
            session.give_up(f"app {self.name}: what was left running is not covered by the leader key")

    def leave(self, reason: str) -> None:
        """The node ends in a pause. What can runs on, the rest ends; nobody else takes over either way."""
        section = self._section
        if section is None or section.reign.ending.is_set():
            return
        self._keeps_key = True
        why = self.unkept_because()
        if why or section.active_since is None:
            self._journal_app("ending-in-pause", f"{reason}; {why or 'it is not active yet'}")
            section.reign.end(reason)
        else:
            section.leave(reason)

    async def wait_while_paused(self, problem: str) -> None:
        """See Restarting."""
        if self.is_paused:
            self._on_held(problem)
        while self.is_paused:
            await self._changed.wait()

    def _on_held(self, problem: str) -> None:
        """Something that would have ended the section, had the app not been paused."""
        self._set_role(self._role, f"failed in a pause: {problem}")
        self._journal_app("failed-in-pause", problem, level=logging.ERROR)

    # --- candidacy

    def _ineligible_because(self, *, acts_on_it: bool = True) -> str:
        if self._barred or self._leaving:
            return self._barred or self._leaving
        if self._election is None:
            return "the node has no session"
        if self.database is not None and (reason := self.database.ineligible_because(acts_on_it=acts_on_it)):
            return reason
        if self._addresses is not None and (reason := self._addresses.ineligible_because()):
            return reason
        verdict = self.health.standby_verdict
        if verdict is Health.UNHEALTHY:
            return f"unhealthy: {self.health.standby_reason}"
        if verdict is Health.UNKNOWN and self._has_standby_checks:
            return "its health checks have not answered yet"
        return ""

    def _passive_role(self) -> Role:
        return Role.INELIGIBLE if self._ineligible_because() else Role.STANDBY

    def _offer_candidacy(self) -> None:
        if self._election is not None:
            reason = self._ineligible_because()
            self._election.set_candidacy(not reason, reason, self._failures.not_before)

    # --- what happens

    def _set_role(self, role: Role, reason: str = "") -> None:
        if role is Role.INELIGIBLE:
            reason = self._ineligible_because()
        elif role is Role.STANDBY and not reason and self._failures.count:
            reason = f"failed {self._failures.count} times in a row: {self._failures.reason}"
        if role is self._role and reason == self._reason:
            return
        changed = role is not self._role
        self._role, self._reason = role, reason
        if changed:
            self._since = system.wall()
            if self._parts is not None:
                self._parts.on_app_changed(self)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _on_section_role(self, role: Role) -> None:
        section = self._section
        reason = section.reign.reason if section is not None else ""
        self._set_role(role, reason)
        if role is Role.ACTIVE:
            # Only now: what is still starting is not ill.
            self.health.set_active(True)
            seconds = system.now() - self._activating_since
            self._running_parts.journal.activated(self.name, self.epoch, seconds, len(self.config.checks))
            if not self.config.checks or self.health.verdict is Health.HEALTHY:
                self._note_healthy()
        elif role is Role.STANDING_DOWN:
            self.health.set_active(False)
            self._standing_down_since = system.now()
            self._journal_app("standing-down", reason)

    def _note_healthy(self) -> None:
        """The first healthy answer of this section: by its checks, or by being active where it has none."""
        if self._healthy_since:
            return
        self._healthy_since = system.wall()
        if self.config.checks:
            self._journal_app("first-healthy", "", system.now() - self._activating_since)

    def _on_step(self, step: str, seconds: float, problem: str) -> None:
        parts = self._running_parts
        epoch = self._context.epoch if self._context is not None else 0
        parts.journal.step(self.name, step, epoch, seconds, problem)

    def _on_hook_run(self, hook: str, seconds: float) -> None:
        if self._parts is not None:
            self._parts.journal.hook(self.name, hook, seconds)

    def _on_acquired(self, succession: Succession) -> None:
        self._succession = succession
        self._running_parts.journal.acquired(self.name, succession)

    def _on_leader(self, old: LeaderRecord, new: LeaderRecord) -> None:
        before = old.session.node if old.session is not None else None
        after = new.session.node if new.session is not None else None
        if before != after or old.revision == 0:
            change = LeaderChange(self.name, after, before, new.revision, new.reason)
            self._queue_event("on_leader_change", change)
            self._running_parts.journal.leader_seen(self.name, after, new.revision, new.reason)
        self._check_adopted(new)
        if self.database is not None and after != self.node:  # else the activation needs its turn
            self.database.look()
        self._wake()

    def _on_health(self, health: Health, reason: str) -> None:
        self._journal_app("health-changed", f"{health}: {reason}" if reason else str(health))
        self._queue_event("on_health_change", HealthChange(self.name, health, reason))
        section = self._section
        if self._role is Role.ACTIVE and health is Health.HEALTHY:
            self._note_healthy()
        if section is not None and health is Health.UNHEALTHY:
            self._on_unhealthy(section, f"unhealthy: {reason}")
        self._offer_candidacy()
        if section is None and self._started and self._election is not None:
            self._set_role(self._passive_role())

    def _on_unhealthy(self, section: Section, reason: str) -> None:
        if not ends_section(Cause.ILL, paused=self.is_paused):
            return  # it was reported, and is judged again when the pause is over
        # A check that runs on standbys too is about this node: a restart would not cure it.
        is_of_node = self.health.standby_verdict is Health.UNHEALTHY
        if section.program is None or is_of_node or isinstance(self._policy.decide(), FailOver):
            self._count_failure(reason, section.steady_seconds)
            self.end_section(reason)
        else:
            section.program.restart(reason)

    def _count_failure(self, reason: str, steady_seconds: float) -> None:
        self._failures = self._failures.failed(
            system.now(), reason, self.config.retry, steady_seconds=steady_seconds
        )

    # --- restarts in place (Restarting)

    def others_can(self) -> bool:
        """Whether another node is an eligible candidate."""
        return self._election is not None and self._election.successor() is not None

    def on_program_ended(self, how: str) -> None:
        """Its program has ended by itself."""
        self._journal_app("backend-ended", how, level=logging.WARNING)

    def on_restarting(self, reason: str, decision: RestartIn, restarts: int) -> None:
        """Its program is about to be started again in place."""
        # What was seen of the old one does not count for the new one, and what is starting is not ill.
        self.health.set_active(False)
        count, window = self.config.restart.count, self.config.restart.window
        why = f"restart {restarts} of {count} within {window:g} s"
        if decision.beyond:
            why = f"more than {count} restarts within {window:g} s, but no other eligible node"
        why = f"{reason}; {why}; in {decision.delay:g} s"
        self._journal_app("restarting", why, level=logging.WARNING)
        self._set_role(self._role, f"its program is being restarted: {reason}")

    def on_restarted(self, seconds: float) -> None:
        """It is ready again."""
        self._journal_app("restarted", "", seconds)
        self._set_role(self._role)
        self.health.set_active(self._role is Role.ACTIVE)

    def _standbys(self) -> list[str]:
        return [o.session.node for o in self.candidates() if o.eligible and o.session.node != self.node]

    def _on_surroundings(self) -> None:
        """Whether this node can be a candidate may have changed."""
        self._offer_candidacy()
        if self._section is None and self._started and self._election is not None:
            self._set_role(self._passive_role())

    def _on_database_lost(self, reason: str) -> None:
        if self._section is not None:
            self._count_failure(reason, self._section.steady_seconds)
            self.end_section(reason)

    def _queue_event(self, hook: str, argument: object) -> None:
        if hook not in self.hooks:
            return
        if len(self._events) >= MAX_WAITING_EVENTS:
            dropped = self._events.popleft()
            log.error("app %s: %s is too slow, an event was dropped: %s", self.name, *dropped)
        self._events.append((hook, argument))
        self._event_waits.set()

    async def _run_events(self) -> None:
        while True:
            await self._event_waits.wait()
            self._event_waits.clear()
            await asyncio.sleep(NEWS_LINGER_SECONDS)
            while self._events:
                # on_active goes first: a failover must not wait for a hook that only tells of it.
                while self._is_becoming_active():
                    await self._changed.wait()
                hook, argument = self._events.popleft()
                try:
                    await self.hooks.call(hook, argument)
                except HookFailed as error:
                    self._journal_app("hook-failed", str(error), level=logging.ERROR)

    def _is_becoming_active(self) -> bool:
        # By the leader key, not by the reign: the watch may tell of our own write before its reply comes.
        leads = (
            self._election is not None
            and self._session is not None
            and self._election.leader.session == self._session.id
        )
        return leads and self._role not in (Role.ACTIVE, Role.STANDING_DOWN)

    def _journal_app(
        self,
        action: str,
        reason: str,
        duration_seconds: float | None = None,
        level: int = logging.INFO,
        epoch: int = 0,
        **details: str,
    ) -> None:
        if self._context is not None:
            epoch = self._context.epoch
        self._running_parts.journal.app(
            self.name,
            action,
            epoch=epoch,
            reason=reason,
            duration_seconds=duration_seconds,
            level=level,
            **details,
        )


__all__ = ["ActiveContext", "App", "AppContext", "HealthChange", "LeaderChange"]

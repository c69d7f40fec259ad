"""One active-passive app: the public face of its declaration and of what it is on this node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from phalanx import system
from phalanx.app.candidacy import Candidacy
from phalanx.app.contexts import AppContext, HealthChange, LeaderChange
from phalanx.app.declared import DeclaredApp
from phalanx.app.journal import AppJournal
from phalanx.app.news import News
from phalanx.app.parts import NodeParts, instances_of
from phalanx.app.pausing import Pausing
from phalanx.app.reigns import Reigns
from phalanx.app.restarts import AppRestarts
from phalanx.app.role import AppRole
from phalanx.app.term import Term
from phalanx.config import AppConfig
from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Lock, Locks, Semaphore
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.errors import HookFailed, NotActive, StartError
from phalanx.messaging.event_serving import EventServer
from phalanx.messaging.events import Events
from phalanx.messaging.serving import CallServer
from phalanx.observe.health import HealthMonitor
from phalanx.ports import Backend, SectionAddresses
from phalanx.program import RestartPolicy
from phalanx.types import AppStatus, Candidate, Health, LeaderRecord, Pause, Role, Standing, Succession

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.control_db import DatabaseControl
    from phalanx.data.database import AppDatabase, Database


class App(DeclaredApp):
    """An active-passive app. Made by :meth:`phalanx.Platform.app`, never directly."""

    stays_in_pause = True

    def __init__(
        self, config: AppConfig, backend: Backend | None, addresses: SectionAddresses | None = None
    ) -> None:
        self._journal = journal = AppJournal(config.name)
        super().__init__(config, backend, addresses, journal.hook)
        self.health = HealthMonitor(config.name, config.checks, self._on_health)
        self._role = role = AppRole()
        self._candidacy = Candidacy(self, self.health, role)
        self._pausing = Pausing(self.name, role, journal)
        restarts = AppRestarts(config, self.health, self._candidacy, self._pausing, role, journal)
        policy = RestartPolicy(config.restart, restarts)
        self._reigns = Reigns(self, self.health, self._candidacy, self._pausing, policy, journal)
        self._news = News(self.name, self.hooks, self._on_hook_failed)
        self._parts: NodeParts | None = None
        self._term: Term | None = None
        self._highest_epoch = 0
        self._kv: AppKV | None = None
        self.database: AppDatabase | None = None
        """The app's database on this node, while the node runs and the app declares one."""
        self._database_control: DatabaseControl | None = None
        self._calls: CallServer | None = None
        self._events: EventServer | None = None

    # --- what is so

    @property
    def node(self) -> str:
        """This node's id. Raises StartError before the platform was started."""
        return self._running_parts.node

    @property
    def role(self) -> Role:
        """What this node is for the app."""
        return self._role.role

    @property
    def is_active(self) -> bool:
        """Whether this node is active for the app."""
        return self.role is Role.ACTIVE

    @property
    def epoch(self) -> int:
        """The epoch of the present section of this node. Raises NotActive outside of one."""
        if self._reigns.context is None:
            raise NotActive(self.name)
        return self._reigns.context.epoch

    @property
    def leader(self) -> str | None:
        """The node that leads, as this node knows; None while nobody does."""
        record = self._term.election.leader if self._term is not None else None
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
    def events(self) -> Events:
        """The app's own events, from any node (not fenced: see ``ctx.events``). Raises StartError."""
        if self._events is None:
            raise StartError(f"app {self.name!r} has no events yet", "use them while the platform runs")
        if self.events_config is None:
            raise StartError(f"app {self.name!r} has no events of its own", "declare them: events=Events()")
        return self._events.public

    @property
    def locks(self) -> Locks:
        """The app's locks."""
        if self._term is None:
            raise StartError(f"app {self.name!r} has no locks yet", "use them while the platform runs")
        return self._term.locks

    def lock(
        self, name: str, *, timeout: float = 10.0, cancel: bool = False
    ) -> AbstractAsyncContextManager[Lock]:
        """One of the app's locks, held through this node's session: ``async with app.lock("x") as held``."""
        return self.locks.lock(name, timeout=timeout, cancel=cancel)

    def semaphore(self, name: str, *, permits: int) -> Semaphore:
        """One of the app's semaphores: at most *permits* are held at a time. Raises ConfigError."""
        return Semaphore(lambda: self.locks, name, permits)

    @property
    def _running_parts(self) -> NodeParts:
        if self._parts is None:
            raise StartError(f"app {self.name!r} does not run yet", "start its platform first")
        return self._parts

    @property
    def pause(self) -> Pause | None:
        """The pause that the app is under, its own or its platform's, as far as this node knows."""
        return self._pausing.pause

    @property
    def is_paused(self) -> bool:
        """Whether nothing of the app may change hands."""
        return self._pausing.is_paused

    @property
    def has_section(self) -> bool:
        """Whether something of an active section may run here."""
        return self._reigns.has_section

    @property
    def is_idle(self) -> bool:
        """Whether no section runs here, and the last one's leader key was given back (or tried to)."""
        return self._reigns.is_idle

    @property
    def left_behind(self) -> str:
        """What the last graceful end of a section here could not put into the log; empty: nothing."""
        return self._reigns.left_behind

    def candidates(self) -> tuple[Candidate, ...]:
        """The standing offers of all nodes to lead the app, as this node knows them."""
        return tuple(self._term.election.candidates.values()) if self._term is not None else ()

    @property
    def spool_bytes(self) -> int:
        """What is committed in its database here and not in the log yet."""
        return self.database.brief().spool_bytes if self.database is not None else 0

    def others_can(self) -> bool:
        """Whether another node is an eligible candidate."""
        return self._candidacy.others_can()

    def _standbys(self) -> list[str]:
        return [o.session.node for o in self.candidates() if o.eligible and o.session.node != self.node]

    def status(self) -> AppStatus:
        """The app on this node, as /status shows it."""
        leader = self._term.election.leader if self._term is not None else None
        section = self._reigns.section
        return AppStatus(
            self.name,
            self.role,
            self.health.verdict,
            leader.revision if leader is not None and leader.session is not None else 0,
            self.leader,
            self._role.since,
            self._role.reason,
            self.database.brief() if self.database is not None else None,
            section.program.status() if section is not None and section.program else None,
            self.pause,
            self._standing(),
            self.unkept_because() if self.is_active else "",
            self.health.reason,
            *self._term.hold if self._term is not None and self.is_active else (0.0, ""),
        )

    def unkept_because(self) -> str:
        """Why what is active here would end with the node, even in a pause; empty if it would not."""
        return self._term.unkept_because if self._term is not None else self.bound_because

    def _standing(self) -> Standing:
        section, term, failures = self._reigns.section, self._term, self._candidacy.failures
        pattern, aside = self.pattern, failures.not_before - system.now()
        # Only looked at: the role that is acted on is set where changes are heard of.
        eligible = not self._candidacy.ineligible_because(acts_on_it=False) and aside <= 0
        if section is not None:
            eligible = self.is_active and self.health.verdict is not Health.UNHEALTHY
        return Standing(
            eligible,
            pattern.priority,
            pattern.no_failover,
            system.wall() + aside if section is None and aside > 0 else 0.0,
            failures.count,
            section.step if section is not None else "",
            section.step_since if section is not None and section.step else 0.0,
            self._reigns.healthy_since if section is not None else 0.0,
            self._reigns.succession if section is not None else None,
            (term.election.named or "") if term is not None else "",
            term.session.timing.ttl if term is not None else 0.0,
        )

    # --- what one can wait for, and ask for

    async def wait_for_role(self, *roles: Role, timeout: float) -> Role:
        """Wait until this node's role is one of *roles*. Raises TimeoutError after *timeout* seconds."""
        return await self._role.wait_for(*roles, timeout=timeout)

    async def wait_ended(self) -> None:
        """Wait until nothing of a section runs here."""
        await self._reigns.wait_ended()

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`."""
        await self._reigns.wait_idle()

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        self._reigns.on_idle(callback)

    def check_successor(self, node: str | None) -> str | None:
        """Who would follow this node, *node* if given; None: nobody could. Raises NotActive, and ConfigError
        for a node that is no candidate."""
        return self._reigns.check_successor(node)

    async def step_down(self, reason: str = "asked to step down", to: str | None = None) -> str | None:
        """End this node's active section gracefully; another node takes over. Returns who is named for it.

        *to*: the node to hand over to. Raises NotActive, Paused, and ConfigError for a node that is no
        candidate.
        """
        return await self._reigns.step_down(reason, to)

    async def fail_over(self, epoch: int, reason: str, to: str | None = None) -> str | None:
        """End this node's active section of *epoch* at once, without grace. Returns who is named to follow.

        Raises NotActive (also for another epoch: such a request comes too late), Paused; ConfigError for a
        node *to* that is no candidate.
        """
        return await self._reigns.fail_over(epoch, reason, to)

    def end_section(self, reason: str) -> None:
        """Ask the active section to end gracefully, naming a successor. Nothing to do if there is none."""
        self._reigns.end(reason)

    def fence(self, reason: str) -> None:
        """End the active section at once."""
        self._reigns.fence(reason)

    def leave(self, reason: str) -> None:
        """The node ends in a pause. What can runs on, the rest ends; nobody else takes over either way."""
        self._reigns.leave(reason)

    def bar(self, reason: str) -> None:
        """This node is no candidate any more under this session: the session is being given up."""
        self._candidacy.leaving = reason
        self._candidacy.offer()
        if self._reigns.section is None and self._candidacy.is_started:
            self._candidacy.set_passive()

    # --- life on a node

    async def start(self, parts: NodeParts) -> None:
        """Run ``on_start``. A failure bars this node from the app; the others are not affected."""
        self._parts = parts
        self._journal.write_to(parts.journal)
        self._pausing.look_at(lambda: parts.pauses)
        self._role.on_change = lambda: parts.on_app_changed(self.name)
        self._kv = AppKV(parts.bus, parts.names, self.name)
        self._candidacy.set_role(Role.STARTING)
        await self._start_database(parts)
        if self.addresses is not None:
            await self.addresses.start(self._on_surroundings)
        if "on_start" in self.hooks:
            try:
                await self.hooks.call("on_start", AppContext(self.name, self.node, self.kv))
            except HookFailed as error:
                self._candidacy.barred = str(error)
                self._on_hook_failed(str(error))
        self._calls = CallServer(self.name, self.node, self.handlers, parts.bus, parts.names, self._kv)
        self._calls.instances = instances_of(parts, self.name)
        await self._calls.open()
        await self._open_events(parts)
        self._candidacy.is_started = True

    async def _open_events(self, parts: NodeParts) -> None:
        self._events = EventServer(
            self.name,
            self.node,
            self.event_handlers,
            parts.bus,
            parts.names,
            lambda action, reason: self._journal.report(action, reason, level=logging.ERROR),
            has_own=self.events_config is not None,
        )
        await self._events.open(AppContext(self.name, self.node, self.kv))

    async def _start_database(self, parts: NodeParts) -> None:
        if self.config.database is None:
            return
        from phalanx.control_db import DatabaseControl
        from phalanx.data.database import AppDatabase

        self.database = self._candidacy.database = AppDatabase(
            self.name,
            self.config.database,
            parts,
            report=self._journal.report,
            on_change=self._on_surroundings,
            on_lost=self._reigns.on_database_lost,
        )
        self.database.standbys = self._standbys
        self._database_control = DatabaseControl(parts.bus, parts.names, parts.node, self.database)
        await self._database_control.start()
        await self.database.start()

    async def stop(self) -> None:
        """Run ``on_stop``. The active section has ended before."""
        if not self._candidacy.is_started:
            return
        if self._events is not None:
            await self._events.close()
        if self._calls is not None:
            await self._calls.close()
        try:
            await self.hooks.call("on_stop", AppContext(self.name, self.node, self.kv))
        except HookFailed as error:
            self._on_hook_failed(str(error))
        self.hooks.close()
        if self.database is not None and self._database_control is not None:
            await self._database_control.stop()
            await self.database.close()
            self.database = self._candidacy.database = self._database_control = None
        if self.addresses is not None:
            await self.addresses.close()
        self._candidacy.set_role(Role.STOPPED)
        self._candidacy.is_started = False

    async def serve(self, session: Session, register: Register) -> None:
        """Take part in the election under *session* until cancelled. The guard ends the section before."""
        candidacy = self._candidacy
        self._term = term = Term(
            self,
            self._running_parts,
            session,
            register,
            self.database,
            self._calls if self.handlers else None,
            self._events,
            highest=self._highest_epoch,
            paused=lambda: self.is_paused,
            on_leader=self._on_leader,
            on_acquired=self._on_acquired,
        )
        candidacy.election, candidacy.leaving = term.election, ""
        candidacy.offer()
        candidacy.set_passive()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(term.election.run(), name=f"{self.name} election")
                tasks.create_task(self.health.run(), name=f"{self.name} health")
                news = self._news.run(self._wait_unless_becoming_active)
                tasks.create_task(news, name=f"{self.name} events")
                while True:
                    reign = await term.election.next_reign()
                    await self._reigns.run(term, reign)
        finally:
            self._highest_epoch = term.election.highest
            if self._calls is not None:
                self._calls.on_leader(None, self._highest_epoch)
            await term.locks.close()
            self._term = candidacy.election = None
            if candidacy.is_started:
                candidacy.set_passive()

    async def _wait_unless_becoming_active(self) -> None:
        while (
            self._term is not None
            and self._term.has_key
            and self.role not in (Role.ACTIVE, Role.STANDING_DOWN)
        ):
            await self._role.wait_changed()

    # --- what happens

    def on_fenced(self) -> None:
        """A node was said to be off: a takeover that waits for that is tried again now."""
        self._candidacy.on_fenced()

    def on_pauses(self) -> None:
        """Something was paused or resumed; if it was this app, what was only reported counts now."""
        if not self._pausing.has_changed():
            return
        if self._term is not None and not self.is_paused:
            self._term.election.on_resumed()
        self._reigns.on_pause_changed()
        self._role.wake()

    def _on_acquired(self, succession: Succession) -> None:
        self._reigns.succession = succession
        self._running_parts.journal.acquired(self.name, succession)

    def _on_leader(self, old: LeaderRecord, new: LeaderRecord) -> None:
        before = old.session.node if old.session is not None else None
        after = new.session.node if new.session is not None else None
        if self._calls is not None:
            self._calls.on_leader(after, new.revision)
        if before != after or old.revision == 0:
            change = LeaderChange(self.name, after, before, new.revision, new.reason)
            self._news.tell("on_leader_change", change)
            self._running_parts.journal.leader_seen(self.name, after, new.revision, new.reason)
        if self._term is not None and self._reigns.section is None:
            self._term.check_adopted(new)
        if self.database is not None and after != self.node:  # else the activation needs its turn
            self.database.look()
        self._role.wake()

    def _on_health(self, health: Health, reason: str) -> None:
        self._journal.report("health-changed", f"{health}: {reason}" if reason else str(health))
        self._news.tell("on_health_change", HealthChange(self.name, health, reason))
        if self.is_active and health is Health.HEALTHY:
            self._reigns.note_healthy()
        if health is Health.UNHEALTHY:
            self._reigns.on_unhealthy(f"unhealthy: {reason}")
        self._on_surroundings()

    def _on_surroundings(self) -> None:
        """Whether this node can be a candidate may have changed."""
        self._candidacy.offer()
        if self._reigns.section is None and self._candidacy.is_started and self._term is not None:
            self._candidacy.set_passive()

    def _on_hook_failed(self, problem: str) -> None:
        self._journal.report("hook-failed", problem, level=logging.ERROR)


__all__ = ["App"]

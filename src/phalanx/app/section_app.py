"""What apps with active sections have in common, on one node: active-passive apps and pools."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from phalanx import system
from phalanx.app.candidacy import Candidacy
from phalanx.app.contest import SectionTerm
from phalanx.app.contexts import AppContext, HealthChange
from phalanx.app.declared import DeclaredApp
from phalanx.app.on_node import OnNode
from phalanx.app.parts import NodeParts, instances_of
from phalanx.app.reigns import Reigns
from phalanx.app.restarts import AppRestarts
from phalanx.config import AppConfig
from phalanx.coord.kv import AppKV
from phalanx.coord.locks import Locks
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.errors import HookFailed, NotActive, StartError
from phalanx.messaging.event_serving import EventServer
from phalanx.messaging.events import Events
from phalanx.messaging.serving import CallServer
from phalanx.observe.metrics import EventCounts
from phalanx.ports import Backend, SectionAddresses, SectionCalls
from phalanx.program import RestartPolicy
from phalanx.types import Health, Role, Standing, Succession

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    pass

TermT = TypeVar("TermT", bound=SectionTerm)


class SectionApp(OnNode, DeclaredApp, Generic[TermT]):
    """An app that is active on this node in one section after the other. :meth:`_make_term` says when."""

    stays_in_pause = True

    def __init__(
        self, config: AppConfig, backend: Backend | None, addresses: SectionAddresses | None = None
    ) -> None:
        super().__init__(config, backend, addresses)
        role, journal = self._role, self._journal
        self._candidacy = Candidacy(self, self.health, role)
        restarts = AppRestarts(config, self.health, self._candidacy, self._pausing, role, journal)
        policy = RestartPolicy(config.restart, restarts)
        self._reigns = Reigns(self, self.health, self._candidacy, self._pausing, policy, journal)
        self._term: TermT | None = None
        self._highest_epoch = 0
        self._events: EventServer | None = None

    # --- what is so

    @property
    def epoch(self) -> int:
        """The epoch of the present section of this node. Raises NotActive outside of one."""
        if self._reigns.context is None:
            raise NotActive(self.name)
        return self._reigns.context.epoch

    def event_counts(self) -> list[EventCounts]:
        """What became of its events on this node."""
        return self._events.counts() if self._events is not None else []

    @property
    def events(self) -> Events:
        """The app's own events, from any node (not fenced: see ``ctx.events``). Raises StartError."""
        if self._events is None:
            raise StartError(f"app {self.name!r} has no events yet", "use them while the platform runs")
        if self.events_config is None:
            raise StartError(f"app {self.name!r} has no events of its own", "declare them: events=Events()")
        return self._events.public

    def _locks_now(self) -> Locks | None:
        return self._term.locks if self._term is not None else None

    @property
    def has_section(self) -> bool:
        """Whether something of an active section may run here."""
        return self._reigns.has_section

    @property
    def is_idle(self) -> bool:
        """Whether no section runs here, and the last one's leader key was given back (or tried to)."""
        return self._reigns.is_idle

    def others_can(self) -> bool:
        """Whether another node is an eligible candidate."""
        return self._candidacy.others_can()

    def unkept_because(self) -> str:
        """Why what is active here would end with the node, even in a pause; empty if it would not."""
        return self._term.unkept_because if self._term is not None else self.bound_because

    def _standing(self, priority: int = 0, no_failover: bool = False, named: str = "") -> Standing:
        section, term, failures = self._reigns.section, self._term, self._candidacy.failures
        aside = failures.not_before - system.now()
        # Only looked at: the role that is acted on is set where changes are heard of.
        eligible = not self._candidacy.ineligible_because(acts_on_it=False) and aside <= 0
        if section is not None:
            eligible = self.is_active and self.health.verdict is not Health.UNHEALTHY
        return Standing(
            eligible,
            priority,
            no_failover,
            system.wall() + aside if section is None and aside > 0 else 0.0,
            failures.count,
            section.step if section is not None else "",
            section.step_since if section is not None and section.step else 0.0,
            self._reigns.healthy_since if section is not None else 0.0,
            self._reigns.succession if section is not None else None,
            named,
            term.session.timing.ttl if term is not None else 0.0,
        )

    # --- what one can wait for, and ask for

    async def wait_ended(self) -> None:
        """Wait until nothing of a section runs here."""
        await self._reigns.wait_ended()

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`."""
        await self._reigns.wait_idle()

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        self._reigns.on_idle(callback)

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
        self._take_up(parts)
        self._candidacy.set_role(Role.STARTING)
        await self._start_more(parts)
        if problem := await self._run_hook("on_start"):
            self._candidacy.barred = problem
        self._calls = self._make_calls(parts, self.kv)
        self._calls.instances = instances_of(parts, self.name)
        try:
            await self._calls.open()
            await self._open_events(parts)
        except BaseException:
            # The node stops what has started only: what runs by now, the database say, is ended here.
            self._candidacy.is_started = True
            await self.stop()
            raise
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

    async def _start_more(self, parts: NodeParts) -> None:
        """What only some of them have, before any hook."""

    def _make_calls(self, parts: NodeParts, kv: AppKV) -> CallServer:
        return CallServer(self.name, self.node, self.handlers, parts.bus, parts.names, kv)

    async def stop(self) -> None:
        """Run ``on_stop``. The active section has ended before."""
        if not self._candidacy.is_started:
            return
        if self._events is not None:
            try:
                await self._events.close()
            except HookFailed as error:
                self._on_hook_failed(str(error))  # it runs on no epoch: the rest is stopped all the same
        if self._calls is not None:
            await self._calls.close()
        await self._run_hook("on_stop")
        self.hooks.close()
        await self._stop_more()
        self._candidacy.set_role(Role.STOPPED)
        self._candidacy.is_started = False

    async def _stop_more(self) -> None:
        """The reverse of :meth:`_start_more`, after all hooks."""

    def _make_term(self, session: Session, register: Register, calls: SectionCalls | None) -> TermT:
        raise NotImplementedError

    async def serve(self, session: Session, register: Register) -> None:
        """Take part under *session* until cancelled. The guard ends the section before."""
        candidacy = self._candidacy
        self._term = term = self._make_term(session, register, self._calls if self.handlers else None)
        candidacy.contest, candidacy.leaving = term.contest, ""
        candidacy.offer()
        candidacy.set_passive()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._begin_tasks(tasks, term)
                while True:
                    reign = await term.contest.next_reign()
                    await self._reigns.run(term, reign)
        finally:
            self._highest_epoch = term.contest.highest
            if self._calls is not None:
                self._calls.on_leader(None, self._highest_epoch)
            await term.close()
            self._term = candidacy.contest = None
            if candidacy.is_started:
                candidacy.set_passive()

    def _begin_tasks(self, tasks: asyncio.TaskGroup, term: TermT) -> None:
        """What runs beside its sections, as long as *term* lasts."""
        tasks.create_task(term.contest.run(), name=f"{self.name} election")
        tasks.create_task(self.health.run(), name=f"{self.name} health")
        news = self._news.run(self._wait_unless_becoming_active)
        tasks.create_task(news, name=f"{self.name} events")

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
            self._term.contest.on_resumed()
        self._reigns.on_pause_changed()
        self._role.wake()

    def _on_acquired(self, succession: Succession) -> None:
        self._reigns.succession = succession
        self._running_parts.journal.acquired(self.name, succession)

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


__all__ = ["SectionApp"]

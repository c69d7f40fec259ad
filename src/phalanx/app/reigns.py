"""The sections of one app on this node, one after the other, and what ends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from phalanx import system
from phalanx.app.candidacy import Candidacy
from phalanx.app.contest import Contest, SectionTerm
from phalanx.app.contexts import ActiveContext
from phalanx.app.declared import DeclaredApp
from phalanx.app.journal import AppJournal
from phalanx.app.pausing import Pausing
from phalanx.coord.election import Reign
from phalanx.coord.kv import AppKV
from phalanx.decide.pause import Cause, ends_section
from phalanx.decide.restart import FailOver
from phalanx.errors import FenceFailed, NotActive
from phalanx.observe.health import HealthMonitor
from phalanx.ports import SectionContext
from phalanx.program import Program, RestartPolicy
from phalanx.section import Section
from phalanx.types import Health, Role, Succession

SUCCESSOR_NONE = "no other eligible node"


class Reigns:
    """Runs one reign at a time.

    The invariants: :meth:`wait_ended` returns only when nothing of a section runs here, and
    :attr:`is_idle` only holds when its leader key was given back as well (or tried to).
    """

    def __init__(
        self,
        app: DeclaredApp,
        health: HealthMonitor,
        candidacy: Candidacy,
        pausing: Pausing,
        policy: RestartPolicy,
        journal: AppJournal,
    ) -> None:
        self._app, self._health, self._candidacy = app, health, candidacy
        self._pausing, self._policy, self._journal = pausing, policy, journal
        self._term: SectionTerm | None = None
        self.section: Section | None = None
        self.context: ActiveContext | None = None
        self.succession: Succession | None = None
        """How this node came to lead, the last time it did."""
        self.healthy_since = 0.0
        """When the present section gave its first healthy answer; Unix seconds, 0: it has not."""
        self.left_behind = ""
        """What the last graceful end of a section here could not put into the log; empty: nothing."""
        self._activating_since = self._standing_down_since = 0.0
        self._target: str | None = None
        self._ended, self._idle = asyncio.Event(), asyncio.Event()
        self._ended.set()
        self._idle.set()
        self._when_idle: Callable[[], None] | None = None

    # --- one reign

    async def run(self, term: SectionTerm, reign: Reign) -> None:
        """From the section's first step to the release of the leader key."""
        self._ended.clear()
        self._idle.clear()
        began = system.now()
        try:
            term.parts.section_begins()
            try:
                section = await self._run_section(term, reign)
            finally:
                self._term = self.section = self.context = None
                self._journal.epoch = 0
                term.parts.section_has_ended()
                self._ended.set()
            await self._after_section(term, section, system.now() - began)
        finally:
            self._idle.set()
            if self._when_idle is not None:
                self._when_idle()

    async def _run_section(self, term: SectionTerm, reign: Reign) -> Section:
        context, resources = self._contexts(term, reign)
        adopted = [resource for resource in term.adopted if resource.epoch == resources.epoch]
        if adopted:
            reign.unfenced = ()  # it was fenced before that could run: by now it may have returned
        app = self._app
        section = Section(
            reign,
            resources,
            app.hooks,
            Program(app.backend, resources, self._policy) if app.backend is not None else None,
            context,
            database=term.database,
            calls=term.calls,
            events=term.events if term.events is not None and term.events.has_own else None,
            addresses=app.addresses,
            fence_previous=(lambda: self._fence_previous(term, reign)) if reign.unfenced else None,
            on_active_timeout=float(app.config.hook_timeouts.on_active),
            on_passive_timeout=float(app.config.hook_timeouts.on_passive),
            on_role=self._on_section_role,
            on_step=self._journal.step,
            paused=lambda: self._pausing.is_paused,
            on_held=self._pausing.on_held,
            adopted=adopted,
        )
        self._term, self.section, self.context, self._target = term, section, context, None
        self._journal.epoch = context.epoch
        self.healthy_since = 0.0
        self._candidacy.set_role(Role.ACTIVATING)
        self._activating_since = system.now()
        watch_stuck = asyncio.create_task(self._watch_stuck(term, section))
        try:
            await section.run()
        finally:
            watch_stuck.cancel()
        return section

    def _contexts(self, term: SectionTerm, reign: Reign) -> tuple[ActiveContext, SectionContext]:
        """What the hooks get, and what the backend, the database and the addresses get."""
        name, parts, session, database = self._app.name, term.parts, term.session, term.database
        epoch = int(reign.epoch)
        context = ActiveContext(
            name,
            parts.node,
            epoch,
            reign.fence,
            AppKV(parts.bus, parts.names, name, fence=lambda: reign.fence, epoch=lambda: epoch),
            term.locks.under(reign.fence, epoch),
            database,
            term.events.active(epoch) if term.events is not None and term.events.has_own else None,
        )
        resources = SectionContext(
            parts.names.platform,
            parts.node,
            name,
            epoch,
            parts.register,
            parts.unregister,
            str(database.live) if database is not None else "",
            lambda: session.right_until(name) - system.now() if session.covers(name) else 0.0,
            self._health.tell,
        )
        return context, resources

    async def _fence_previous(self, term: SectionTerm, reign: Reign) -> None:
        fencer = term.parts.fencer
        if fencer is not None:
            await fencer.fence(self._app.name, int(reign.epoch), reign.unfenced)
        reign.unfenced = ()

    async def _watch_stuck(self, term: SectionTerm, section: Section) -> None:
        await section.stuck.wait()
        term.parts.on_stuck(self._app.name, section.reign.reason)

    async def _after_section(self, term: SectionTerm, section: Section, lasted: float) -> None:
        """The section has ended: count failures, say who is next, give the key back."""
        now, contest, candidacy = system.now(), term.contest, self._candidacy
        reason, epoch = section.reign.reason, int(section.reign.epoch)
        if term.keeps_key:
            contest.keep_key(section.reign)
            action = "left-running" if section.is_left else "ended-in-pause"
            self._journal.report(action, reason, lasted, epoch=epoch)
            candidacy.set_passive(reason)
            return
        self._journal.of_node.stood_down(self._app.name, now - self._standing_down_since)
        self.left_behind = section.left_behind
        candidacy.wait_for_fence(isinstance(section.failure, FenceFailed))
        if section.failure is not None:
            candidacy.count_failure(str(section.failure), section.steady_seconds)
            failures = candidacy.failures
            self._journal.report(
                "activation-failed" if section.active_since is None else "section-failed",
                f"{section.failure}; failure {failures.count} in a row, "
                f"not before {failures.not_before - now:.1f} s again",
                level=logging.ERROR,
                epoch=epoch,
            )
        elif section.active_since is not None:
            candidacy.failures = candidacy.failures.was_active(section.steady_seconds)
        candidacy.offer()
        successor = self._target if self._target is not None else contest.successor()
        await contest.release(section.reign, reason, successor)
        self._journal.report(
            "released", f"{reason}; next: {successor or SUCCESSOR_NONE}", lasted, epoch=epoch
        )
        candidacy.set_passive(reason)

    # --- what the section tells

    def _on_section_role(self, role: Role) -> None:
        section = self.section
        reason = section.reign.reason if section is not None else ""
        self._candidacy.set_role(role, reason)
        if role is Role.ACTIVE:
            # Only now: what is still starting is not ill.
            self._health.set_active(True)
            checks, seconds = self._app.config.checks, system.now() - self._activating_since
            self._journal.of_node.activated(self._app.name, self._journal.epoch, seconds, len(checks))
            if not checks or self._health.verdict is Health.HEALTHY:
                self.note_healthy()
        elif role is Role.STANDING_DOWN:
            self._health.set_active(False)
            self._standing_down_since = system.now()
            self._journal.report("standing-down", reason)

    def note_healthy(self) -> None:
        """The first healthy answer of this section: by its checks, or by being active where it has none."""
        if self.healthy_since:
            return
        self.healthy_since = system.wall()
        if self._app.config.checks:
            self._journal.report("first-healthy", "", system.now() - self._activating_since)

    # --- what ends it

    def end(self, reason: str) -> None:
        """Ask the active section to end gracefully, naming a successor. Nothing to do if there is none."""
        if self._term is not None and self.section is not None:
            if not self.section.reign.ending.is_set():
                self._target = self._term.contest.successor()
                self._report_hand_over("handing-over", reason, self._target)
            self.section.reign.end(reason)

    def fence(self, reason: str) -> None:
        """End the active section at once."""
        if self.section is not None:
            self.section.fence(reason)

    def leave(self, reason: str) -> None:
        """The node ends in a pause. What can runs on, the rest ends; nobody else takes over either way."""
        term, section = self._term, self.section
        if term is None or section is None or section.reign.ending.is_set():
            return
        term.keeps_key = True
        why = term.unkept_because
        if why or section.active_since is None:
            self._journal.report("ending-in-pause", f"{reason}; {why or 'it is not active yet'}")
            section.reign.end(reason)
        else:
            section.leave(reason)

    def on_unhealthy(self, reason: str) -> None:
        """Its checks have failed: start its program again in place, or leave the app to another node."""
        section = self.section
        if section is None or not ends_section(Cause.ILL, paused=self._pausing.is_paused):
            return  # it was reported, and is judged again when the pause is over
        # A check that runs on standbys too is about this node: a restart would not cure it.
        is_of_node = self._health.standby_verdict is Health.UNHEALTHY
        if section.program is None or is_of_node or isinstance(self._policy.decide(), FailOver):
            self._candidacy.count_failure(reason, section.steady_seconds)
            self.end(reason)
        else:
            section.program.restart(reason)

    def on_database_lost(self, reason: str) -> None:
        """What it commits gets neither captured nor into the log."""
        if self.section is not None:
            self._candidacy.count_failure(reason, self.section.steady_seconds)
            self.end(reason)

    def on_pause_changed(self) -> None:
        """What was only reported may count now."""
        if self.section is not None:
            self.section.look()
            if self._health.verdict is Health.UNHEALTHY:
                self.on_unhealthy(f"unhealthy: {self._health.reason}")

    # --- what an operator asks for

    def check_successor(self, node: str | None) -> str | None:
        """Who would follow this node, *node* if given; None: nobody could. Raises NotActive, and ConfigError
        for a node that is no candidate."""
        contest, _ = self._present
        return contest.check_successor(node) if node is not None else contest.successor()

    async def step_down(self, reason: str, to: str | None) -> str | None:
        """End the section gracefully; see ``App.step_down``."""
        _, section = self._present
        successor = self._step_aside(to)
        self._report_hand_over("handing-over", reason, successor)
        section.reign.end(reason)
        await self.wait_idle()
        return successor

    async def fail_over(self, epoch: int, reason: str, to: str | None) -> str | None:
        """End the section of *epoch* at once; see ``App.fail_over``."""
        _, section = self._present
        if int(section.reign.epoch) != epoch:
            raise NotActive(self._app.name)
        successor = self._step_aside(to)
        self._report_hand_over("failing-over", reason, successor, logging.WARNING)
        section.fence(reason)
        await self.wait_idle()
        return successor

    @property
    def _present(self) -> tuple[Contest, Section]:
        if self._term is None or self.section is None:
            raise NotActive(self._app.name)
        return self._term.contest, self.section

    def _step_aside(self, to: str | None) -> str | None:
        self._pausing.check()
        successor = self._target = self.check_successor(to)
        self._candidacy.step_aside()
        return successor

    def _report_hand_over(
        self, action: str, reason: str, successor: str | None, level: int = logging.INFO
    ) -> None:
        self._journal.report(action, f"{reason}; to {successor or SUCCESSOR_NONE}", level=level)

    # --- its end

    @property
    def has_section(self) -> bool:
        """Whether something of an active section may run here."""
        return not self._ended.is_set()

    async def wait_ended(self) -> None:
        """Wait until nothing of a section runs here."""
        await self._ended.wait()

    @property
    def is_idle(self) -> bool:
        """Whether no section runs here, and the last one's leader key was given back (or tried to)."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`."""
        await self._idle.wait()

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        self._when_idle = callback


__all__ = ["Reigns"]

"""One active-passive app: the public face of its declaration and of what it is on this node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from phalanx.app.contexts import LeaderChange
from phalanx.app.parts import NodeParts
from phalanx.app.section_app import SectionApp
from phalanx.app.term import Term
from phalanx.config import ActivePassive, AppConfig
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.errors import StartError
from phalanx.ports import Backend, SectionAddresses, SectionCalls
from phalanx.types import AppStatus, Candidate, LeaderRecord

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.control_db import DatabaseControl
    from phalanx.data.database import Database

F = TypeVar("F", bound=Callable[..., Any])


class App(SectionApp[Term]):
    """An active-passive app. Made by :meth:`phalanx.Platform.app`, never directly."""

    def __init__(
        self, config: AppConfig, backend: Backend | None, addresses: SectionAddresses | None = None
    ) -> None:
        super().__init__(config, backend, addresses)
        self._database_control: DatabaseControl | None = None

    @property
    def pattern(self) -> ActivePassive:
        """What was declared of its election."""
        assert isinstance(self.config.pattern, ActivePassive), "the platform makes no App of another pattern"
        return self.config.pattern

    def on_leader_change(self, function: F) -> F:
        """Runs on every node when the leader changes, with a :class:`LeaderChange`."""
        self.hooks.add("on_leader_change", function)
        return function

    # --- what is so

    @property
    def leader(self) -> str | None:
        """The node that leads, as this node knows; None while nobody does."""
        record = self._term.election.leader if self._term is not None else None
        return record.session.node if record is not None and record.session is not None else None

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
            self._standing(
                self.pattern.priority,
                self.pattern.no_failover,
                (self._term.election.named or "") if self._term is not None else "",
            ),
            self.unkept_because() if self.is_active else "",
            self.health.reason,
            *self._term.hold if self._term is not None and self.is_active else (0.0, ""),
        )

    # --- what one can ask for

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

    # --- life on a node

    async def _start_more(self, parts: NodeParts) -> None:
        await self._start_database(parts)
        if self.addresses is not None:
            await self.addresses.start(self._on_surroundings)

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

    async def _stop_more(self) -> None:
        if self.database is not None and self._database_control is not None:
            await self._database_control.stop()
            await self.database.close()
            self.database = self._candidacy.database = self._database_control = None
        if self.addresses is not None:
            await self.addresses.close()

    def _make_term(self, session: Session, register: Register, calls: SectionCalls | None) -> Term:
        return Term(
            self,
            self.pattern,
            self._running_parts,
            session,
            register,
            self.database,
            calls,
            self._events,
            highest=self._highest_epoch,
            paused=lambda: self.is_paused,
            on_leader=self._on_leader,
            on_acquired=self._on_acquired,
        )

    # --- what happens

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
            self._term.check_adopted(is_covered=new.session == self._term.session.id)
        if self.database is not None and after != self.node:  # else the activation needs its turn
            self.database.look()
        self._role.wake()


__all__ = ["App"]

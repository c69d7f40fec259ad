"""What one app takes part with under one session of its node: an election, locks, and what was left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from phalanx.app.declared import DeclaredApp
from phalanx.app.parts import NodeParts
from phalanx.coord.election import Election
from phalanx.coord.locks import Locks
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.messaging.event_serving import EventServer, SectionWork
from phalanx.ports import SectionCalls
from phalanx.types import LeaderRecord, Resource, Succession

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class Term:
    """The app under one session. Nothing of it is used under another one.

    *highest*: the highest epoch that this node has seen in earlier terms.
    """

    def __init__(
        self,
        app: DeclaredApp,
        parts: NodeParts,
        session: Session,
        register: Register,
        database: AppDatabase | None,
        calls: SectionCalls | None,
        events: EventServer | None,
        *,
        highest: int,
        paused: Callable[[], bool],
        on_leader: Callable[[LeaderRecord, LeaderRecord], None],
        on_acquired: Callable[[Succession], None],
    ) -> None:
        self._app = app
        self.parts, self.session, self.database = parts, session, database
        self.events = events
        handlers = (calls, events if app.event_handlers.in_section else None)
        working = [part for part in handlers if part is not None]
        self.calls: SectionCalls | None = SectionWork(*working) if working else None
        """The calls and events that the app handles while it is active; None: neither."""
        self.keeps_key = False
        """The node ends in a pause: the leader key stays as it is, and nobody else takes over."""
        self.locks = Locks(parts.bus, parts.names, app.name, session, register)
        self.election = Election(
            parts.bus,
            parts.names,
            app.name,
            session,
            register,
            priority=app.pattern.priority,
            no_failover=app.pattern.no_failover,
            highest=highest,
            adopted=max((resource.epoch for resource in self.adopted), default=0),
            handicap=database.handicap_seconds if database is not None else lambda: 0.0,
            fences=parts.fencer is not None and parts.fencer.has_command,
            holds=parts.holds,
            hold=app.pattern.on_nats_loss == "hold",
            paused=paused,
            on_leader=on_leader,
            on_acquired=on_acquired,
        )

    @property
    def has_key(self) -> bool:
        """Whether the leader key names this session.

        Not the same as a reign: the watch may tell of our own write before its reply comes.
        """
        return self.election.leader.session == self.session.id

    @property
    def hold(self) -> tuple[float, str]:
        """See ``AppStatus.held_seconds`` and ``AppStatus.hold``."""
        return self.parts.holds.describe(self._app.name, self.session)

    @property
    def adopted(self) -> list[Resource]:
        """What an earlier life of the node has left of it. Its reign goes on, or the session is given up."""
        return [resource for resource in self.session.adopted if resource.app == self._app.name]

    def check_adopted(self, leader: LeaderRecord) -> None:
        """Without a section: what was left running runs under the leader key, or not at all. That the key is
        another's cannot be."""
        if leader.session == self.session.id:
            return
        if any(resource.id in self.session.registered for resource in self.adopted):
            self.session.give_up(
                f"app {self._app.name}: what was left running is not covered by the leader key"
            )

    @property
    def unkept_because(self) -> str:
        """Why what is active here would end with the node, even in a pause; empty if it would not."""
        if reason := self._app.bound_because:
            return reason
        registered = [r for r in self.session.registered.values() if r.app == self._app.name]
        if not all(resource.adoptable for resource in registered):
            return "its program is a child of the node"
        return ""


__all__ = ["Term"]

"""What an active-passive app takes part with under one session of its node: its election."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from phalanx.app.contest import SectionTerm
from phalanx.app.declared import DeclaredApp
from phalanx.app.parts import NodeParts
from phalanx.config import ActivePassive
from phalanx.coord.election import Election
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.messaging.event_serving import EventServer
from phalanx.ports import SectionCalls
from phalanx.types import LeaderRecord, Succession

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class Term(SectionTerm):
    """The app under one session. Nothing of it is used under another one.

    *highest*: the highest epoch that this node has seen in earlier terms.
    """

    def __init__(
        self,
        app: DeclaredApp,
        pattern: ActivePassive,
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
        super().__init__(app, parts, session, register, database, calls, events)
        self.election = Election(
            parts.bus,
            parts.names,
            app.name,
            session,
            register,
            priority=pattern.priority,
            no_failover=pattern.no_failover,
            highest=highest,
            adopted=self.adopted_epoch,
            handicap=database.handicap_seconds if database is not None else lambda: 0.0,
            fences=parts.fencer is not None and parts.fencer.has_command,
            holds=parts.holds,
            hold=pattern.on_nats_loss == "hold",
            paused=paused,
            on_leader=on_leader,
            on_acquired=on_acquired,
        )

    @property
    def contest(self) -> Election:
        """Its election."""
        return self.election

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


__all__ = ["Term"]

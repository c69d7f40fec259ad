"""What a pool takes part with under one session of its node: its seats."""

from __future__ import annotations

from collections.abc import Callable

from phalanx.app.contest import SectionTerm
from phalanx.app.declared import DeclaredApp
from phalanx.app.parts import NodeParts
from phalanx.app.ring_fencing import FencingRegister
from phalanx.config import Pool
from phalanx.coord.register import Register
from phalanx.coord.seats import Seats
from phalanx.coord.session import Session
from phalanx.ports import SectionCalls
from phalanx.types import SessionId, Succession


class PoolTerm(SectionTerm):
    """The pool under one session. *highest*: the highest epoch that this node has seen in earlier terms."""

    def __init__(
        self,
        app: DeclaredApp,
        pattern: Pool,
        parts: NodeParts,
        session: Session,
        register: Register,
        calls: SectionCalls | None,
        *,
        highest: int,
        paused: Callable[[], bool],
        on_change: Callable[[], None],
        on_acquired: Callable[[int, Succession], None],
    ) -> None:
        # Its events are not sealed under an epoch: each instance would shut the others out.
        super().__init__(app, parts, session, register, None, calls, None)
        self.register = FencingRegister(
            app.name,
            parts,
            register,
            holders=lambda: self.seats.holders(),
            wants_fence=self._wants_fence,
            rank=lambda: self.seats.rank(),
        )
        self.seats = Seats(
            parts.bus,
            parts.names,
            app.name,
            session,
            self.register,
            replicas=pattern.replicas,
            highest=highest,
            adopted=self.adopted_epoch,
            paused=paused,
            why_over=register.why_over,
            on_change=on_change,
            on_acquired=on_acquired,
        )

    @staticmethod
    def _wants_fence(session: SessionId) -> bool:
        """Whoever takes a seat over has the same fence command, or none is asked for."""
        return False

    @property
    def contest(self) -> Seats:
        """Its seats."""
        return self.seats

    @property
    def has_key(self) -> bool:
        """Whether a seat names this session."""
        return self.seats.has_key()

    async def close(self) -> None:
        """See SectionTerm."""
        await super().close()
        await self.register.close()


__all__ = ["PoolTerm"]

"""What decides when a node is active for an app, as the app's own parts see it, whatever its pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from phalanx.app.declared import DeclaredApp
from phalanx.app.parts import NodeParts
from phalanx.coord.election import Reign
from phalanx.coord.locks import Locks
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.messaging.event_serving import EventServer, SectionWork
from phalanx.ports import SectionCalls
from phalanx.types import Resource

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class Contest(Protocol):
    """The election of an active-passive app, or the seats of a pool: for one session of the node."""

    @property
    def highest(self) -> int:
        """The highest epoch that this node has ever seen."""
        ...

    async def run(self) -> None:
        """Take part until cancelled."""
        ...

    async def next_reign(self) -> Reign:
        """Wait until this node is to be active."""
        ...

    async def release(self, reign: Reign, reason: str, successor: str | None = None) -> None:
        """Let somebody else: the active section has ended."""
        ...

    def keep_key(self, reign: Reign) -> None:
        """The node ends in a pause, and what it holds stays its own."""
        ...

    def set_candidacy(self, eligible: bool, reason: str = "", not_before: float = float("-inf")) -> None:
        """Whether this node may be active, and from when on (``system.now()``'s clock)."""
        ...

    def on_resumed(self) -> None:
        """The app's pause is over."""
        ...

    def successor(self) -> str | None:
        """Who would be active instead of this node; None: nobody."""
        ...

    def check_successor(self, node: str) -> str:
        """*node*, if it could be. Raises ConfigError."""
        ...


class SectionTerm:
    """An app with active sections under one session. Nothing of it is used under another one."""

    def __init__(
        self,
        app: DeclaredApp,
        parts: NodeParts,
        session: Session,
        register: Register,
        database: AppDatabase | None,
        calls: SectionCalls | None,
        events: EventServer | None,
    ) -> None:
        self._app = app
        self.parts, self.session, self.database = parts, session, database
        self.events = events
        handlers = (calls, events if app.event_handlers.in_section else None)
        working = [part for part in handlers if part is not None]
        self.calls: SectionCalls | None = SectionWork(*working) if working else None
        """The calls and events that the app handles while it is active; None: neither."""
        self.keeps_key = False
        """The node ends in a pause: what it holds of the app stays its own, and nobody else takes over."""
        self.locks = Locks(parts.bus, parts.names, app.name, session, register)

    @property
    def contest(self) -> Contest:
        """What decides when this node is active."""
        raise NotImplementedError

    @property
    def has_key(self) -> bool:
        """Whether what this session holds makes this node active, or soon will.

        Not the same as a reign: the watch may tell of our own write before its reply comes.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """The session is over for the app: nothing of it is used any more."""
        await self.locks.close()

    @property
    def adopted(self) -> list[Resource]:
        """What an earlier life of the node has left of it. Its reign goes on, or the session is given up."""
        return [resource for resource in self.session.adopted if resource.app == self._app.name]

    @property
    def adopted_epoch(self) -> int:
        """The epoch of that; 0: nothing was left."""
        return max((resource.epoch for resource in self.adopted), default=0)

    def check_adopted(self, *, is_covered: bool) -> None:
        """Without a section: what was left running runs under a key that names this session (*is_covered*),
        or not at all."""
        if is_covered:
            return
        if any(resource.id in self.session.registered for resource in self.adopted):
            self.session.give_up(f"app {self._app.name}: what was left running is not covered by its key")

    @property
    def unkept_because(self) -> str:
        """Why what is active here would end with the node, even in a pause; empty if it would not."""
        if reason := self._app.bound_because:
            return reason
        registered = [r for r in self.session.registered.values() if r.app == self._app.name]
        if not all(resource.adoptable for resource in registered):
            return "its program is a child of the node"
        return ""


__all__ = ["Contest", "SectionTerm"]

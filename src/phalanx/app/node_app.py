"""What a node needs of any app that it runs, whatever its pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from phalanx.app.parts import NodeParts
from phalanx.config import AppConfig
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.errors import AddressError, BackendError
from phalanx.hooks import Hooks
from phalanx.ports import AddressClaim
from phalanx.types import AppStatus, Pause, Role

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class NodeApp(Protocol):
    """One app on one node: :class:`phalanx.app.App`, :class:`phalanx.app.RingApp`.

    A *section* is the time in which something runs here that must have ended before it may begin elsewhere:
    the reign of an active-passive app, a ring's partitions from the first to the last. Whoever has one has
    registered it with the keeper.
    """

    name: str
    config: AppConfig
    hooks: Hooks
    database: AppDatabase | None

    # --- what is so

    @property
    def role(self) -> Role: ...
    @property
    def is_active(self) -> bool: ...
    @property
    def pause(self) -> Pause | None: ...
    @property
    def is_paused(self) -> bool: ...
    @property
    def has_section(self) -> bool:
        """Whether something of a section may run here."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no section runs here, and what it held was given back (or tried to)."""
        ...

    @property
    def can_adopt(self) -> bool:
        """Whether all that it runs can outlive a node, by its kind."""
        ...

    @property
    def stays_in_pause(self) -> bool:
        """Whether its node, when it ends in a pause, leaves the session to the keeper for its sake."""
        ...

    @property
    def spool_bytes(self) -> int: ...
    def others_can(self) -> bool:
        """Whether another node could take over what runs here."""
        ...

    def status(self) -> AppStatus: ...

    # --- before and after all sessions

    async def check(self) -> None: ...
    async def problems(self) -> list[BackendError | AddressError]: ...
    async def address_claims(self) -> tuple[AddressClaim, ...]: ...
    async def start(self, parts: NodeParts) -> None:
        """Run ``on_start`` and begin to answer. Raises ConfigError for what only a running NATS can tell."""
        ...

    async def stop(self) -> None:
        """The reverse; the section has ended before."""
        ...

    async def wait_for_role(self, *roles: Role, timeout: float) -> Role: ...

    # --- under one session

    async def serve(self, session: Session, register: Register) -> None:
        """Take part under *session* until cancelled. The guard ends the section before."""
        ...

    def bar(self, reason: str) -> None:
        """Begin nothing more under this session, which is being given up; empty: it is not after all."""
        ...

    def end_section(self, reason: str) -> None:
        """Ask the section to end gracefully. Nothing to do if there is none."""
        ...

    def fence(self, reason: str) -> None:
        """End the section at once."""
        ...

    def leave(self, reason: str) -> None:
        """The node ends in a pause, and leaves the session to its keeper."""
        ...

    async def wait_ended(self) -> None:
        """Wait until nothing of a section runs here."""
        ...

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`."""
        ...

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        ...

    # --- what happens

    def on_fenced(self) -> None:
        """A node was said to be off."""
        ...

    def on_pauses(self) -> None:
        """Something was paused or resumed."""
        ...


__all__ = ["NodeApp"]

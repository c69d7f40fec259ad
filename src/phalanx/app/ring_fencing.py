"""Fencing for rings: a partition whose owner vanished is taken only once its host is known to be off.

The same rules as for a takeover (:mod:`phalanx.decide.fencing`): a session that its own side has ended needs
none, nor one that owned nothing. Until the fencing is done the session does not count as over for the ring,
so that its partitions are neither planned elsewhere nor taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from phalanx.aio import Background, wait_at_most
from phalanx.app.parts import NodeParts
from phalanx.coord.register import Register
from phalanx.decide.backoff import Backoff
from phalanx.errors import BusError, FenceFailed, SessionLost
from phalanx.types import SessionId

log = logging.getLogger("phalanx.fence")

RANK_SECONDS = 2.0
"""What each node waits longer than the one before it, by name: so that, as a rule, one runs the command."""

RETRY = Backoff(first=0.5, longest=10.0)


class FencingRegister:
    """The register of sessions, as a ring sees it (:class:`phalanx.coord.noted_sessions.Judges`).

    *holds*: whether any partition names that session. *wants_fence*: whether its node asks to be fenced.
    *rank*: how many nodes try before this one.
    """

    def __init__(
        self,
        app: str,
        parts: NodeParts,
        register: Register,
        *,
        holders: Callable[[], Collection[SessionId]],
        wants_fence: Callable[[SessionId], bool],
        rank: Callable[[], int],
    ) -> None:
        self._app, self._parts, self._register = app, parts, register
        self._holders, self._wants_fence, self._rank = holders, wants_fence, rank
        self._done: set[SessionId] = set()
        self._under_way: set[SessionId] = set()
        self._listeners: list[Callable[[SessionId], None]] = []
        self._again = asyncio.Event()
        self._background = Background(log)

    def note(self, session: SessionId) -> None:
        """See :meth:`Register.note`."""
        self._register.note(session)

    def unnote(self, session: SessionId) -> None:
        """See :meth:`Register.unnote`; what was done for it is forgotten."""
        self._register.unnote(session)
        self._done.discard(session)

    def on_over(self, callback: Callable[[SessionId], None]) -> None:
        """See :meth:`Register.on_over`; also told when the fencing of one is done."""
        self._register.on_over(callback)
        self._listeners.append(callback)

    def off_over(self, callback: Callable[[SessionId], None]) -> None:
        """The reverse."""
        self._register.off_over(callback)
        self._listeners.remove(callback)

    def is_over(self, session: SessionId) -> bool:
        """Whether it is, and nothing of it can run any more."""
        if not self._register.is_over(session):
            return False
        if session in self._done or not self._needs_fence(session):
            return True
        if session not in self._under_way:
            self._under_way.add(session)
            self._background.spawn(self._fence(session), f"fencing {session} for {self._app}")
        return False

    def on_fenced(self) -> None:
        """A node was said to be off: what waits for that tries again now."""
        self._again.set()

    async def close(self) -> None:
        """Fence no more."""
        await self._background.close()

    def _needs_fence(self, session: SessionId) -> bool:
        fencer = self._parts.fencer
        if fencer is None or session.node == self._parts.node or session not in self._holders():
            return False
        asked = fencer.has_command or self._wants_fence(session)
        return asked and not self._register.ended_itself(session)

    async def _fence(self, session: SessionId) -> None:
        fencer, failures = self._parts.fencer, 0
        assert fencer is not None
        try:
            await wait_at_most(self._again, self._rank() * RANK_SECONDS)
            while self._needs_fence(session):
                self._again.clear()
                try:
                    await fencer.fence(self._app, 0, (session,))
                    break
                except (FenceFailed, BusError, SessionLost) as error:
                    failures += 1
                    if not isinstance(error, FenceFailed):  # that one is in the audit log
                        log.warning("app %s: fencing node %s: %s", self._app, session.node, error)
                    await wait_at_most(self._again, RETRY.delay(failures))
            self._done.add(session)
        finally:
            self._under_way.discard(session)
        for tell in list(self._listeners):
            tell(session)


__all__ = ["FencingRegister"]

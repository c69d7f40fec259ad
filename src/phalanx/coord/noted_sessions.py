"""The sessions that something refers to, known to the register as long as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from phalanx.types import SessionId


class Judges(Protocol):
    """What rings, pools and locks need of the node's register (:class:`phalanx.coord.register.Register`)."""

    def is_over(self, session: SessionId) -> bool: ...
    def note(self, session: SessionId) -> None: ...
    def unnote(self, session: SessionId) -> None: ...
    def on_over(self, callback: Callable[[SessionId], None]) -> None: ...
    def off_over(self, callback: Callable[[SessionId], None]) -> None: ...


class NotedSessions:
    """The register judges whoever is named here, even if no session stream holds it."""

    def __init__(self, register: Judges) -> None:
        self._register = register
        self._now: set[SessionId] = set()

    def __bool__(self) -> bool:
        return bool(self._now)

    def __contains__(self, session: SessionId) -> bool:
        return session in self._now

    def are(self, named: set[SessionId]) -> None:
        """From now on these and no others."""
        for session in named - self._now:
            self._register.note(session)
        for session in self._now - named:
            self._register.unnote(session)
        self._now = named


__all__ = ["Judges", "NotedSessions"]

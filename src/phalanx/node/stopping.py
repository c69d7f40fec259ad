"""The wish that the node stops: since when nothing new begins, why, and how much grace there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from phalanx.errors import InternalError


class Stopping:
    """Asked once it hands everything over; asked a second time there is no grace. It is never taken back."""

    def __init__(self, on_asked: Callable[[], None]) -> None:
        self.reason = ""
        self.in_a_hurry = False
        """Whether it is to stop without grace."""
        self.failure: InternalError | None = None
        """The bug for which it has to, if that is why."""
        self._on_asked, self._asked = on_asked, 0
        self._event = asyncio.Event()

    def ask(self, reason: str, failure: BaseException | None = None) -> None:
        """Stop. The first reason stays, and the first *failure*; one is no wish of anybody's for haste."""
        if failure is None:
            self._asked += 1
            self.in_a_hurry = self._asked > 1
        elif self.failure is None:
            self.failure = InternalError(reason.removeprefix("internal error in "), failure)
            self.failure.__cause__ = failure
        self.reason = self.reason or reason
        self._event.set()
        self._on_asked()

    @property
    def is_asked(self) -> bool:
        """Whether it is to stop."""
        return self._event.is_set()

    @property
    def event(self) -> asyncio.Event:
        """Set once it is."""
        return self._event


__all__ = ["Stopping"]

"""What a pause changes for one app on this node: what fails is reported, and waited with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from phalanx.app.journal import AppJournal
from phalanx.app.role import AppRole
from phalanx.decide.pause import pause_of
from phalanx.errors import Paused
from phalanx.types import Pause

log = logging.getLogger("phalanx.app")


class Pausing:
    """The pause that the app is under, as far as this node knows: its own, or its platform's."""

    def __init__(self, app: str, role: AppRole, journal: AppJournal) -> None:
        self._app, self._role, self._journal = app, role, journal
        self._pauses: Callable[[], Mapping[str, Pause]] = dict
        self._known: Pause | None = None

    def look_at(self, pauses: Callable[[], Mapping[str, Pause]]) -> None:
        """The node has started: what it knows to be paused, by app."""
        self._pauses = pauses

    @property
    def pause(self) -> Pause | None:
        """The present one; None: nothing is paused."""
        return pause_of(self._app, self._pauses())

    @property
    def is_paused(self) -> bool:
        """Whether nothing of the app may change hands."""
        return self.pause is not None

    def has_changed(self) -> bool:
        """Whether it is another one than the last time that this was asked; logged if so."""
        before, self._known = self._known, self.pause
        if self._known == before:
            return False
        if self._known is not None:
            log.warning("app %s: %s; nothing changes hands until it is resumed", self._app, self._known)
        else:
            log.warning("app %s: resumed", self._app)
        return True

    def check(self) -> None:
        """Raise Paused while it is."""
        if (pause := self.pause) is not None:
            raise Paused(self._app, str(pause), whole=self._app not in self._pauses())

    def on_held(self, problem: str) -> None:
        """Something that would have ended the section, had the app not been paused."""
        self._role.set(self._role.role, f"failed in a pause: {problem}")
        self._journal.report("failed-in-pause", problem, level=logging.ERROR)

    async def wait_while_paused(self, problem: str) -> None:
        """Return at once; or, if the app is paused, report *problem* and return when it no longer is."""
        if self.is_paused:
            self.on_held(problem)
        while self.is_paused:
            await self._role.wait_changed()


__all__ = ["Pausing"]

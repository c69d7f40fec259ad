"""One app's part of the node's journal: what happens to it, with the epoch in which it happens."""

from __future__ import annotations

import logging

from phalanx.errors import StartError
from phalanx.observe.journal import Journal


class AppJournal:
    """Adds the app, and the epoch of its section while it has one."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._journal: Journal | None = None
        self.epoch = 0
        """That of the present section; 0: there is none."""

    def write_to(self, journal: Journal) -> None:
        """The node has started: what happens from now on is reported there."""
        self._journal = journal

    @property
    def of_node(self) -> Journal:
        """The node's journal. Raises StartError before the node was started."""
        if self._journal is None:
            raise StartError(f"app {self._app!r} does not run yet", "start its platform first")
        return self._journal

    def report(
        self,
        action: str,
        reason: str,
        duration_seconds: float | None = None,
        level: int = logging.INFO,
        epoch: int = 0,
        **details: str,
    ) -> None:
        """A transition of the app. *epoch* is that of a section that has ended, while there is no other."""
        self.of_node.app(
            self._app,
            action,
            epoch=self.epoch or epoch,
            reason=reason,
            duration_seconds=duration_seconds,
            level=level,
            **details,
        )

    def step(self, step: str, seconds: float, problem: str) -> None:
        """One step of an activation, or of its undoing, has ended."""
        self.of_node.step(self._app, step, self.epoch, seconds, problem)

    def hook(self, hook: str, seconds: float) -> None:
        """A hook has run; also while no node runs the app."""
        if self._journal is not None:
            self._journal.hook(self._app, hook, seconds)


__all__ = ["AppJournal"]

"""What one app says and does about restarts of its program in place."""

from __future__ import annotations

import logging

from phalanx.app.candidacy import Candidacy
from phalanx.app.journal import AppJournal
from phalanx.app.pausing import Pausing
from phalanx.app.role import AppRole
from phalanx.config import AppConfig
from phalanx.decide.restart import RestartIn
from phalanx.observe.health import HealthMonitor
from phalanx.types import Role


class AppRestarts:
    """Hears of restarts (see :class:`phalanx.program.Restarting`). The section, its epoch and the role stay;
    the checks count again once the program is back."""

    def __init__(
        self,
        config: AppConfig,
        health: HealthMonitor,
        candidacy: Candidacy,
        pausing: Pausing,
        role: AppRole,
        journal: AppJournal,
    ) -> None:
        self._config, self._health, self._candidacy = config, health, candidacy
        self._role, self._journal = role, journal
        self.wait_while_paused = pausing.wait_while_paused

    def others_can(self) -> bool:
        """Whether another node is an eligible candidate."""
        return self._candidacy.others_can()

    def on_program_ended(self, how: str) -> None:
        """Its program has ended by itself."""
        self._journal.report("backend-ended", how, level=logging.WARNING)

    def on_restarting(self, reason: str, decision: RestartIn, restarts: int) -> None:
        """Its program is about to be started again in place."""
        # What was seen of the old one does not count for the new one, and what is starting is not ill.
        self._health.set_active(False)
        count, window = self._config.restart.count, self._config.restart.window
        why = f"restart {restarts} of {count} within {window:g} s"
        if decision.beyond:
            why = f"more than {count} restarts within {window:g} s, but no other eligible node"
        why = f"{reason}; {why}; in {decision.delay:g} s"
        self._journal.report("restarting", why, level=logging.WARNING)
        self._role.set(self._role.role, f"its program is being restarted: {reason}")

    def on_restarted(self, seconds: float) -> None:
        """It is ready again."""
        self._journal.report("restarted", "", seconds)
        self._role.set(self._role.role, "")
        self._health.set_active(self._role.role is Role.ACTIVE)


__all__ = ["AppRestarts"]

"""Whether this node offers to lead one app, and which role it has while it does not lead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from phalanx import system
from phalanx.app.contest import Contest
from phalanx.app.declared import DeclaredApp
from phalanx.app.role import AppRole
from phalanx.decide.activation import STEP_ASIDE_SECONDS, Failures
from phalanx.observe.health import HealthMonitor
from phalanx.types import Health, Role

if TYPE_CHECKING:
    # At run time only by apps that declare a database: it brings libraries of its own along.
    from phalanx.data.database import AppDatabase


class Candidacy:
    """This node's offer to lead the app. Whatever may change it ends in :meth:`offer`.

    ``contest`` is that of the present session, ``database`` the app's one on this node; None while there is
    none. ``is_started``: ``on_start`` has run, ``on_stop`` has not.
    """

    def __init__(self, app: DeclaredApp, health: HealthMonitor, role: AppRole) -> None:
        self._app, self._health, self._role = app, health, role
        self.contest: Contest | None = None
        self.database: AppDatabase | None = None
        self.is_started = False
        self.barred = ""
        """Why this node cannot lead as long as it lives; empty: it can."""
        self.leaving = ""
        """Why it cannot under this session, which is being given up."""
        self.failures = Failures()
        self._waits_for_fence = False
        self._has_standby_checks = any(check.when == "always" for check in app.config.checks)

    def ineligible_because(self, *, acts_on_it: bool = True) -> str:
        """Why it cannot lead now; empty if it can. *acts_on_it*: it becomes the role or the offer."""
        if self.barred or self.leaving:
            return self.barred or self.leaving
        if self.contest is None:
            return "the node has no session"
        if self.database is not None and (reason := self.database.ineligible_because(acts_on_it=acts_on_it)):
            return reason
        addresses = self._app.addresses
        if addresses is not None and (reason := addresses.ineligible_because()):
            return reason
        verdict = self._health.standby_verdict
        if verdict is Health.UNHEALTHY:
            return f"unhealthy: {self._health.standby_reason}"
        if verdict is Health.UNKNOWN and self._has_standby_checks:
            return "its health checks have not answered yet"
        return ""

    def offer(self) -> None:
        """Tell the other nodes what is so now."""
        if self.contest is not None:
            reason = self.ineligible_because()
            self.contest.set_candidacy(not reason, reason, self.failures.not_before)

    def others_can(self) -> bool:
        """Whether another node is an eligible candidate."""
        return self.contest is not None and self.contest.successor() is not None

    # --- the role

    def set_role(self, role: Role, reason: str = "") -> None:
        """It is *role* now. Without *reason* a standby says what has failed before."""
        if role is Role.INELIGIBLE:
            reason = self.ineligible_because()
        elif role is Role.STANDBY and not reason and self.failures.count:
            reason = f"failed {self.failures.count} times in a row: {self.failures.reason}"
        self._role.set(role, reason)

    def set_passive(self, reason: str = "") -> None:
        """It has no section (any more): what it is now."""
        self.set_role(Role.INELIGIBLE if self.ineligible_because() else Role.STANDBY, reason)

    # --- stepping aside

    def count_failure(self, reason: str, steady_seconds: float) -> None:
        """A section has failed here, after all went well for *steady_seconds*: leave the app to others."""
        self.failures = self.failures.failed(
            system.now(), reason, self._app.config.retry, steady_seconds=steady_seconds
        )

    def step_aside(self) -> None:
        """Leave the app to others for a moment, without a failure."""
        failures = self.failures
        self.failures = Failures(failures.count, system.now() + STEP_ASIDE_SECONDS, failures.reason)

    def wait_for_fence(self, waits: bool) -> None:
        """Whether what has failed was the fencing of an earlier leader."""
        self._waits_for_fence = waits

    def on_fenced(self) -> None:
        """A node was said to be off: a takeover that waits for that is tried again now."""
        if self._waits_for_fence:
            self._waits_for_fence = False
            self.failures = msgspec.structs.replace(self.failures, not_before=system.now())
            self.offer()


__all__ = ["Candidacy"]

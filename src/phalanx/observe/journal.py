"""Where every decision is reported once: one log line, one audit entry, one metric."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from phalanx.types import Succession

log = logging.getLogger("phalanx")

_SETTLED = ("active", "activation-failed")


class Audit(Protocol):
    """What the journal needs of the audit log."""

    def record(
        self,
        category: str,
        action: str,
        *,
        app: str = "",
        epoch: int = 0,
        reason: str = "",
        duration_seconds: float | None = None,
        **details: str,
    ) -> object: ...


class Meter(Protocol):
    """What the journal needs of the metrics."""

    def observe_step(self, app: str, step: str, seconds: float) -> None: ...
    def observe_stand_down(self, app: str, seconds: float) -> None: ...
    def observe_activation(self, app: str, seconds: float) -> None: ...
    def observe_hook(self, app: str, hook: str, seconds: float) -> None: ...
    def leader_acquired(self, app: str) -> None: ...
    def backend_restarted(self, app: str) -> None: ...
    def nats_disconnected(self) -> None: ...


class Journal:
    """Reports of one node. Never raises and never waits: it is called in the middle of failovers."""

    def __init__(self, audit: Audit, meter: Meter) -> None:
        self._audit, self._meter = audit, meter
        self.on_settled: Callable[[str, int], None] | None = None
        """Told of each activation, app and epoch, that has come to its end or has failed."""

    def app(
        self,
        app: str,
        action: str,
        *,
        epoch: int = 0,
        reason: str = "",
        duration_seconds: float | None = None,
        level: int = logging.INFO,
        **details: str,
    ) -> None:
        """A transition of an app on this node."""
        if action == "restarting":
            self._meter.backend_restarted(app)
        self._audit.record(
            "app", action, app=app, epoch=epoch, reason=reason, duration_seconds=duration_seconds, **details
        )
        if self.on_settled is not None and action in _SETTLED:
            self.on_settled(app, epoch)
        log.log(
            level,
            "app %s: %s%s%s",
            app,
            action,
            f" (epoch {epoch})" if epoch else "",
            f": {reason}" if reason else "",
            extra={"app": app, "epoch": epoch, "duration_seconds": duration_seconds},
        )

    def acquired(self, app: str, succession: Succession) -> None:
        """This node leads an app now, and how that came about."""
        self._meter.leader_acquired(app)
        self.app(
            app,
            "leader-acquired",
            epoch=succession.epoch,
            reason=succession.reason,
            duration_seconds=succession.vacant_seconds,
            previous=succession.previous,
            previous_epoch=str(succession.previous_epoch),
            how=succession.how,
            named="yes" if succession.named else "no",
            by=succession.by,
        )

    def activated(self, app: str, epoch: int, seconds: float, checks: int = 0) -> None:
        """An app is active now, so many seconds after this node took the leader key. *checks*: how many
        health checks it has; without any this is its first healthy answer."""
        self._meter.observe_activation(app, seconds)
        self.app(app, "active", epoch=epoch, duration_seconds=seconds, checks=str(checks))

    def stood_down(self, app: str, seconds: float) -> None:
        """A section has ended, so many seconds after that began."""
        self._meter.observe_stand_down(app, seconds)

    def step(self, app: str, step: str, epoch: int, seconds: float, problem: str) -> None:
        """One step of an activation, or of its undoing, has ended."""
        self._meter.observe_step(app, step, seconds)
        self._audit.record(
            "step", step.replace("_", "-"), app=app, epoch=epoch, reason=problem, duration_seconds=seconds
        )
        level = logging.ERROR if problem else logging.DEBUG
        log.log(
            level,
            "app %s: step %s took %.1f ms%s",
            app,
            step,
            1000 * seconds,
            f": {problem}" if problem else "",
            extra={"app": app, "epoch": epoch, "duration_seconds": seconds},
        )

    def hook(self, app: str, hook: str, seconds: float) -> None:
        """A hook has run."""
        self._meter.observe_hook(app, hook, seconds)

    def leader_seen(self, app: str, leader: str | None, epoch: int, reason: str) -> None:
        """This node has learned who leads. Logged only: the leader's own entry is the audit."""
        log.info(
            "app %s: leader is %s%s",
            app,
            f"{leader} (epoch {epoch})" if leader else "nobody",
            f": {reason}" if reason else "",
            extra={"app": app, "epoch": epoch},
        )

    def node(
        self,
        action: str,
        *,
        reason: str = "",
        duration_seconds: float | None = None,
        level: int = logging.INFO,
        **details: str,
    ) -> None:
        """Something about the node itself."""
        self._audit.record(
            "node", action, reason=reason, duration_seconds=duration_seconds, epoch=0, app="", **details
        )
        shown = " ".join(f"{key}={value}" for key, value in details.items())
        log.log(
            level, "node: %s%s%s", action, f": {reason}" if reason else "", f" ({shown})" if shown else ""
        )

    def nats(self, action: str, reason: str = "", level: int = logging.INFO) -> None:
        """Something about the connection to NATS, or about the embedded server."""
        if action == "disconnected":
            self._meter.nats_disconnected()
        self._audit.record("nats", action, reason=reason)
        log.log(level, "nats: %s%s", action, f": {reason}" if reason else "")

    def platform(self, action: str, reason: str = "", level: int = logging.INFO, **details: str) -> None:
        """A decision about the platform as a whole."""
        self._audit.record(
            "platform", action, reason=reason, duration_seconds=None, epoch=0, app="", **details
        )
        log.log(level, "platform: %s%s", action, f": {reason}" if reason else "")

"""Runs the health checks of one app on one node, and says how the app is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from phalanx import system
from phalanx.config import Check
from phalanx.decide.health import Rule, Tally, Verdict, judge, running, waits_for
from phalanx.probes import CheckFailed, Probe, run_check
from phalanx.types import Health

log = logging.getLogger("phalanx.health")

TOLD = "container health"
"""The name of the program's own health check, which its backend follows: no declared check can have it."""


class CheckResult(msgspec.Struct, frozen=True):
    """One check as it stands. ``since`` is Unix seconds: when it got this health (0: it has not run)."""

    name: str
    health: Health = Health.UNKNOWN
    detail: str = ""
    duration_seconds: float = 0.0
    since: float = 0.0


class _Watched:
    """A check, its probe, and how it went."""

    def __init__(self, check: Check) -> None:
        self.rule = Rule(
            check.name, check.failures, check.successes, tuple(check.depends_on), check.when == "always"
        )
        self.interval: float = check.interval
        self.probe = Probe(check)
        self.wake = asyncio.Event()
        """Set when the health of another check changed: perhaps this one need not wait for it any more."""
        self.task: asyncio.Task[None] | None = None
        self.reset()

    def reset(self) -> None:
        self.tally, self.result = Tally(), CheckResult(self.rule.name)


class HealthMonitor:
    """The health of *app*: ``verdict`` with its ``reason``, ``standby_verdict``, and each check's result.

    *on_change* is called with the new verdict and its reason, once per change of the verdict, from the
    loop; it must not block. UNKNOWN: no check runs, or they have not answered yet. The reason of a
    verdict that stays may change without a call. *checks* need unique names, as configuration ensures.
    """

    def __init__(self, app: str, checks: tuple[Check, ...], on_change: Callable[[Health, str], None]) -> None:
        self._app, self._on_change = app, on_change
        self._watched = {check.name: _Watched(check) for check in checks}
        self._told: CheckResult | None = None
        self._active = False
        self._tasks: asyncio.TaskGroup | None = None
        self._verdict = Verdict(Health.UNKNOWN)

    @property
    def verdict(self) -> Health:
        """The verdict of all checks that run now."""
        return self._verdict.health

    @property
    def reason(self) -> str:
        """Why the verdict is not HEALTHY: each such check with what it saw last."""
        return self._judge(self._running()).reason

    @property
    def standby_verdict(self) -> Health:
        """The verdict of the checks that always run, which decides whether this node is a candidate."""
        return self._judge(running(self._rules, active=False)).health

    @property
    def standby_reason(self) -> str:
        """The reason of ``standby_verdict``."""
        return self._judge(running(self._rules, active=False)).reason

    def results(self) -> tuple[CheckResult, ...]:
        """Every check, in the order of the declaration; those that don't run now are UNKNOWN."""
        told = (self._told,) if self._told is not None else ()
        return tuple(one.result for one in self._watched.values()) + told

    def tell(self, health: Health, detail: str) -> None:
        """How the program is by a health check of its own, which somebody else runs and counts (thresholds
        are his): from the active section on like a check here. The end of the section forgets it."""
        if self._told is not None and self._told.health is health:
            return
        self._told = CheckResult(TOLD, health, detail, since=system.wall())
        self._changed()

    def set_active(self, active: bool) -> None:
        """Begin or end the checks of the active section, with fresh counters. Works before run(), too."""
        if not active:
            self._told = None
        if active == self._active:
            return
        self._active = active
        for one in self._watched.values():
            if not one.rule.always:
                if one.task is not None:
                    one.task.cancel()
                one.reset()
                if active:
                    self._begin(one)
        self._changed()

    async def run(self) -> None:
        """Run the checks until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for one in self._watched.values():
                    if one.rule.always or self._active:
                        self._begin(one)
                await asyncio.get_running_loop().create_future()  # until cancelled, with checks or without
        finally:
            self._tasks = None
            for one in self._watched.values():
                one.task = None

    # --- the checks

    def _begin(self, one: _Watched) -> None:
        if self._tasks is not None:
            one.task = self._tasks.create_task(self._watch(one), name=f"{self._app} check {one.rule.name}")

    async def _watch(self, one: _Watched) -> None:
        await one.probe.wait_ended()  # of the last active section, perhaps just now cancelled
        while True:
            one.wake.clear()
            began = system.now()
            if waiting := self._waits_for(one):
                one.reset()
                one.result = CheckResult(one.rule.name, detail=f"waits for {', '.join(waiting)}")
                await one.wake.wait()
                continue
            await self._run_once(one, began)
            # A run that took longer than the interval is followed by the next at once, but not in one turn.
            await asyncio.sleep(max(0.0, began + one.interval - system.now()))

    async def _run_once(self, one: _Watched, began: float) -> None:
        try:
            detail, passed = await one.probe.run(), True
        except CheckFailed as failure:
            detail, passed = failure.detail, False
        if self._waits_for(one):
            return  # what it depends on went ill meanwhile: this does not count
        before, one.tally = one.tally, one.tally.after(passed, one.rule)
        changed = one.tally.health is not before.health or not one.result.since
        one.result = CheckResult(
            one.rule.name,
            one.tally.health,
            detail,
            system.now() - began,
            system.wall() if changed else one.result.since,
        )
        if one.tally.health is not before.health:
            log.log(
                logging.WARNING if one.tally.health is Health.UNHEALTHY else logging.INFO,
                "app %s: check %s is %s%s",
                self._app,
                one.rule.name,
                one.tally.health,
                f": {detail}" if detail else "",
                extra={"app": self._app},
            )
            self._changed()

    # --- the verdict

    @property
    def _rules(self) -> tuple[Rule, ...]:
        told = (Rule(TOLD, failures=1),) if self._told is not None else ()
        return tuple(one.rule for one in self._watched.values()) + told

    def _running(self) -> tuple[Rule, ...]:
        return running(self._rules, active=self._active)

    def _waits_for(self, one: _Watched) -> tuple[str, ...]:
        return waits_for(one.rule, self._running(), self._tallies())

    def _tallies(self) -> dict[str, Tally]:
        tallies = {name: one.tally for name, one in self._watched.items()}
        return tallies | ({TOLD: Tally(self._told.health)} if self._told is not None else {})

    def _judge(self, rules: tuple[Rule, ...]) -> Verdict:
        details = {result.name: result.detail for result in self.results()}
        return judge(rules, self._tallies(), details)

    def _changed(self) -> None:
        for one in self._watched.values():
            one.wake.set()
        before, self._verdict = self._verdict, self._judge(self._running())
        if self._verdict.health is before.health:
            return
        try:
            self._on_change(self._verdict.health, self._verdict.reason)
        except Exception:
            # One listener's error must not end the checks, which would then see no illness at all.
            log.exception("app %s: a health change could not be reported", self._app)


__all__ = ["CheckFailed", "CheckResult", "HealthMonitor", "run_check"]

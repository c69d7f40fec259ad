"""A trace of each failover, by the node that has become active: what ``phalanx failover show`` shows."""

from __future__ import annotations

import asyncio
import logging

from phalanx import system
from phalanx.aio import Background
from phalanx.errors import BusError
from phalanx.names import Names
from phalanx.observe.audit import read_audit
from phalanx.observe.failovers import BEFORE_SECONDS, Failover, failovers
from phalanx.observe.tracing import tracer
from phalanx.ports import Bus

log = logging.getLogger("phalanx.tracing")

LOOK_EVERY_SECONDS = 0.5
WAIT_SECONDS = 30.0
"""For the first healthy answer; without it what has happened until then is traced."""

_MOST_ENTRIES = 2000


class FailoverSpans:
    """Traces what has made this node active. Costs nothing where the program traces nothing."""

    def __init__(self, bus: Bus, names: Names, background: Background) -> None:
        self._bus, self._names, self._background = bus, names, background

    def begin(self, app: str, epoch: int) -> None:
        """An activation of *app* has come to its end, or has failed."""
        if tracer() is not None:
            self._background.spawn(self._trace(app, epoch), f"trace failover {app}/{epoch}")

    async def _trace(self, app: str, epoch: int) -> None:
        since, until = system.wall() - BEFORE_SECONDS, system.now() + WAIT_SECONDS
        found: Failover | None = None
        while system.now() < until:
            # The first look, too, comes later: the former leader's own entries are still under way.
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            try:
                entries = await read_audit(self._bus, self._names, since=since, limit=_MOST_ENTRIES)
            except BusError as error:
                log.debug("tracing failover %s/%d: %s", app, epoch, error)
                continue
            found = next((each for each in failovers(entries, app) if each.epoch == epoch), found)
            if found is not None and (found.healthy_seconds is not None or found.outcome == "failed"):
                break
        if found is None:
            log.warning("failover %s/%d is not traced: the audit log cannot be read", app, epoch)
        else:
            trace_failover(found)


def trace_failover(failover: Failover) -> None:
    """One span for all of it; inside of that one for each step that took its time, events for the others."""
    made = tracer()
    if made is None or not failover.steps:
        return
    from opentelemetry import trace
    from opentelemetry.context import Context

    begin = failover.steps[0].at - failover.steps[0].offset_seconds
    what = "failover" if failover.previous else "activation"
    root = made.start_span(
        f"{what} {failover.app}", Context(), attributes=_attributes(failover), start_time=_ns(begin)
    )
    inside = trace.set_span_in_context(root, Context())
    for step in failover.steps:
        said = {"phalanx.node": step.node, **({"phalanx.detail": step.detail} if step.detail else {})}
        if step.duration_seconds is None:
            root.add_event(step.what, said, _ns(step.at))
            continue
        started = _ns(step.at - step.duration_seconds)
        made.start_span(step.what, inside, attributes=said, start_time=started).end(_ns(step.at))
    if failover.outcome == "failed":
        root.set_status(trace.Status(trace.StatusCode.ERROR, "the activation failed"))
    root.end(_ns(max(step.at for step in failover.steps)))


def _attributes(failover: Failover) -> dict[str, str | int | float | bool]:
    said: dict[str, str | int | float | bool | None] = {
        "failover.id": failover.id,
        "app": failover.app,
        "epoch": failover.epoch,
        "node": failover.node,
        "previous": failover.previous,
        "previous_epoch": failover.previous_epoch,
        "how": failover.how,
        "reason": failover.reason,
        "by": failover.by,
        "outcome": failover.outcome,
        "missing": failover.missing,
    }
    return {f"phalanx.{name}": value for name, value in said.items() if value}


def _ns(seconds: float) -> int:
    return int(seconds * 1_000_000_000)


__all__ = ["FailoverSpans", "trace_failover"]

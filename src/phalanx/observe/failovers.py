"""What happened when an app changed hands, step by step, read from the audit log.

Pure: from entries to timelines, for ``phalanx failover show``. Times are those of the nodes' own clocks;
where two nodes take part they are as good as these agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from phalanx.observe.audit import AuditEntry

BEFORE_SECONDS = 120.0
"""How long before its end was seen the previous leader's own entries are looked for."""

_ENDING = {"handing-over", "failing-over", "standing-down", "section-failed", "released"}
_UNDOING = {
    "end-on-active",
    "on-passive",
    "stop-backend",
    "release-vip",
    "stop-capture",
    "unregister",
    "stuck",
}
_BEGINNING = {"active", "activation-failed", "first-healthy", "database-promoted"}
_OF_NODE = {"fenced", "session-lost", "cut-off", "suicide", "standing-down"}
_LATER = {"database-diverged", "database-returned", "database-truncated"}


class TimelineStep(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened. ``at``: Unix seconds, ``offset_seconds``: after the start of the timeline."""

    at: float
    offset_seconds: float
    node: str
    what: str
    duration_seconds: float | None = None
    detail: str = ""


class Failover(msgspec.Struct, frozen=True, kw_only=True):
    """How *node* came to run *app* under *epoch*. ``id`` is ``app/epoch``.

    ``how``: ``released``, ``session-over``, empty for the first one ever (or an entry of an older version).
    ``outcome``: ``active``, ``failed``, or ``under way``. Spans in seconds, None where that was not reached:
    ``vacant``: from when the end was seen until the key was taken; ``activation``: until active; ``healthy``:
    until the first healthy answer; ``total``: from the start of the timeline to that answer. ``missing``:
    what of the database was known to be missing at the start, ``loss``: what the previous node said when it
    returned; both empty without a database, or while that is unknown.
    """

    id: str
    app: str
    epoch: int
    node: str
    at: float
    previous: str = ""
    previous_epoch: int = 0
    how: str = ""
    reason: str = ""
    named: bool = False
    by: str = ""
    outcome: str = "under way"
    vacant_seconds: float | None = None
    activation_seconds: float | None = None
    healthy_seconds: float | None = None
    total_seconds: float | None = None
    missing: str = ""
    loss: str = ""
    steps: tuple[TimelineStep, ...] = ()


def failovers(entries: Sequence[AuditEntry], app: str | None = None) -> list[Failover]:
    """Every time an app (*app*, if given) got a new leader, oldest first."""
    taken = [
        entry
        for entry in entries
        if entry.category == "app" and entry.action == "leader-acquired" and app in (None, entry.app)
    ]
    return [_failover(entry, entries) for entry in sorted(taken, key=lambda entry: entry.time)]


def _failover(taken: AuditEntry, entries: Sequence[AuditEntry]) -> Failover:
    details = taken.details
    previous, before = details.get("previous", ""), int(details.get("previous_epoch") or 0)
    mine = [e for e in entries if e.app == taken.app and e.epoch == taken.epoch and e.node == taken.node]
    theirs = _of_previous(taken, previous, before, entries)
    active = _first(mine, "active")
    healthy = _first(mine, "first-healthy")
    if healthy is None and active is not None and active.details.get("checks") == "0":
        healthy = active  # it has no checks: being active is the answer
    failed = _first(mine, "activation-failed")
    promoted = _first(mine, "database-promoted")
    seen_at = taken.time - (taken.duration_seconds or 0.0)
    begin = min([seen_at, *(e.time - (e.duration_seconds or 0.0) for e in theirs if _counts(e))])
    steps = _steps(taken, mine, theirs, healthy, seen_at, begin)
    return Failover(
        id=f"{taken.app}/{taken.epoch}",
        app=taken.app,
        epoch=taken.epoch,
        node=taken.node,
        at=taken.time,
        previous=previous,
        previous_epoch=before,
        how=details.get("how", ""),
        reason=taken.reason,
        named=details.get("named") == "yes",
        by=details.get("by", ""),
        outcome="active" if active is not None else "failed" if failed is not None else "under way",
        vacant_seconds=taken.duration_seconds,
        activation_seconds=_span(taken, active),
        healthy_seconds=_span(taken, healthy),
        total_seconds=healthy.time - begin if healthy is not None else None,
        missing=promoted.details.get("missing", "") if promoted is not None else "",
        loss=_loss(taken.app, previous, before, entries),
        steps=steps,
    )


def _counts(entry: AuditEntry) -> bool:
    """Whether the change may begin with it; the duration of a release is that of the whole section."""
    return entry.action != "released"


def _of_previous(
    taken: AuditEntry, previous: str, epoch: int, entries: Sequence[AuditEntry]
) -> list[AuditEntry]:
    """What the previous leader, or its keeper, wrote of its end."""
    if not previous:
        return []
    led_since = next(
        (
            e.time
            for e in entries
            if e.app == taken.app and e.epoch == epoch and e.action == "leader-acquired"
        ),
        0.0,
    )
    first, last = max(led_since, taken.time - BEFORE_SECONDS), taken.time + 1.0
    return [
        entry
        for entry in entries
        if entry.node == previous and first < entry.time <= last and _is_about_end(entry, taken.app, epoch)
    ]


def _is_about_end(entry: AuditEntry, app: str, epoch: int) -> bool:
    if entry.category == "node":
        return entry.action in _OF_NODE
    if entry.app != app or entry.epoch != epoch:
        return False
    return entry.action in (_UNDOING if entry.category == "step" else _ENDING)


def _steps(
    taken: AuditEntry,
    mine: Sequence[AuditEntry],
    theirs: Sequence[AuditEntry],
    healthy: AuditEntry | None,
    seen_at: float,
    begin: float,
) -> tuple[TimelineStep, ...]:
    def step(entry: AuditEntry, what: str, detail: str = "") -> TimelineStep:
        return TimelineStep(
            at=entry.time,
            offset_seconds=entry.time - begin,
            node=entry.node,
            what=what,
            duration_seconds=entry.duration_seconds,
            detail=detail or entry.reason,
        )

    # A section's whole length at its release says nothing about the change.
    found = [
        msgspec.structs.replace(step(e, _named(e)), duration_seconds=None)
        if e.action == "released"
        else step(e, _named(e))
        for e in theirs
    ]
    if taken.details.get("previous"):
        how = taken.details.get("how", "")
        seen = "session over, seen" if how == "session-over" else "release seen"
        found.append(
            TimelineStep(
                at=seen_at, offset_seconds=seen_at - begin, node=taken.node, what=seen, detail=taken.reason
            )
        )
    found.append(msgspec.structs.replace(step(taken, "key taken"), detail=""))
    found += [
        step(e, _named(e))
        for e in mine
        if e is not taken and (e.category == "step" or e.action in _BEGINNING) and not _is_later(e, healthy)
    ]
    return tuple(sorted(found, key=lambda each: each.at))


def _is_later(entry: AuditEntry, healthy: AuditEntry | None) -> bool:
    """What comes after the first healthy answer is another story: the end of that very section."""
    return healthy is not None and entry is not healthy and entry.time > healthy.time + 1e-6


def _named(entry: AuditEntry) -> str:
    return f"step {entry.action}" if entry.category == "step" else entry.action


def _first(entries: Sequence[AuditEntry], action: str) -> AuditEntry | None:
    return next((e for e in entries if e.category == "app" and e.action == action), None)


def _span(taken: AuditEntry, then: AuditEntry | None) -> float | None:
    return then.time - taken.time if then is not None else None


def _loss(app: str, previous: str, epoch: int, entries: Sequence[AuditEntry]) -> str:
    """What became of the database of the previous reign, once its node was back."""
    for entry in entries:
        if entry.app == app and entry.node == previous and entry.epoch == epoch and entry.action in _LATER:
            return f"{entry.action}: {entry.reason}"
    return ""


__all__ = ["Failover", "TimelineStep", "failovers"]

"""Judges what a run has left: was anything lost that was confirmed, or lost and not reported (G3, G8)?"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.replication_validation.chaos import Inflicted
from benchmarks.replication_validation.databases import Content, Replayed
from phalanx.data.entries import SealKind
from phalanx.observe.audit import AuditEntry
from phalanx.testing.history import Event, violations

GAP_SECONDS = 0.5
"""Between two commits; what is longer counts as not available."""


class SetAside(msgspec.Struct, frozen=True):
    """A database that was set aside: what the note beside it says, and what is really in it."""

    node: str
    epoch: int
    sequence: int
    transactions: int
    exact: bool
    reported: bool
    file: str
    content: Content


class Sample(msgspec.Struct, frozen=True):
    """A look at a replica while everything went on: the last row seen there at that moment."""

    node: str
    at: float
    number: int
    problems: tuple[str, ...] = ()


class Evidence(msgspec.Struct, frozen=True):
    """All that is known at the end, when nobody writes any more and all nodes have settled."""

    events: Sequence[Event]
    audit: Sequence[AuditEntry]
    replayed: Replayed
    databases: Mapping[str, Content]
    """By node; the live one among them."""
    aside: Sequence[SetAside]
    inflicted: Sequence[Inflicted] = ()
    samples: Sequence[Sample] = ()
    fingerprints: Mapping[str, str] = {}
    """By node, as the replicas' nodes say themselves."""


def judge(evidence: Evidence) -> list[str]:
    """Everything that contradicts a promise."""
    final = evidence.replayed.final
    problems = violations(list(evidence.events)) + evidence.replayed.problems
    problems += [f"the log, applied: {problem}" for problem in final.problems]
    for node, content in evidence.databases.items():
        problems += [f"database of {node}: {problem}" for problem in content.problems]
        if content.fingerprint != final.fingerprint:
            problems.append(f"the database of {node} is not what the log says: {_compared(content, final)}")
    for node, fingerprint in evidence.fingerprints.items():
        if fingerprint != final.fingerprint:
            problems.append(f"node {node} says of its replica that it is {fingerprint[:12]}, which it is not")
    problems += [f"a reader on {s.node} saw: {problem}" for s in evidence.samples for problem in s.problems]
    problems += _confirmed_losses(evidence.events, final)
    problems += _unreported_losses(evidence)
    for aside in evidence.aside:
        problems += _about_aside(evidence, aside)
    problems += _about_audit(evidence)
    return problems


def _compared(content: Content, final: Content) -> str:
    more, less = content.lost_to(final), final.lost_to(content)
    return f"{len(more)} rows more {more[:3]}, {len(less)} rows less {less[:3]}"


# --- losses


def _opened(events: Sequence[Event]) -> dict[int, int]:
    """The last row that each reign found when it began, by epoch."""
    found: dict[int, int] = {}
    for event in events:
        if event.kind == "opened":
            found.setdefault(event.epoch, int(event.data["number"]))
    return found


def _confirmed_losses(events: Sequence[Event], final: Content) -> list[str]:
    """A barrier confirms all rows that were there when it was asked for: its reign's, and earlier ones."""
    opened = _opened(events)
    confirmed: dict[int, int] = {}
    for event in events:
        if event.kind == "confirmed":
            confirmed[event.epoch] = max(confirmed.get(event.epoch, 0), int(event.data["number"]))
    problems: list[str] = []
    for epoch, last in sorted(confirmed.items()):
        own = range(opened[epoch] + 1, last + 1)
        lost = [n for n in own if final.rows.get(n, (0, ""))[0] != epoch]
        earlier = range(1, min(opened[epoch], last) + 1)
        lost += [n for n in earlier if not 0 < final.rows.get(n, (0, ""))[0] <= epoch]
        if lost:
            problems.append(f"G3: {len(lost)} rows that epoch {epoch} had confirmed are lost: {_some(lost)}")
    return problems


def _unreported_losses(evidence: Evidence) -> list[str]:
    """What was committed and is not there must be in a file that the node which wrote it has set aside."""
    final, kept = evidence.replayed.final, set[tuple[str, int, int]]()
    for aside in evidence.aside:
        kept.update((aside.node, epoch, number) for number, (epoch, _) in aside.content.rows.items())
    lost: dict[tuple[str, int], list[int]] = {}
    for event in evidence.events:
        if event.kind != "committed":
            continue
        number = int(event.data["number"])
        is_there = final.rows.get(number) == (event.epoch, event.node)
        if not is_there and (event.node, event.epoch, number) not in kept:
            lost.setdefault((event.node, event.epoch), []).append(number)
    return [
        f"G3: {len(numbers)} rows of {node}, epoch {epoch}, are lost and in no file: {_some(numbers)}"
        for (node, epoch), numbers in lost.items()
    ]


def _some(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} … {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


# --- what was reported


def lost_transactions(aside: SetAside, replayed: Replayed) -> int:
    """How many transactions *aside* has that the log lacks: rows, VACUUMs, and Litestream's own."""
    logged = replayed.at[aside.sequence]
    rows = len(aside.content.lost_to(logged))
    return rows + aside.content.vacuums - logged.vacuums + max(0, aside.content.captures - logged.captures)


def _about_aside(evidence: Evidence, aside: SetAside) -> list[str]:
    name = f"{aside.file} of {aside.node}"
    problems = [f"{name}: {problem}" for problem in aside.content.problems]
    if aside.content.problems:
        return problems
    if "diverged-log-" in aside.file:
        problems.append(f"{name}: the log has lost what it had acknowledged")
    lost = lost_transactions(aside, evidence.replayed)
    if (aside.exact and aside.transactions != lost) or aside.transactions > lost:
        what = "exactly" if aside.exact else "at least"
        problems.append(f"G3: {name} has {lost} transactions more, not {what} {aside.transactions}")
    closed = [s for s in evidence.replayed.seals if s.epoch == aside.epoch and s.kind is SealKind.CLOSE]
    if lost and closed:
        problems.append(f"G3: {name} has {lost} transactions more, but its epoch was closed in good order")
    said = [e for e in evidence.audit if e.details.get("file") == aside.file]
    expected = (str(aside.transactions), str(aside.exact).lower())
    if not aside.reported or not said:
        problems.append(f"G3: {name} was never reported")
    problems += [
        f"G3: the audit log says {entry.reason}, not {aside.transactions} (exact: {aside.exact})"
        for entry in said
        if (entry.details.get("transactions"), entry.details.get("exact")) != expected
    ]
    following = min((e.epoch for e in _promotions(evidence.audit) if e.epoch > aside.epoch), default=0)
    problems += [
        f"G3: the promotion of epoch {following} says that nothing is missing, but {name} has {lost} more"
        for entry in _promotions(evidence.audit)
        if lost and entry.epoch == following and entry.details.get("missing") == "nothing"
    ]
    return problems


def _promotions(audit: Sequence[AuditEntry]) -> list[AuditEntry]:
    return [entry for entry in audit if entry.action == "database-promoted"]


def _about_audit(evidence: Evidence) -> list[str]:
    """Each reign that wrote was promoted, in this order; and no file is reported that is not there."""
    promoted = {entry.epoch for entry in _promotions(evidence.audit)}
    problems = [
        f"the audit log has no promotion of epoch {epoch}"
        for epoch in _opened(evidence.events)
        if epoch not in promoted
    ]
    files = {aside.file for aside in evidence.aside}
    problems += [
        f"{entry.details.get('file')} was reported by {entry.node}, but is not there"
        for entry in evidence.audit
        if entry.action == "database-diverged" and entry.details.get("file") not in files
    ]
    return problems


# --- figures


class Figures(msgspec.Struct, frozen=True):
    """What the run was like. ``losses``: kind of kill → transactions that were lost by each.

    ``lag_ms``: how old the oldest row was that a replica did not have yet, for each look at one."""

    reigns: int
    committed: int
    confirmed: int
    failed_barriers: int
    failed_commits: int
    available: float
    longest_gap_seconds: float
    losses: dict[str, list[int]]
    lag_ms: list[float]
    actions: dict[str, int]


def figures(evidence: Evidence) -> Figures:
    """Sum *evidence* up."""
    counts: dict[str, int] = {}
    for event in evidence.events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    times = [event.at for event in evidence.events if event.kind == "committed"]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    away = sum(gap for gap in gaps if gap > GAP_SECONDS)
    actions: dict[str, int] = {}
    for entry in evidence.audit:
        if entry.action.startswith(("database-", "replica-", "capture-", "log-")):
            actions[entry.action] = actions.get(entry.action, 0) + 1
    return Figures(
        reigns=len(_opened(evidence.events)),
        committed=counts.get("committed", 0),
        confirmed=counts.get("confirmed", 0),
        failed_barriers=counts.get("sync-failed", 0),
        failed_commits=counts.get("commit-failed", 0),
        available=1 - away / (times[-1] - times[0]) if len(times) > 1 else 0.0,
        longest_gap_seconds=max(gaps, default=0.0),
        losses=_losses(evidence),
        lag_ms=_lags(evidence),
        actions=actions,
    )


def _losses(evidence: Evidence) -> dict[str, list[int]]:
    by_epoch: dict[int, int] = {}
    for aside in evidence.aside:
        if not aside.content.problems:
            lost = lost_transactions(aside, evidence.replayed)
            by_epoch[aside.epoch] = by_epoch.get(aside.epoch, 0) + lost
    found: dict[str, list[int]] = {}
    last = {each.epoch: each.kind for each in evidence.inflicted if each.epoch}  # what ended the reign
    for epoch, kind in last.items():
        found.setdefault(kind, []).append(by_epoch.get(epoch, 0))
    return found


def _lags(evidence: Evidence) -> list[float]:
    rows = evidence.replayed.final.rows
    committed = [
        (event.at, int(event.data["number"]))
        for event in evidence.events
        if event.kind == "committed" and rows.get(event.data["number"]) == (event.epoch, event.node)
    ]
    numbers = [number for _, number in committed]
    lags: list[float] = []
    for sample in evidence.samples:
        unseen = bisect_right(numbers, sample.number)
        at = committed[unseen][0] if unseen < len(committed) else sample.at
        lags.append(1000 * max(0.0, sample.at - at))
    return lags


def spread(values: Sequence[Any]) -> str:
    """Least, median and most."""
    if not values:
        return "none"
    return f"{min(values):g} / {statistics.median(values):g} / {max(values):g}"

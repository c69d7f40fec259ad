"""What the history of a run says about the promises of calls, events, locks, semaphores and rings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from phalanx.testing.history import Event

WINDOW_SECONDS = 0.5
"""Of availability: a window counts in which a call was answered."""


class Evidence(msgspec.Struct, frozen=True):
    """What is judged. ``events``: in order of time. ``dead``: key, epoch, number of the events that were
    given up. ``permits``: of each lock and semaphore."""

    events: Sequence[Event]
    dead: frozenset[tuple[str, int, int]]
    permits: Mapping[str, int]


class Figures(msgspec.Struct, frozen=True):
    """How much there was to judge."""

    seconds: float
    called: int
    answered: int
    failed: dict[str, int]
    touched: int
    available: float
    longest_gap_seconds: float
    reigns: int
    published: int
    handled: int
    dead: int
    grants: dict[str, int]
    lost: int


def judge(evidence: Evidence) -> list[str]:
    """Every promise that is broken; empty: none."""
    return [
        *_calls(evidence.events),
        *_leaders(evidence.events),
        *_callers(evidence.events),
        *_events(evidence),
        *_locks(evidence),
        *_ring(evidence.events),
    ]


def _of(events: Sequence[Event], *kinds: str) -> list[Event]:
    return [each for each in events if each.kind in kinds]


def _calls(events: Sequence[Event]) -> Iterator[str]:
    """A call that may not be repeated is carried out at most once; exactly once where it was answered; not at
    all where the caller was told that it was not begun. An answer's epoch is that under which it was carried
    out."""
    placed: dict[str, list[Event]] = defaultdict(list)
    for each in _of(events, "placed"):
        placed[each.data["id"]].append(each)
    done: dict[str, set[int]] = defaultdict(set)
    for each in _of(events, "placed", "looked", "touched"):
        done[each.data["id"]].add(each.epoch)
    for number, times in placed.items():
        if len(times) > 1:
            nodes = ", ".join(each.node for each in times)
            yield f"call {number} was carried out {len(times)} times, by {nodes}"
    for each in _of(events, "answered"):
        if each.epoch not in done[each.data["id"]]:
            yield f"call {each.data['id']} was answered under epoch {each.epoch}, not carried out under it"
    for each in _of(events, "failed"):
        if not each.data["started"] and done.get(each.data["id"]):
            yield f"call {each.data['id']} was carried out, but its caller was told that it was not begun"


def _leaders(events: Sequence[Event]) -> Iterator[str]:
    """No call is carried out by a deposed leader after its successor has carried one out."""
    highest, by = 0, ""
    for each in _of(events, "placed", "looked"):
        if each.epoch < highest:
            yield f"{each.node} carried a call out under epoch {each.epoch}, after {by} did under {highest}"
        elif each.epoch > highest:
            highest, by = each.epoch, each.node
        elif each.node != by:
            yield f"{each.node} and {by} carried calls out under epoch {highest}"


def _callers(events: Sequence[Event]) -> Iterator[str]:
    """Epochs never go back for a caller, who makes one call after the other."""
    seen: dict[str, int] = {}
    for each in _of(events, "answered"):
        if each.data["method"] == "touch":
            continue  # of many partitions, each with epochs of its own
        if each.epoch < seen.get(each.node, 0):
            yield f"caller {each.node} took an answer of epoch {each.epoch} after one of {seen[each.node]}"
        seen[each.node] = max(each.epoch, seen.get(each.node, 0))


def _events(evidence: Evidence) -> Iterator[str]:
    """What was acknowledged is handled, or among the dead letters; first handlings of a key come in order."""
    handled: dict[tuple[str, int, int], float] = {}
    newest: dict[str, tuple[int, int]] = {}
    for each in _of(evidence.events, "handled"):
        key, place = each.app, (each.epoch, each.data["number"])
        if (key, *place) in handled:
            continue  # again: at least once is what is promised
        handled[key, *place] = each.at
        if place < newest.get(key, (0, 0)):
            yield f"event {place} of key {key} was handled for the first time after {newest[key]}"
        newest[key] = max(place, newest.get(key, (0, 0)))
    for each in _of(evidence.events, "published"):
        event = (each.data["key"], each.epoch, each.data["number"])
        if event not in handled and event not in evidence.dead:
            yield f"event {event[1:]} of key {event[0]} was acknowledged, and neither handled nor given up"


class _Holding(msgspec.Struct):
    """One grant, from its first to its last sign of life."""

    who: str
    token: int
    begin: float
    end: float


def _locks(evidence: Evidence) -> Iterator[str]:
    """At no moment more holders than permits, by their own signs of life; tokens grow from grant to grant."""
    grants: dict[str, dict[int, _Holding]] = defaultdict(dict)
    for each in _of(evidence.events, "held", "holding"):
        known = grants[each.app].get(each.epoch)
        if known is None:
            grants[each.app][each.epoch] = _Holding(each.node, each.epoch, each.at, each.at)
        elif known.who != each.node:
            yield f"{each.app}: {known.who} and {each.node} have the token {each.epoch}"
        else:
            known.end = each.at
    for name, found in grants.items():
        permits = evidence.permits[name]
        now: list[_Holding] = []
        newest = 0
        for each in sorted(found.values(), key=lambda holding: holding.begin):
            now = [other for other in now if other.end >= each.begin]
            if len(now) >= permits:
                others = ", ".join(f"{other.who} (token {other.token})" for other in now)
                yield f"{name}: held by {each.who} (token {each.token}) beside {others}"
            if permits == 1 and each.token < newest:
                yield f"{name}: token {each.token} was granted after {newest}"
            newest = max(newest, each.token)
            now.append(each)


def _ring(events: Sequence[Event]) -> Iterator[str]:
    """No partition is answered for by two nodes under one epoch, nor by a former owner after a later one."""
    newest: dict[int, tuple[int, str]] = {}
    for each in _of(events, "touched"):
        partition = each.data["partition"]
        epoch, node = newest.get(partition, (0, ""))
        if each.epoch < epoch:
            yield f"partition {partition}: {each.node} answers under {each.epoch}, {node} did under {epoch}"
        elif each.epoch == epoch and each.node != node:
            yield f"partition {partition}: {each.node} and {node} answer under epoch {epoch}"
        else:
            newest[partition] = each.epoch, each.node


def figures(evidence: Evidence) -> Figures:
    """How much happened."""
    events = evidence.events
    called, answered = _of(events, "called"), _of(events, "answered")
    moments = [each.at for each in answered]
    first, last = (moments[0], moments[-1]) if moments else (0.0, 0.0)
    windows = {int((moment - first) / WINDOW_SECONDS) for moment in moments}
    orders = [each.at for each in answered if each.data["method"] != "touch"]
    grants = Counter(each.app for each in _of(events, "held"))
    return Figures(
        seconds=last - first,
        called=len(called),
        answered=len(answered),
        failed=dict(Counter(each.data["code"] for each in _of(events, "failed"))),
        touched=len(_of(events, "touched")),
        available=len(windows) / (int((last - first) / WINDOW_SECONDS) + 1) if moments else 0.0,
        longest_gap_seconds=max((b - a for a, b in pairwise(orders)), default=0.0),
        reigns=len({each.epoch for each in _of(events, "placed", "looked")}),
        published=len(_of(events, "published")),
        handled=len(_of(events, "handled")),
        dead=len(evidence.dead),
        grants=dict(grants),
        lost=len(_of(events, "lost")),
    )


__all__ = ["Evidence", "Figures", "figures", "judge"]

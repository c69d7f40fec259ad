"""Judges what clients were answered: did two ever answer, did an epoch go back, was a confirmed write lost?

The history's events, all on one clock:

``answer``
    Somebody answered a client: ``node``, ``epoch``, and in ``data`` the ``client``, the ``way`` it asked
    (``service``: as users do; ``host``: that host by its own address; ``write``), when it was ``sent``, when
    the program ``began`` and had the answer (``at``), the number of the ``last`` row then, or of the row
    written (``number``, ``id``) and whether that was ``confirmed``. The event's own time is when it was
    received.
``silence``
    Nobody answered a question of way ``service`` in time.
``majority``
    From now on exactly these ``clients`` have to be served, but for the time of a failover.
``waking``
    Node and keeper of ``node`` were stopped from ``frozen_at`` until now; with the ``program``, or without.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from phalanx.testing.history import Event

WAKING_SECONDS = 0.5
"""After the continuation of a host that was stopped: nobody can stop code that was stopped, and it may run
for some milliseconds before it is killed (docs/guarantees.md, G1)."""


class Verdict(msgspec.Struct, frozen=True):
    """``problems`` is empty when every promise was kept; the rest says what was seen."""

    problems: tuple[str, ...]
    answers: int
    reigns: int
    confirmed: int
    excused: int
    availability: float
    """The share of the questions of clients in the majority that were answered; 0 if there were none."""
    asked: int
    longest_silence_seconds: float
    """Of one client that was in the majority all the while."""


def judge(events: Sequence[Event], stored: Mapping[str, int]) -> Verdict:
    """Check everything. *stored*: id → number of every row that the database has at the end."""
    wakings = [event for event in events if event.kind == "waking"]
    answers = [event for event in events if event.kind == "answer"]
    counted = [event for event in answers if not any(_excuses(waking, event) for waking in wakings)]
    asked, answered, longest = _service(events)
    return Verdict(
        problems=(
            *_two_answering(counted),
            *_going_back(counted),
            *_lost(answers, stored),
            *_behind(answers, counted),
        ),
        answers=len(answers),
        reigns=len({event.epoch for event in answers}),
        confirmed=sum(1 for event in answers if event.data.get("confirmed")),
        excused=len(answers) - len(counted),
        availability=answered / asked if asked else 0.0,
        asked=asked,
        longest_silence_seconds=longest,
    )


def _excuses(waking: Event, answer: Event) -> bool:
    """Whether *answer* was within the documented window.

    A program whose node and keeper stand still is asked to end by nobody; its address is gone from the kernel
    by then, so that only those reach it who ask that very host.
    """
    if answer.node != waking.node or answer.data["at"] > waking.at + WAKING_SECONDS:
        return False
    reached = waking.data["program"] or answer.data["way"] == "host"
    return reached and answer.data["at"] >= waking.data["frozen_at"]


# --- two answering


def _two_answering(answers: Sequence[Event]) -> Iterator[str]:
    """An answer of an epoch after a later epoch has answered, by the moments at which they were given."""
    ordered = sorted(answers, key=lambda event: event.data["at"])
    latest = ordered[0] if ordered else None
    for event in ordered:
        assert latest is not None
        if event.epoch < latest.epoch:
            late_ms = 1000 * (event.data["at"] - latest.data["at"])
            yield (
                f"{_named(event)} answered {event.data['client']} ({event.data['way']}) at "
                f"{event.data['at']:.3f}, {late_ms:.0f} ms or more after {_named(latest)} had"
            )
        elif event.epoch == latest.epoch and event.node != latest.node:
            yield f"{_named(event)} and {_named(latest)} have answered under one epoch"
        else:
            latest = event


def _going_back(answers: Sequence[Event]) -> Iterator[str]:
    """A question that a client sent after it had received an answer must not be answered by an earlier epoch.

    By the client's own moments alone: whatever the program says of its own.
    """
    clients = {event.data["client"] for event in answers}
    for client in sorted(clients):
        own = [event for event in answers if event.data["client"] == client]
        received = sorted((event.at, event.epoch) for event in own)
        moments = [at for at, _ in received]
        highest: list[int] = []
        for _, epoch in received:
            highest.append(max(epoch, highest[-1] if highest else 0))
        for event in sorted(own, key=lambda event: event.data["sent"]):
            before = bisect_right(moments, event.data["sent"])
            if before and highest[before - 1] > event.epoch:
                yield (
                    f"{client} was answered by {_named(event)} what it asked at {event.data['sent']:.3f}, "
                    f"after epoch {highest[before - 1]} had answered it"
                )


def _named(event: Event) -> str:
    return f"{event.node} (epoch {event.epoch})"


# --- lost writes


def _lost(answers: Sequence[Event], stored: Mapping[str, int]) -> Iterator[str]:
    """Confirmed rows that the database does not have at the end."""
    for event in [event for event in answers if event.data.get("confirmed")]:
        name, number = event.data["id"], event.data["number"]
        if stored.get(name) != number:
            found = f"row {stored[name]}" if name in stored else "not there"
            yield f"row {number} ({name}), which {_named(event)} had confirmed, is lost: {found}"


def _behind(answers: Sequence[Event], counted: Sequence[Event]) -> Iterator[str]:
    """Those *counted* that were begun after a confirmation was received, and knew an earlier row only."""
    confirmed = sorted(
        (event for event in answers if event.data.get("confirmed")), key=lambda event: event.at
    )
    moments = [event.at for event in confirmed]
    highest: list[int] = []
    for event in confirmed:
        highest.append(max(int(event.data["number"]), highest[-1] if highest else 0))
    for event in counted:
        before = bisect_right(moments, event.data["began"])
        last = event.data.get("last")
        if last is not None and before and last < highest[before - 1]:
            yield (
                f"{_named(event)} answered at {event.data['at']:.3f} without row {highest[before - 1]}, "
                f"which was confirmed before: its last one is {last}"
            )


# --- availability


def _service(events: Sequence[Event]) -> tuple[int, int, float]:
    """Questions of clients in the majority, how many were answered, the longest time without an answer."""
    spans = _majorities(events)
    asked = answered = 0
    longest = 0.0
    for client, own in spans.items():
        service = [
            event
            for event in events
            if event.data.get("client") == client and event.data.get("way") == "service"
        ]
        for begin, end in own:
            inside = [event for event in service if begin <= event.data["sent"] and event.at <= end]
            good = sorted(event.at for event in inside if event.kind == "answer")
            asked += len(inside)
            answered += len(good)
            if inside:
                longest = max(longest, *(b - a for a, b in pairwise([begin, *good, end])))
    return asked, answered, longest


def _majorities(events: Sequence[Event]) -> dict[str, list[tuple[float, float]]]:
    """Client → when it was in the majority."""
    found: dict[str, list[tuple[float, float]]] = {}
    since: dict[str, float] = {}
    last = max((event.at for event in events), default=0.0)
    changes = [(event.at, set(event.data["clients"])) for event in events if event.kind == "majority"]
    for at, clients in [*sorted(changes, key=lambda change: change[0]), (last, set[str]())]:
        for client in set(since) - clients:
            found.setdefault(client, []).append((since.pop(client), at))
        for client in clients - set(since):
            since[client] = at
    return found

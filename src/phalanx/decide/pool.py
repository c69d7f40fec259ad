"""Which seat of a pool a node takes, and when it gives its own up.

A pool of n instances has the seats 0 to n-1, a pool of all as many as there are nodes. A node is active while
it owns a seat, and never owns more than one: so at most n are active. A seat is a key that is owned just as a
partition of a ring is (:mod:`phalanx.decide.ring_ownership`): taken by compare-and-set only where nobody has
it or its holder's session is over, given back only after everything under it has ended. What is decided here
is only who tries; two nodes that see different things may try for the same seat, and one is refused.

The spread: where several nodes could take a seat, each app prefers them in an order of its own, so that the
pools of one platform do not all land on the nodes that come first by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import msgspec

from phalanx.types import Candidate, SessionId

MAX_SEATS = 1024
"""More instances than that a pool never has."""

SETTLE_SECONDS = 0.5
"""A node that has just come leaves a seat for this long to those who are there, or come just then: else the
first one that is up would take the seats of every pool. (Not where there is a seat for each node.)"""

HEAD_START_SECONDS = 0.1
"""How much longer each further node waits for a seat than those that are preferred for it."""


class PoolScale(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operator's word how many instances are wanted; it goes before what the nodes declare. ``replicas``
    None: all. ``by``: who said so, at ``time`` (Unix seconds)."""

    replicas: int | None = None
    by: str = ""
    time: float = 0.0


class SeatView(msgspec.Struct, frozen=True):
    """What a node knows. Moments are on ``system.now()``'s clock.

    ``seats``: who holds each seat that was ever taken (None: it was given back). ``mine``: the seat that this
    node acts for, or that it is about to. ``replicas``: the number of seats (None: one for each node).
    ``not_before``: when it may take one. ``free_since``: since when what is free now has been so.
    """

    me: SessionId
    app: str
    seats: Mapping[int, SessionId | None]
    mine: int | None
    replicas: int | None
    candidates: tuple[Candidate, ...]
    eligible: bool
    paused: bool
    not_before: float
    joined_at: float
    free_since: float


class Take(msgspec.Struct, frozen=True):
    """Own that seat, or go on owning it."""

    seat: int


class Leave(msgspec.Struct, frozen=True):
    """Own none: give back what is owned, after it has ended. ``reason``: for one that is active."""

    reason: str = ""


class Wait(msgspec.Struct, frozen=True):
    """Own none as yet, and look again at that moment."""

    until: float


SeatAction: TypeAlias = Take | Leave | Wait


def next_seat(view: SeatView, now: float, is_over: Callable[[SessionId], bool]) -> SeatAction:
    """What this node should do about the seats of a pool."""
    if view.mine is not None:
        # Whatever it is fit for now: what ends an instance that is active is asked for where it is known.
        if view.paused or view.mine < _limit(view.replicas):
            return Take(view.mine)
        return Leave(f"the pool is scaled to {replicas_text(view.replicas)}")
    if view.paused or not view.eligible:
        return Leave()
    taken = {seat: who for seat, who in view.seats.items() if who is not None and not is_over(who)}
    rivals = ranked(view.app, _without_a_seat(view, taken, is_over))
    free = _free(view, taken, len(rivals))
    if not free:
        return Leave()
    rank = rivals.index(view.me.node)
    start = view.not_before
    if len(free) < len(rivals):
        start = max(start, view.joined_at + SETTLE_SECONDS)
    if rank >= len(free):
        # Those that are preferred have not taken it: perhaps they only look fit.
        start = max(start, view.free_since + (rank - len(free) + 1) * HEAD_START_SECONDS)
    return Take(free[rank % len(free)]) if now >= start else Wait(start)


def _limit(replicas: int | None) -> int:
    return MAX_SEATS if replicas is None else min(replicas, MAX_SEATS)


def _without_a_seat(
    view: SeatView, taken: Mapping[int, SessionId], is_over: Callable[[SessionId], bool]
) -> set[str]:
    """The nodes that could take a seat now, this one among them."""
    seated = set(taken.values())
    fit = {c.session for c in view.candidates if c.eligible and not is_over(c.session)}
    return {session.node for session in fit - seated} | {view.me.node}


def _free(view: SeatView, taken: Mapping[int, SessionId], wanted: int) -> list[int]:
    """The first seats that can be taken, at most *wanted*."""
    found: list[int] = []
    for seat in range(_limit(view.replicas)):
        if len(found) >= wanted:
            break
        if seat not in taken:
            found.append(seat)
    return found


def ranked(app: str, nodes: Iterable[str]) -> list[str]:
    """*nodes* in the order in which *app* prefers them: for each app another one, and always the same."""
    return sorted(nodes, key=lambda node: hashlib.sha256(f"{app}\0{node}".encode()).digest())


def replicas_text(replicas: int | None) -> str:
    """In words."""
    return "all" if replicas is None else str(replicas)


__all__ = [
    "HEAD_START_SECONDS",
    "MAX_SEATS",
    "SETTLE_SECONDS",
    "Leave",
    "PoolScale",
    "SeatAction",
    "SeatView",
    "Take",
    "Wait",
    "next_seat",
    "ranked",
    "replicas_text",
]

"""Which seat of a pool a node takes, and when it gives its own up."""

from __future__ import annotations

from typing import Any

import msgspec

from phalanx.config.patterns import MAX_REPLICAS
from phalanx.decide.pool import (
    HEAD_START_SECONDS,
    MAX_SEATS,
    SETTLE_SECONDS,
    Leave,
    SeatView,
    Take,
    Wait,
    next_seat,
    ranked,
)
from phalanx.types import Candidate, SessionId

A, B, C, D = (SessionId(node, "1") for node in "abcd")


def view(me: SessionId, **changed: Any) -> SeatView:
    """What *me* knows of a pool of two on four nodes, all fit, long after everybody came."""
    fit = tuple(Candidate(session, True) for session in (A, B, C, D))
    return msgspec.structs.replace(
        SeatView(me, "workers", {}, None, 2, fit, True, False, float("-inf"), -100.0, -100.0), **changed
    )


def act(seen: SeatView, now: float = 0.0, *, over: tuple[SessionId, ...] = ()) -> Take | Leave | Wait:
    """What it does at *now*, when the sessions *over* are known to be."""
    return next_seat(seen, now, lambda session: session in over)


def test_those_preferred_take_the_free_seats_and_the_others_wait_a_moment_each() -> None:
    """Nobody tries for the same seat as another, as long as all see the same."""
    order = [SessionId(node, "1") for node in ranked("workers", "abcd")]
    assert [act(view(me, free_since=0.0)) for me in order] == [
        Take(0),
        Take(1),
        Wait(HEAD_START_SECONDS),
        Wait(2 * HEAD_START_SECONDS),
    ]
    assert act(view(order[3], free_since=0.0), 1.0) == Take(1)


def test_each_app_prefers_nodes_in_an_order_of_its_own() -> None:
    """Ten pools of one instance on three nodes do not all land on the same one."""
    assert len({ranked(f"app-{number}", "abc")[0] for number in range(10)}) == 3
    assert ranked("workers", "abc") == ranked("workers", "cba")


def test_seat_is_taken_only_where_nobody_holds_it_or_its_holder_is_over() -> None:
    """A node that is alive keeps its seat, a dead one's is taken at once by one that has none."""
    seats = {0: A, 1: B}
    assert act(view(C, seats=seats)) == Leave()
    first = next(SessionId(node, "1") for node in ranked("workers", "abcd") if node in "cd")
    assert act(view(first, seats=seats, free_since=0.0), over=(B,)) == Take(1)


def test_node_with_a_seat_keeps_it_whatever_comes_and_takes_no_second_one() -> None:
    """Nothing moves because a node comes, or because this one is fit no more: that is for its app to say."""
    assert act(view(A, seats={1: A}, mine=1, eligible=False, not_before=50.0)) == Take(1)


def test_seat_beyond_the_number_wanted_is_given_back() -> None:
    """Scaled down; but not while the app is paused."""
    seen = view(A, seats={0: B, 1: A}, mine=1, replicas=1)
    assert act(seen) == Leave("the pool is scaled to 1")
    assert act(msgspec.structs.replace(seen, paused=True)) == Take(1)


def test_pool_of_all_has_a_seat_for_every_node_at_once() -> None:
    """Also for one that has just come: it takes nobody's place."""
    taken: set[int] = set()
    for me in (A, B, C, D):
        found = act(view(me, replicas=None, joined_at=0.0, free_since=0.0))
        assert isinstance(found, Take)
        taken.add(found.seat)
    assert taken == {0, 1, 2, 3}
    assert act(view(C, seats={0: A, 1: B, 2: D}, mine=None, replicas=None)) == Take(3)


def test_node_that_has_just_come_leaves_a_seat_to_those_who_are_there() -> None:
    """The first node that is up does not take the seats of every pool."""
    first = SessionId(ranked("workers", "abcd")[0], "1")
    seen = view(first, joined_at=0.0)
    assert act(seen, 0.1) == Wait(SETTLE_SECONDS)
    assert act(seen, SETTLE_SECONDS) == Take(0)


def test_node_that_is_not_fit_paused_or_stepping_aside_takes_none() -> None:
    """The first two until something changes, the last until its time has come."""
    assert act(view(A, eligible=False)) == Leave()
    assert act(view(A, paused=True)) == Leave()
    assert act(view(A, replicas=4, not_before=3.0), 1.0) == Wait(3.0)


def test_more_seats_than_nodes_leave_seats_empty() -> None:
    """Two fit nodes of a pool of eight: both are active, nobody waits."""
    fit = (Candidate(A, True), Candidate(B, True), Candidate(C, False))
    assert {act(view(me, replicas=8, candidates=fit)) for me in (A, B)} == {Take(0), Take(1)}


def test_scaled_to_nothing_nobody_is_active() -> None:
    """Zero is a number as good as any other."""
    assert act(view(A, replicas=0)) == Leave()
    assert act(view(A, seats={0: A}, mine=0, replicas=0)) == Leave("the pool is scaled to 0")


def test_declared_are_at_most_as_many_as_there_are_seats() -> None:
    """Two layers that cannot import each other say the same."""
    assert MAX_REPLICAS == MAX_SEATS

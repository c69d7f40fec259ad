"""When a ring is planned anew, and by whom."""

from __future__ import annotations

from phalanx.decide.ring_plan import (
    LONGEST_SETTLE_SECONDS,
    RANK_STEP_SECONDS,
    SETTLE_SECONDS,
    Planner,
    Propose,
    RingMember,
    RingPlan,
    Wait,
    wanted,
)
from phalanx.types import SessionId

A, B, C = (SessionId(node, "1") for node in "abc")


def planned(**weights: int) -> RingPlan:
    """A plan of six partitions that go round these nodes."""
    nodes = sorted(weights)
    return RingPlan.of(tuple(nodes[n % len(nodes)] for n in range(6)), weights, nodes[0])


def planner(node: str = "a", plan: RingPlan | None = None, **members: int) -> Planner:
    """One that has known plan (revision 5) and members since 100."""
    made = Planner(node, 6)
    if plan is not None:
        made.on_plan(5, plan, 100.0)
    made.on_members(members, 100.0)
    return made


def test_members_that_are_over_or_not_ready_are_not_wanted() -> None:
    """What can be planned in, with its weight; also one of weight 0, which is to be emptied."""
    members = {"c": RingMember(C, 0), "a": RingMember(A, 3), "b": RingMember(B), "d": RingMember(A, 1, False)}
    assert wanted(members, lambda session: session == B) == {"a": 3, "c": 0}


def test_first_plan_waits_until_members_have_settled() -> None:
    """The key is created (revision 0) once nothing has changed for a while."""
    made = planner(a=1)
    assert made.next_action(100.0) == Wait(100.0 + SETTLE_SECONDS)
    made.on_members({"a": 1, "b": 1}, 100.3)
    assert made.next_action(100.6) == Wait(100.3 + SETTLE_SECONDS)
    assert made.next_action(100.3 + SETTLE_SECONDS) == Propose(planned(a=1, b=1), 0)


def test_members_that_keep_coming_are_planned_in_all_the_same() -> None:
    """Nobody waits longer than the longest settling, however often something changes."""
    made = planner(a=1)
    for tenth in range(1, 100):
        made.on_members({f"n{n}": 1 for n in range(tenth)} | {"a": 1}, 100.0 + tenth / 10)
    assert made.next_action(100.0 + LONGEST_SETTLE_SECONDS - 0.01) == Wait(100.0 + LONGEST_SETTLE_SECONDS)
    assert isinstance(made.next_action(100.0 + LONGEST_SETTLE_SECONDS), Propose)


def test_member_that_is_lost_is_planned_out_at_once_and_newcomers_wait() -> None:
    """A crash is no reason to move what a newcomer will get; only what has lost its owner moves."""
    made = planner(plan=planned(a=1, b=1), a=1, b=1, c=1)
    made.on_members({"a": 1, "c": 1}, 101.0)
    action = made.next_action(101.0)
    assert isinstance(action, Propose)
    assert action.expected_revision == 5
    assert action.plan.owner_names() == ("a",) * 6
    made.on_plan(6, action.plan, 101.0)
    assert made.next_action(101.0) == Wait(101.0 + SETTLE_SECONDS)


def test_lost_last_member_is_replaced_by_newcomers_at_once() -> None:
    """Where nobody of the plan is left there is nothing to wait for."""
    made = planner("c", planned(a=1), a=1)
    made.on_members({"c": 1}, 101.0)
    action = made.next_action(101.0)
    assert isinstance(action, Propose)
    assert set(action.plan.owner_names()) == {"c"}


def test_other_nodes_wait_for_the_first_one() -> None:
    """By name, a little longer each; one that is no member waits longest."""
    for node, rank in (("a", 0), ("b", 1), ("d", 3)):
        made = planner(node, planned(a=1, b=1, c=1, x=1), a=1, b=1, c=1, x=1)
        made.on_members({"a": 1, "b": 1, "c": 1}, 101.0)
        if rank:
            assert made.next_action(101.0) == Wait(101.0 + rank * RANK_STEP_SECONDS)
        assert isinstance(made.next_action(101.0 + rank * RANK_STEP_SECONDS), Propose)


def test_plan_that_fits_is_left_alone() -> None:
    """Also when it comes from another node, and when a change is taken back before it was planned."""
    made = planner(plan=planned(a=1, b=1), a=1, b=1)
    assert made.next_action(200.0) is None
    made.on_members({"a": 2, "b": 1}, 201.0)
    assert made.next_action(201.0) == Wait(201.0 + SETTLE_SECONDS)
    made.on_members({"a": 1, "b": 1}, 201.1)
    assert made.next_action(300.0) is None


def test_nothing_is_planned_where_nobody_can_own_anything() -> None:
    """The plan stays: it says what was where."""
    made = planner(plan=planned(a=1, b=1), a=0, b=0)
    assert made.next_action(200.0) is None
    made.on_members({}, 201.0)
    assert made.next_action(300.0) is None


def test_older_plan_is_ignored_unless_the_leader_of_the_stream_has_it() -> None:
    """A late message does not turn back what is known; servers that have lost writes do."""
    made = planner(plan=planned(a=1, b=1), a=1, b=1)
    made.on_plan(4, planned(b=1), 101.0)
    assert made.plan == planned(a=1, b=1)
    made.on_plan(4, planned(b=1), 101.0, force=True)
    assert (made.plan, made.revision) == (planned(b=1), 4)

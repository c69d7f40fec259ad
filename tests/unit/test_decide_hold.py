"""Promises that outlive a session: who gives them, how far they reach, and who may follow nevertheless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from phalanx.decide.election import Acquire, Deposed, Idle, View, Wait, next_action
from phalanx.decide.hold import (
    ALWAYS,
    NEVER,
    Ask,
    Claim,
    Member,
    MemberList,
    Takeover,
    asks_now,
    hands_over,
    wanted,
)
from phalanx.decide.switchover import MAX_SPOOL_BYTES
from phalanx.decide.timing import Timing
from phalanx.types import LeaderRecord, SessionId

TIMING = Timing.of(2.0)  # a promise: 1.9 s for who has it, 2.1 s for who gives it
LEADER, OTHER = SessionId("n1", "a"), SessionId("n2", "b")
HELD = LeaderRecord(5, LEADER, hold=True)
LIST = MemberList({"n1": "h1:1", "n2": "h2:1", "n3": "h3:1"}, 2.0)


def ask(number: int = 1, *, epoch: int = 5, lease: float = 2.0) -> Ask:
    """A question of n1."""
    return Ask("wiki", epoch, LEADER, number, lease)


def claim(revision: int = 7) -> Claim:
    """That of n1, which has read the list."""
    made = Claim(TIMING, "n1")
    made.on_list(revision, LIST)
    return made


def follows(member: Member, leader: LeaderRecord = HELD, *, gone: bool = False) -> Takeover:
    """What n2 has to keep to."""
    return member.takeover("n2", "wiki", leader, LIST, 7, gone=gone)


# --- who promises


def test_promise_binds_its_giver_for_its_lease_and_five_percent() -> None:
    """From the moment of its answer."""
    member = Member(TIMING, 0.0)
    assert member.answer(ask(), seen=5, leads=False, now=100.0) == ""
    assert member.bound_until("wiki") == pytest.approx(102.1)
    assert member.bound_until("blog") == NEVER
    assert follows(member).not_before == pytest.approx(102.1)


def test_question_whether_it_would_promise_binds_nobody() -> None:
    """A lease of nothing."""
    member = Member(TIMING, 0.0)
    assert member.answer(ask(lease=0.0), seen=5, leads=False, now=100.0) == ""
    assert member.bound_until("wiki") == NEVER


@pytest.mark.parametrize(
    ("seen", "leads", "refusal"),
    [(6, False, "the leader key is at epoch 6"), (5, True, "it is active here")],
)
def test_who_sees_somebody_else_active_promises_nothing(seen: int, leads: bool, refusal: str) -> None:
    """And is bound by nothing then."""
    member = Member(TIMING, 0.0)
    assert member.answer(ask(), seen=seen, leads=leads, now=100.0) == refusal
    assert member.bound_until("wiki") == NEVER


def test_who_knows_of_an_older_reign_only_promises() -> None:
    """It may have lost NATS before: it sees nobody else."""
    assert Member(TIMING, 0.0).answer(ask(), seen=3, leads=False, now=100.0) == ""


def test_who_has_tried_to_take_over_promises_nothing_for_that_epoch() -> None:
    """Its takeover may be stored still; for a later epoch it promises."""
    member = Member(TIMING, 0.0)
    member.attempt("wiki", 5)
    assert member.answer(ask(), seen=5, leads=False, now=100.0) == "this node has tried to take it over"
    assert member.answer(ask(2, epoch=6), seen=6, leads=False, now=100.0) == ""


def test_question_that_comes_twice_or_late_is_not_answered() -> None:
    """A repeated packet binds nobody longer."""
    member = Member(TIMING, 0.0)
    assert member.answer(ask(2), seen=5, leads=False, now=100.0) == ""
    assert member.answer(ask(2), seen=5, leads=False, now=101.0) == "it was asked before"
    assert member.answer(ask(1), seen=5, leads=False, now=101.0) == "it was asked before"
    assert member.bound_until("wiki") == pytest.approx(102.1)


# --- who follows


@pytest.mark.parametrize("older", [LeaderRecord(0), LeaderRecord(4), LeaderRecord(3, OTHER)])
def test_g1_promise_holds_though_the_servers_have_lost_the_key_of_that_reign(older: LeaderRecord) -> None:
    """Released as the key may be now, or of somebody else: who was promised to knows nothing of that."""
    member = Member(TIMING, 0.0)
    member.answer(ask(), seen=5, leads=False, now=100.0)
    takeover = follows(member, older, gone=older.session is None)
    assert takeover.not_before == pytest.approx(102.1)
    view = View(OTHER, True, True, older, True, 0.0, takeover=takeover)
    if older.session is None:
        assert next_action(view, 100.5, lambda s: True) == Wait(takeover.not_before)
    assert follows(member, LeaderRecord(6), gone=True).not_before == NEVER


def test_node_that_has_started_follows_nobody_for_the_longest_lease() -> None:
    """It may have promised in an earlier life: 1.05 times what the list says, or the TTL."""
    found = follows(Member(TIMING, 100.0))
    assert (found.not_before, found.members) == (pytest.approx(102.1), 7)
    longer = MemberList(LIST.nodes, 10.0)
    found = Member(TIMING, 100.0).takeover("n2", "wiki", HELD, longer, 7, gone=False)
    assert found.not_before == pytest.approx(110.5)


def test_who_is_not_listed_does_not_follow_a_session_that_is_over() -> None:
    """Whoever leads must have asked it first."""
    found = Member(TIMING, 0.0).takeover("n4", "wiki", HELD, LIST, 7, gone=False)
    assert found.not_before == ALWAYS


def test_without_a_list_everybody_follows_while_there_is_none() -> None:
    """No leader can hold before it has one."""
    assert Member(TIMING, 0.0).takeover("n4", "wiki", HELD, None, 0, gone=False) == Takeover(2.1, 0)


def test_reign_that_does_not_hold_or_has_ended_itself_is_open_to_all() -> None:
    """A crash whose keeper has seen the end of everything costs no lease."""
    member = Member(TIMING, 100.0)
    member.answer(ask(), seen=5, leads=False, now=100.0)
    assert follows(member, gone=True) == Takeover()
    assert follows(member, LeaderRecord(5, LEADER)) == Takeover()


def view(takeover: Takeover, leader: LeaderRecord = HELD) -> View:
    """What n2 knows: n1's session is over since 10.0."""
    return View(
        me=OTHER,
        session_valid=True,
        eligible=True,
        leader=leader,
        leader_over=True,
        vacant_since=10.0,
        takeover=takeover,
    )


def is_over(session: SessionId) -> bool:
    """Only the leader's."""
    return session == LEADER


def test_takeover_waits_for_what_was_promised_and_depends_on_the_list() -> None:
    """Not before; and never by who is not listed."""
    assert next_action(view(Takeover(12.0, 7)), 11.0, is_over) == Wait(12.0)
    assert next_action(view(Takeover(12.0, 7)), 12.0, is_over) == Acquire(5, 7)
    assert next_action(view(Takeover(ALWAYS)), 1e9, is_over) == Idle()


def test_key_that_was_released_is_open_to_who_has_promised() -> None:
    """The reign that was promised to has ended."""
    released, member = LeaderRecord(6), Member(TIMING, 0.0)
    assert member.answer(ask(), seen=5, leads=False, now=10.9) == ""
    takeover = follows(member, released, gone=True)
    assert next_action(view(takeover, released), 11.0, is_over) == Acquire(6)


def test_reign_outlives_its_session_only_while_it_is_held() -> None:
    """A leader without session and promises is deposed."""
    leads = replace(view(Takeover()), me=LEADER, leading=5, session_valid=False)
    assert next_action(replace(leads, held=True), 11.0, is_over) == Idle()
    assert isinstance(next_action(leads, 11.0, is_over), Deposed)


# --- whose promises are needed, and how far they reach


def test_promises_reach_as_far_as_the_oldest_one_counted_from_its_question() -> None:
    """All but the leader itself have to promise."""
    mine = claim()
    assert sorted(mine.asked) == ["n2", "n3"]
    mine.on_promise("n2", 100.0, 100.5, 101.0)
    assert mine.until(100.5) == NEVER
    assert mine.missing(100.5) == ["n3"]
    mine.on_promise("n3", 100.2, 100.6, 101.0)
    assert mine.until(100.6) == pytest.approx(101.9)
    assert mine.right_until(100.6, 101.0) == pytest.approx(101.9)


def test_nothing_is_claimed_before_the_list_was_read_or_while_there_is_none() -> None:
    """Then nobody knows who could follow."""
    unread, without = Claim(TIMING, "n1"), Claim(TIMING, "n1")
    without.on_list(0, None)
    assert (unread.until(100.0), without.until(100.0)) == (NEVER, NEVER)


def test_leader_that_is_listed_alone_goes_on() -> None:
    """Nobody else may follow."""
    alone = Claim(TIMING, "n1")
    alone.on_list(7, MemberList({"n1": "h1:1"}, 2.0))
    assert alone.until(100.0) == pytest.approx(101.9)


def test_who_is_to_be_added_has_to_promise_from_before_that_is_sent() -> None:
    """Until a list of a later revision shows that it never will be stored."""
    mine = claim(7)
    more = wanted(LIST, [("n4", "h4:1"), ("n5", "")], 2.0)
    assert sorted(more.nodes) == ["n1", "n2", "n3", "n4", "n5"]
    assert mine.sends(more) == 7
    mine.on_list(7, LIST)  # read back: it may come still
    assert "n4" in mine.asked
    mine.on_list(9, LIST)  # somebody has written since: it can't any more
    assert "n4" not in mine.asked


def test_g1_nothing_is_held_while_a_candidate_does_not_hold() -> None:
    """Of an older version, or declared otherwise: it promises nothing and may follow, so it is needed."""
    mine = claim()
    mine.sends(wanted(LIST, [("n4", "")], 2.0))
    for node in ("n2", "n3"):
        mine.on_promise(node, 100.0, 100.1, 101.0)
    assert mine.missing(100.1) == ["n4"]
    assert mine.right_until(100.1, 101.0) == 101.0


def test_right_that_has_lapsed_never_comes_back() -> None:
    """Whatever promises arrive then: who gave them may have been bound by nothing before."""
    mine = claim()
    for node in ("n2", "n3"):
        mine.on_promise(node, 100.0, 100.1, 99.0)
    assert mine.right_until(101.0, 99.0) == NEVER  # it had no promises at 100.1, and no session
    fresh = claim()
    for node in ("n2", "n3"):
        fresh.on_promise(node, 100.0, 100.1, 101.0)
    assert fresh.right_until(101.8, 101.0) == pytest.approx(101.9)
    fresh.on_promise("n2", 101.0, 102.0, 101.0)
    fresh.on_promise("n3", 101.0, 102.0, 101.0)
    assert fresh.right_until(102.0, 101.0) == NEVER


def test_leader_asks_once_a_renewal_is_overdue() -> None:
    """Not while NATS is well: then promises would only hold up a failover."""
    assert not asks_now(100.0, 101.9 - 0.2, TIMING)
    assert asks_now(100.0, 101.9 - 0.31, TIMING)


def test_reign_without_a_session_ends_when_somebody_can_follow_it() -> None:
    """Or when NATS is back for two TTLs and nobody has come."""
    assert hands_over(100.0, 99.9, TIMING, has_successor=True)
    assert not hands_over(103.9, 100.0, TIMING, has_successor=False)
    assert hands_over(104.1, 100.0, TIMING, has_successor=False)


def test_reign_without_a_session_ships_its_database_before_it_is_handed_over() -> None:
    """All of the time without NATS waits for the log: more than a hand-over has time for."""
    for since in (99.9, 10.0):
        assert not hands_over(100.0, since, TIMING, has_successor=True, spool_bytes=MAX_SPOOL_BYTES + 1)
        assert hands_over(100.0, since, TIMING, has_successor=True, spool_bytes=MAX_SPOOL_BYTES)


@given(
    rate_of_leader=st.floats(0.95, 1.05),
    rate_of_member=st.floats(0.95, 1.05),
    there=st.floats(0.0, 3.0),
    back=st.floats(0.0, 3.0),
    ttl=st.floats(1.0, 300.0),
)
def test_g1_leader_stops_before_the_giver_of_a_promise_follows(
    rate_of_leader: float, rate_of_member: float, there: float, back: float, ttl: float
) -> None:
    """With clocks that are up to 5 % wrong, and messages as slow as may be; also after the giver's
    restart."""
    timing = Timing.of(ttl)
    mine = Claim(timing, "n1")
    mine.on_list(7, MemberList({"n1": "", "n2": ""}, ttl))
    asked, received = 50.0, 50.0 + there
    member = Member(timing, 0.0)
    member.answer(ask(lease=ttl), seen=5, leads=False, now=received * rate_of_member)
    known = (received + back) * rate_of_leader
    mine.on_promise("n2", asked * rate_of_leader, known, known + 1e-6)
    stops = mine.until(known) / rate_of_leader
    assert follows(member).not_before / rate_of_member >= stops - 1e-9
    restarted = Member(timing, received * rate_of_member)
    assert follows(restarted).not_before / rate_of_member >= stops - 1e-9


@pytest.mark.parametrize("revision", [7, 9])
def test_g1_nothing_is_claimed_once_the_list_has_vanished(revision: int) -> None:
    """Whoever finds none may follow, so nobody's promise is enough."""
    mine = Claim(Timing.of(2.0), "n1")
    mine.on_list(7, LIST)
    mine.on_list(revision, None)
    assert not mine.is_known
    assert mine.until(100.0) == NEVER

"""Who takes the leader key, when, and who is named as successor."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from phalanx.decide.election import (
    HEAD_START_SECONDS,
    RANK_STEP_SECONDS,
    Acquire,
    Action,
    Begin,
    Deposed,
    Idle,
    View,
    Wait,
    begins_anew,
    choose_successor,
    next_action,
    rank,
)
from phalanx.types import Candidate, LeaderRecord, Nomination, SessionId

ME, A, Z = SessionId("n1", "x"), SessionId("a", "1"), SessionId("z", "1")
OFFERS = (Candidate(ME, True), Candidate(A, True), Candidate(Z, True))


def nobody_over(_session: SessionId) -> bool:
    """Every session lives."""
    return False


def act(leader: LeaderRecord, now: float = 100.0, **changes: Any) -> Action:
    """The next action of an eligible node with a valid session, vacancy known since 100."""
    view: dict[str, Any] = {
        "session_valid": True,
        "eligible": True,
        "leader_over": False,
        "vacant_since": 100.0,
    }
    return next_action(View(me=ME, leader=leader, **{**view, **changes}), now, nobody_over)


def test_a_free_key_is_taken_at_its_revision() -> None:
    """Never written (0), released, or its holder's session over: replaced by compare-and-set."""
    assert act(LeaderRecord(0)) == Acquire(0)
    assert act(LeaderRecord(7)) == Acquire(7)
    assert act(LeaderRecord(7, A), leader_over=True) == Acquire(7)


@pytest.mark.parametrize(
    ("leader", "changes"),
    [
        (LeaderRecord(7, A), {}),
        (LeaderRecord(7), {"eligible": False}),
        (LeaderRecord(7), {"session_valid": False}),
        (LeaderRecord(7, ME), {"session_valid": False}),
        (LeaderRecord(7, ME), {"leading": 7}),
    ],
)
def test_nothing_is_done(leader: LeaderRecord, changes: dict[str, Any]) -> None:
    """While another one holds it, without eligibility or session, or when all is as it should be."""
    assert act(leader, **changes) == Idle()


def test_a_write_whose_answer_was_lost_is_taken_up() -> None:
    """The watch shows that the key names this very session."""
    assert act(LeaderRecord(9, ME)) == Begin(9)


@pytest.mark.parametrize(
    ("leader", "valid"),
    [
        (LeaderRecord(7, ME), False),
        (LeaderRecord(8, A), True),
        (LeaderRecord(8, ME), True),
        (LeaderRecord(8), True),
    ],
)
def test_a_leader_whose_key_or_session_is_gone_is_deposed(leader: LeaderRecord, valid: bool) -> None:
    """Another holder, another epoch, a release that it did not make, an invalid session."""
    assert isinstance(act(leader, leading=7, session_valid=valid), Deposed)


@pytest.mark.parametrize(
    ("highest", "taken_up", "adopted", "anew"),
    [(0, False, 0, False), (7, False, 0, True), (0, True, 7, False), (0, True, 0, True), (0, True, 5, True)],
)
def test_g2_key_of_this_session_is_taken_again_unless_what_runs_is_of_its_epoch(
    highest: int, taken_up: bool, adopted: int, anew: bool
) -> None:
    """A session that was taken up acts under its old epoch only for what an earlier life left running."""
    assert begins_anew(7, highest=highest, is_taken_up=taken_up, adopted=adopted) is anew


def test_the_less_preferred_wait_longer() -> None:
    """By priority, then by name; whoever is over or not eligible does not count."""
    assert rank(ME, OFFERS, nobody_over) == 1
    assert rank(ME, OFFERS, lambda s: s == A) == 0
    assert rank(ME, (Candidate(ME, True, 5), Candidate(A, True, 9), Candidate(Z, True, 9)), nobody_over) == 2
    assert act(LeaderRecord(7), candidates=OFFERS) == Wait(100.0 + RANK_STEP_SECONDS)
    assert act(LeaderRecord(7), 100.0 + RANK_STEP_SECONDS, candidates=OFFERS) == Acquire(7)


def test_a_named_successor_goes_first_and_the_others_give_it_a_head_start() -> None:
    """The name is no right: they try too, a little later."""
    assert act(LeaderRecord(7, None, "n1"), candidates=OFFERS) == Acquire(7)
    later = 100.0 + (RANK_STEP_SECONDS + HEAD_START_SECONDS)
    assert act(LeaderRecord(7, None, "z"), candidates=OFFERS) == Wait(later)


def test_a_node_with_less_of_the_data_lets_others_go_first() -> None:
    """Even when it is named; the wait is only a preference."""
    assert act(LeaderRecord(7, None, "n1"), handicap_seconds=0.5) == Wait(100.5)


def test_a_node_that_steps_aside_waits_until_its_time() -> None:
    """After failures of its own, even when it is named."""
    assert act(LeaderRecord(7, None, "n1"), not_before=130.0) == Wait(130.0)


def test_the_successor_is_the_best_live_other() -> None:
    """Highest priority, then name; never oneself, the dead or the ineligible."""
    assert choose_successor(ME, OFFERS, nobody_over) == "a"
    assert choose_successor(ME, OFFERS, lambda s: s == A) == "z"
    assert choose_successor(ME, (*OFFERS[:2], Candidate(Z, True, 1)), nobody_over) == "z"
    assert choose_successor(ME, (Candidate(ME, True), Candidate(A, False)), nobody_over) is None


def test_a_node_without_failover_leads_only_if_it_is_named() -> None:
    """It leaves a free key alone; named by the last leader or by an operator it takes it."""
    assert act(LeaderRecord(7), no_failover=True) == Idle()
    assert act(LeaderRecord(7, A), leader_over=True, no_failover=True) == Idle()
    assert act(LeaderRecord(7, None, "z"), no_failover=True) == Idle()
    assert act(LeaderRecord(7, None, "n1"), no_failover=True) == Acquire(7)
    nominated = Nomination(7, "n1")
    assert act(LeaderRecord(7, A), leader_over=True, no_failover=True, nomination=nominated) == Acquire(7)
    assert act(LeaderRecord(9, ME), no_failover=True) == Begin(9)


def test_a_node_without_failover_is_neither_chosen_nor_waited_for() -> None:
    """However high its priority."""
    offers = (*OFFERS, Candidate(SessionId("b", "1"), True, 9, no_failover=True))
    assert choose_successor(ME, offers, nobody_over) == "a"
    assert rank(ME, offers, nobody_over) == 1
    assert choose_successor(ME, offers[3:], nobody_over) is None


def test_an_operators_nominee_follows_the_reign_that_was_named_and_no_other() -> None:
    """It goes before the last leader's own choice, also where that one's session has just ended."""
    mine, other = Nomination(7, "n1"), Nomination(7, "z")
    assert act(LeaderRecord(7, None, "z"), candidates=OFFERS, nomination=mine) == Acquire(7)
    assert act(LeaderRecord(7, A), leader_over=True, candidates=OFFERS, nomination=mine) == Acquire(7)
    late = 100.0 + RANK_STEP_SECONDS
    assert act(LeaderRecord(7, A), leader_over=True, candidates=OFFERS, nomination=other) == Wait(
        late + HEAD_START_SECONDS
    )
    assert act(LeaderRecord(8, A), leader_over=True, candidates=OFFERS, nomination=mine) == Wait(late)
    assert act(LeaderRecord(7, A), nomination=mine) == Idle()


def test_an_offer_as_older_versions_write_it_is_understood() -> None:
    """Without the field that came later."""
    old = b'{"session": {"node": "n2", "nonce": "x"}, "eligible": true, "priority": 3, "reason": ""}'
    assert msgspec.json.decode(old, type=Candidate) == Candidate(SessionId("n2", "x"), True, 3)


@pytest.mark.parametrize(
    ("leader", "over"), [(LeaderRecord(0), False), (LeaderRecord(7), False), (LeaderRecord(7, A), True)]
)
def test_in_a_pause_nobody_takes_the_key(leader: LeaderRecord, over: bool) -> None:
    """Not a new one, not a released one, not that of a dead one, not even by who was named for it."""
    assert act(leader, leader_over=over, paused=True) == Idle()
    named = LeaderRecord(7, successor="n1")
    assert act(named, paused=True) == Idle()


def test_in_a_pause_who_leads_goes_on_and_is_deposed_as_ever() -> None:
    """The pause takes nothing from who has it, and gives nothing to who has lost it."""
    assert act(LeaderRecord(7, ME), leading=7, paused=True) == Idle()
    assert act(LeaderRecord(9, ME), paused=True) == Begin(9)
    assert isinstance(act(LeaderRecord(8, A), leading=7, paused=True), Deposed)
    assert isinstance(act(LeaderRecord(7, ME), leading=7, session_valid=False, paused=True), Deposed)

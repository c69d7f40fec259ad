"""Phases of a session, the keeper's judgement of its node, and the durations both rest on."""

from __future__ import annotations

import pytest

from phalanx.decide.keeper import AWAY_SECONDS, Phase, Watchdog, next_phase_at, phase
from phalanx.decide.timing import Timing

TIMING = Timing.of(2.0)  # fence budget 0.4, grace 0.6, stall limit 2


@pytest.mark.parametrize(
    ("now", "expected"),
    [(8.9, Phase.WORK), (9.0, Phase.STAND_DOWN), (9.6, Phase.FENCE), (10.0, Phase.OVER), (99.0, Phase.OVER)],
)
def test_the_phases_of_a_session_that_is_valid_until_10(now: float, expected: Phase) -> None:
    """Work, stand down for 0.6 s, kill for 0.4 s, over."""
    assert phase(now, 10.0, TIMING) is expected


def test_the_next_phase_is_the_first_moment_to_come() -> None:
    """A node sets its timer by it, and none once the session is over."""
    moments = [next_phase_at(now, 10.0, TIMING) for now in (0.0, 9.1, 9.7)]
    assert moments == pytest.approx([9.0, 9.6, 10.0])
    assert next_phase_at(10.0, 10.0, TIMING) == float("inf")


def test_the_keeper_kills_half_way_through_the_fence_budget() -> None:
    """Later than the node should have ended, before the session does, and only if something runs."""
    dog = Watchdog(TIMING, 9.0)
    assert dog.verdict(9.79, 10.0, has_resources=True) is None
    assert dog.verdict(9.8, 10.0, has_resources=False) is None
    verdict = dog.verdict(9.8, 10.0, has_resources=True)
    assert verdict is not None
    assert not verdict.kill_node


def test_a_node_that_stands_still_or_is_gone_is_fenced_and_released() -> None:
    """Its session need not run out: the keeper ends it."""
    dog = Watchdog(TIMING, 0.0)
    dog.on_beat(1.0)
    assert dog.next_check(50.0) == pytest.approx(3.0)
    assert dog.verdict(3.0, 50.0, has_resources=False) is None
    stalled = dog.verdict(3.01, 50.0, has_resources=False)
    assert stalled is not None
    assert stalled.kill_node
    dog.on_gone("killed")
    gone = dog.verdict(1.0, 50.0, has_resources=False)
    assert gone is not None
    assert (gone.reason, gone.kill_node) == ("killed", True)


@pytest.mark.parametrize("ttl", [1.0, 2.0, 5.0, 60.0, 300.0])
def test_no_two_clocks_within_five_percent_disagree_about_the_end(ttl: float) -> None:
    """The slowest holder stops no later than the fastest observer begins, at every TTL."""
    timing = Timing.of(ttl)
    assert timing.hold / 0.95 <= timing.observe / 1.05 + 1e-9
    assert 0 < timing.grace + timing.fence_budget < timing.hold - 2 * timing.renew_every
    assert timing.gap < timing.observe


def test_node_that_dies_in_a_pause_leaves_what_can_run_on() -> None:
    """The verdict says so, for a death and for a stall; code of the node itself is killed either way."""
    watchdog = Watchdog(Timing.of(2.0), 100.0)
    stalled = watchdog.verdict(103.0, 1000.0, has_resources=True, keeps=True)
    assert stalled is not None
    assert (stalled.kill_node, stalled.keep) == (True, True)
    watchdog.on_gone("killed")
    gone = watchdog.verdict(100.1, 1000.0, has_resources=True, keeps=True)
    assert gone is not None
    assert (gone.kill_node, gone.keep) == (True, True)


def test_keeper_alone_waits_for_a_node_but_not_for_ever_nor_past_its_session() -> None:
    """No stall counts then; the session's deadline does, and the patience is bounded."""
    watchdog = Watchdog(Timing.of(2.0), 100.0)
    watchdog.on_gone("killed")
    watchdog.on_away(100.1)
    assert watchdog.is_away
    assert watchdog.verdict(200.0, 1000.0, has_resources=True) is None
    assert watchdog.next_check(1000.0) == 100.1 + AWAY_SECONDS
    assert watchdog.verdict(200.0, 200.1, has_resources=True) is not None
    late = watchdog.verdict(100.2 + AWAY_SECONDS, 10000.0, has_resources=True)
    assert late is not None
    assert not late.kill_node
    watchdog.on_back(300.0)
    assert not watchdog.is_away
    assert watchdog.verdict(300.1, 1000.0, has_resources=True) is None
    assert watchdog.verdict(310.0, 1000.0, has_resources=True) is not None

"""When a failed program is started again in place, when another node takes over, and how often over time."""

from __future__ import annotations

import pytest

from phalanx.decide.activation import STABLE_SECONDS, Failures
from phalanx.decide.backoff import Backoff
from phalanx.decide.restart import FailOver, RestartIn, RestartRule, Restarts

RULE = RestartRule(count=3, window=100.0, delay=0.1, longest_delay=0.3)


def used(*moments: float, rule: RestartRule = RULE) -> Restarts:
    """Restarts at these moments."""
    restarts = Restarts()
    for moment in moments:
        restarts = restarts.restarted(moment, rule)
    return restarts


def test_restarts_of_the_window_come_with_growing_delays_then_another_node() -> None:
    """0.1 s, 0.2 s, 0.3 s (the longest), then the failover."""
    decisions = [used(*range(n)).decide(10.0, RULE, others=True) for n in range(4)]
    assert decisions == [RestartIn(0.1), RestartIn(0.2), RestartIn(0.3), FailOver()]


def test_restarts_older_than_the_window_do_not_count() -> None:
    """Three restarts, of which one is 100 s ago: one is left, with the delay of the third."""
    assert used(0.0, 50.0, 60.0).decide(99.9, RULE, others=True) == FailOver()
    assert used(0.0, 50.0, 60.0).decide(100.0, RULE, others=True) == RestartIn(0.3)


def test_without_another_node_it_goes_on_in_place_with_the_longest_delay() -> None:
    """Rather than giving the app back to nobody; and it says that another one would be better."""
    assert used(0.0, 1.0, 2.0).decide(3.0, RULE, others=False) == RestartIn(0.3, beyond=True)
    assert used(0.0).decide(3.0, RULE, others=False) == RestartIn(0.2)


def test_a_count_of_none_never_restarts() -> None:
    """Not even where nobody else could take over: that is what was declared."""
    rule = RestartRule(count=0)
    assert Restarts().decide(0.0, rule, others=False) == FailOver()
    assert Restarts().restarted(0.0, rule) == Restarts()


def test_what_is_remembered_is_bounded() -> None:
    """A program that fails for years: as many moments as count."""
    assert len(used(*range(1000)).times) == RULE.count


def test_a_failure_after_a_steady_time_is_the_first_one_again() -> None:
    """A crash a month must not make the node step aside for the longest delay."""
    failures = Failures().failed(0.0, "x", Backoff()).failed(0.0, "x", Backoff())
    assert failures.failed(0.0, "x", Backoff(), steady_seconds=STABLE_SECONDS - 1).count == 3
    assert failures.failed(0.0, "x", Backoff(), steady_seconds=STABLE_SECONDS).count == 1


class Rhythm:
    """A program that fails *lives* seconds after each start, on *sick* of the nodes, for *seconds*."""

    def __init__(self, lives: float, sick: int, *, nodes: int = 3, seconds: float = 7200.0) -> None:
        rule, retry = RestartRule(), Backoff()
        restarts, failures = [Restarts()] * nodes, [Failures()] * nodes
        now, here = 0.0, 0
        self.restarts: list[float] = []
        self.failovers: list[float] = []
        while now < seconds and here < sick:
            now += lives
            others = [n for n in range(nodes) if n != here and failures[n].not_before <= now]
            decision = restarts[here].decide(now, rule, others=bool(others))
            if isinstance(decision, RestartIn):
                restarts[here] = restarts[here].restarted(now, rule)
                self.restarts.append(now)
                now += decision.delay
            else:
                failures[here] = failures[here].failed(now, "it failed", retry, steady_seconds=lives)
                # Of those that may, the one whose delay has been over for longest.
                here = min(others, key=lambda n: failures[n].not_before)
                self.failovers.append(now)


@pytest.mark.parametrize("lives", [0.0, 0.3, 1.0, 5.0, 20.0])
def test_program_that_fails_everywhere_settles_into_a_slow_rhythm(lives: float) -> None:
    """In the second hour: at most a restart for each 5 s, and one failover for each node and minute."""
    rhythm = Rhythm(lives, sick=3)
    late = [at for at in rhythm.failovers if at >= 3600]
    assert len(late) <= 3 * 60 + 3
    assert len([at for at in rhythm.restarts if at >= 3600]) <= 3600 / (5.0 + lives) + len(late) + 1
    assert len(rhythm.failovers) > 10, "a node that steps aside is tried again"


@pytest.mark.parametrize("lives", [0.0, 1.0, 30.0, 100.0])
def test_program_that_fails_on_one_node_moves_once(lives: float) -> None:
    """Two restarts there, one failover, and it stays where it works."""
    rhythm = Rhythm(lives, sick=1)
    assert (len(rhythm.restarts), len(rhythm.failovers)) == (2, 1)

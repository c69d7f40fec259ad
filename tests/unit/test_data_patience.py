"""How long an answer is waited for before one looks."""

from __future__ import annotations

import random

import pytest

from phalanx.data.patience import LONGEST_SECONDS, SHORTEST_SECONDS, UNKNOWN_SECONDS, Patience


def measured(*seconds: float) -> Patience:
    """After answers that took so long."""
    patience = Patience()
    for each in seconds:
        patience.took(each)
    return patience


def test_unknown_server_is_given_some_time() -> None:
    """Before the first answer the deadline is neither the shortest nor the longest."""
    assert SHORTEST_SECONDS < Patience().seconds() == UNKNOWN_SECONDS < LONGEST_SECONDS


def test_quick_server_is_given_the_shortest_deadline() -> None:
    """Answers within a millisecond: a lost message is missed after a tenth of a second."""
    assert measured(*[0.001] * 20).seconds() == SHORTEST_SECONDS


@pytest.mark.parametrize("answer", [0.05, 0.2, 0.5])
def test_slow_or_distant_server_is_given_more_than_it_needs(answer: float) -> None:
    """Answers that vary by a quarter arrive in time, but few."""
    chance = random.Random(7)
    patience, late = Patience(), 0
    for _ in range(500):
        seconds = answer * chance.uniform(0.75, 1.25)
        late += seconds > patience.seconds()
        patience.took(seconds)
    assert late <= 3
    assert patience.seconds() < 3 * answer + SHORTEST_SECONDS


def test_deadlines_double_up_to_the_longest() -> None:
    """Each one that has passed doubles the next, and none is longer than a slow server is given."""
    patience = measured(0.001)
    assert [patience.seconds(passed) for passed in range(4)] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert patience.seconds(5) == patience.seconds(10_000) == LONGEST_SECONDS


def test_large_message_is_given_its_time() -> None:
    """A megabyte on a quick link at first, on a slow one at last; it does not make the server look slow."""
    patience = measured(0.001)
    assert patience.seconds(0, 1_000_000) == pytest.approx(0.2)
    assert patience.seconds(20, 1_000_000) == pytest.approx(12.0)
    patience.took(0.1, 1_000_000)
    assert patience.seconds() == SHORTEST_SECONDS


def test_one_long_outage_is_forgotten_soon() -> None:
    """One answer after a minute does not make the writer wait for long afterwards."""
    patience = measured(*[0.001] * 20, 60.0)
    assert patience.seconds() == LONGEST_SECONDS
    for _ in range(40):
        patience.took(0.001)
    assert patience.seconds() == SHORTEST_SECONDS

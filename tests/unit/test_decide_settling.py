"""What becomes of a live database whose reign has ended."""

from __future__ import annotations

import pytest

from phalanx.decide.settling import (
    Keep,
    LocalDatabase,
    LoggedReign,
    MakeReplica,
    SealedAt,
    SetAside,
    is_void,
    settle,
)

LOGGED = LoggedReign(last_sequence=40, last_txid=12, newest_epoch=5)


def test_a_database_that_is_just_what_the_log_says_becomes_a_replica() -> None:
    """Whether others have led since or not."""
    assert settle(LocalDatabase(5, 12, 0), LOGGED) == MakeReplica(40, 12)
    assert settle(LocalDatabase(3, 12, 0), LOGGED) == MakeReplica(40, 12)


@pytest.mark.parametrize(("captured", "commits"), [(13, 1), (12, 3), (14, None), (0, None), (0, 0)])
def test_nothing_is_set_aside_while_nobody_else_has_led(captured: int, commits: int | None) -> None:
    """What the log does not have yet can still go there."""
    assert settle(LocalDatabase(5, captured, commits), LOGGED) == Keep()


def test_what_others_never_saw_is_set_aside_with_its_number() -> None:
    """Once another reign has sealed the log, it takes no more of this one."""
    later = LoggedReign(40, 12, 9)
    assert settle(LocalDatabase(5, 14, 7), later) == SetAside(40, 12, 7, exact=True)
    assert settle(LocalDatabase(5, 12, 1), later) == SetAside(40, 12, 1, exact=True)


def test_what_cannot_be_told_is_never_taken_for_nothing() -> None:
    """An unreadable WAL, or a log that no longer reaches back so far, may hide transactions."""
    later = LoggedReign(40, 12, 9)
    assert settle(LocalDatabase(5, 12, None), later) == SetAside(40, 12, 0, exact=False)
    assert settle(LocalDatabase(5, 15, None, 3), later) == SetAside(40, 12, 3, exact=False)
    unknown = LoggedReign(40, 12, 9, known=False)
    assert settle(LocalDatabase(5, 12, 0), unknown) == SetAside(40, 12, 0, exact=False)
    assert settle(LocalDatabase(5, 15, None, 3), unknown) == SetAside(40, 12, 0, exact=False)
    assert settle(LocalDatabase(5, 0, 0), later) == SetAside(40, 12, 0, exact=True)


def test_a_reign_of_this_node_that_only_sealed_is_void() -> None:
    """Not one that wrote, and not another node's: that one may have begun."""
    seals = [SealedAt(5, "n1", 12), SealedAt(7, "n1", 12), SealedAt(9, "n2", 12)]
    assert [is_void(seals, 12, at, "n1") for at in range(3)] == [True, True, False]
    wrote = [SealedAt(5, "n1", 12), SealedAt(7, "n1", 13)]
    assert [is_void(wrote, 13, at, "n1") for at in range(2)] == [False, True]
    assert not is_void(wrote, 14, 1, "n1")

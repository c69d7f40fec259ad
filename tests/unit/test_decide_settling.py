"""What becomes of a live database whose reign has ended."""

from __future__ import annotations

import pytest

from phalanx.decide.settling import (
    MAX_RESTARTS,
    Extent,
    Keep,
    LocalDatabase,
    LoggedReign,
    MakeReplica,
    Place,
    SealedAt,
    Seen,
    SetAside,
    extent,
    is_void,
    reaches,
    settle,
)

PLACE = Place(7, 1, 5000)
BEFORE, BEHIND = Place(7, 1, 4000), Place(7, 1, 6000)
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


# --- what the disk has lost


@pytest.mark.parametrize("same_boot", [False, True])
@pytest.mark.parametrize(("offset", "has_it"), [(4999, False), (5000, True), (9000, True)])
def test_a_wal_reaches_a_place_of_its_own_if_it_is_that_long(
    offset: int, has_it: bool, same_boot: bool
) -> None:
    """Nothing else has to be known then."""
    assert reaches(Place(7, 1, offset), PLACE, same_boot=same_boot) is has_it


@pytest.mark.parametrize("same_boot", [False, True])
@pytest.mark.parametrize("salt1", [8, 9, 7 + MAX_RESTARTS])
def test_a_wal_that_has_begun_anew_reaches_what_was_before(salt1: int, same_boot: bool) -> None:
    """SQLite has put all of it into the database file then, on the disk."""
    assert reaches(Place(salt1, 5, 32), PLACE, same_boot=same_boot)
    assert reaches(Place(0, 5, 32), Place(0xFFFFFFFF, 1, 5000), same_boot=same_boot)


@pytest.mark.parametrize(
    ("end", "place"),
    [
        (None, PLACE),
        (Place(6, 1, 9000), PLACE),
        (Place(7, 2, 9000), PLACE),
        (Place(8 + MAX_RESTARTS, 1, 9000), PLACE),
        (PLACE, None),
        (None, None),
    ],
)
def test_where_a_wal_tells_nothing_a_start_of_the_host_may_have_lost_something(
    end: Place | None, place: Place | None
) -> None:
    """A program that closes a database removes its WAL; a loss of power may give an older one back."""
    assert reaches(end, place, same_boot=True)
    assert not reaches(end, place, same_boot=False)


@pytest.mark.parametrize(
    ("end", "captured", "logged", "found"),
    [
        (PLACE, Seen(12, PLACE), Seen(12, PLACE), Extent.WHOLE),
        (BEHIND, Seen(12, PLACE), Seen(11, BEFORE), Extent.WHOLE),
        (PLACE, Seen(12, PLACE), Seen(11, None), Extent.WHOLE),
        (PLACE, Seen(12, BEHIND), Seen(11, PLACE), Extent.LOGGED),
        (PLACE, Seen(12, BEHIND), Seen(0, None), Extent.LOGGED),
        (BEFORE, Seen(12, BEHIND), Seen(11, PLACE), Extent.SHORT),
        (BEFORE, Seen(12, PLACE), Seen(12, PLACE), Extent.SHORT),
        (PLACE, Seen(12, BEHIND), Seen(11, None), Extent.SHORT),
        (BEHIND, Seen(12, PLACE), Seen(14, None), Extent.SHORT),
        (None, Seen(12, PLACE), Seen(12, PLACE), Extent.SHORT),
        (BEHIND, Seen(0, None), Seen(12, None), Extent.SHORT),
        (None, Seen(0, None), Seen(0, None), Extent.WHOLE),
    ],
)
def test_the_disk_is_compared_with_what_was_captured_and_logged(
    end: Place | None, captured: Seen, logged: Seen, found: Extent
) -> None:
    """After another start of the host. Files of Litestream that are lost, too, prove nothing."""
    assert extent(end, captured, logged, same_boot=False) is found


@pytest.mark.parametrize(
    ("end", "captured", "logged"),
    [
        (None, Seen(12, PLACE), Seen(12, PLACE)),
        (BEHIND, Seen(0, None), Seen(12, None)),
    ],
)
def test_what_cannot_be_found_is_there_while_the_host_runs(
    end: Place | None, captured: Seen, logged: Seen
) -> None:
    """Only a loss of power takes something."""
    assert extent(end, captured, logged, same_boot=True) is Extent.WHOLE


def test_files_of_an_older_time_show_that_the_folder_was_put_back() -> None:
    """A volume that was rolled back, say, while the host ran on."""
    assert extent(BEHIND, Seen(12, PLACE), Seen(14, None), same_boot=True) is Extent.SHORT
    assert extent(BEHIND, Seen(12, PLACE), Seen(14, BEHIND), same_boot=True) is Extent.WHOLE


@pytest.mark.parametrize("newest_epoch", [5, 9])
@pytest.mark.parametrize(
    ("captured", "commits", "files", "lost", "exact"),
    [
        (12, 0, 0, 0, True),
        (12, None, 0, 0, False),
        (14, 0, 2, 2, False),
        (14, None, 2, 2, False),
        (11, None, 0, 0, False),
        (0, None, 0, 0, False),
    ],
)
def test_a_database_that_is_behind_the_log_is_never_gone_on_with(
    newest_epoch: int, captured: int, commits: int | None, files: int, lost: int, exact: bool
) -> None:
    """Whether others have led since or not. What was captured and is not in the log is lost."""
    local = LocalDatabase(5, captured, commits, files, Extent.SHORT)
    assert settle(local, LoggedReign(40, 12, newest_epoch)) == SetAside(
        40, 12, lost, exact=exact, lost_end=True
    )


@pytest.mark.parametrize(("commits", "files", "lost"), [(0, 2, 2), (1, 2, 2), (7, 2, 7), (None, 2, 2)])
def test_a_database_with_less_than_was_captured_goes_on_only_while_nobody_has_led(
    commits: int | None, files: int, lost: int
) -> None:
    """It has what the log has, and is captured anew; once others have led, the number is a lower bound."""
    local = LocalDatabase(5, 14, commits, files, Extent.LOGGED)
    assert settle(local, LOGGED) == Keep(anew=True)
    assert settle(local, LoggedReign(40, 12, 9)) == SetAside(40, 12, lost, exact=False, lost_end=True)
    unknown = LoggedReign(40, 0, 9, known=False)
    assert settle(local, unknown) == SetAside(40, 0, lost, exact=False, lost_end=True)

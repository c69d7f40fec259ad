"""Which snapshots and which part of the log may go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phalanx.decide.retention import Kept, Limits, Plan, plan

HOUR = 3600.0
LIMITS = Limits(count=3, age_seconds=24 * HOUR, grace_seconds=900.0)
NOW = 1_000_000.0

snapshot_lists = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 3 * NOW)), max_size=12).map(
    lambda pairs: [Kept(f"s{place}", *pair) for place, pair in enumerate(pairs)]
)
limits = st.builds(
    Limits,
    count=st.integers(0, 6),
    age_seconds=st.floats(0, NOW),
    grace_seconds=st.floats(0, HOUR),
)


def hourly(count: int, *, last: float = NOW - 1000) -> list[Kept]:
    """Snapshots at sequences 100, 200, …, an hour apart."""
    return [Kept(f"s{n}", 100 * n, last - HOUR * (count - n)) for n in range(1, count + 1)]


def test_nothing_is_there() -> None:
    """No snapshot: all of the log stays."""
    assert plan([], LIMITS, NOW) == Plan()


def test_more_than_the_limit_go_and_the_log_with_them() -> None:
    """Five snapshots of three: two go, and the log up to the third one."""
    assert plan(hourly(5), LIMITS, NOW) == Plan(("s1", "s2"), 300)


def test_old_ones_go_but_never_the_newest() -> None:
    """All of them are too old: the last one stays."""
    assert plan(hourly(3), Limits(10, HOUR, 900.0), NOW + 100 * HOUR) == Plan(("s1", "s2"), 300)


def test_new_snapshot_replaces_older_ones_only_after_a_while() -> None:
    """Just after the fourth one the first one stays: somebody may be reading it."""
    four = hourly(4, last=NOW - 10)
    assert plan(four, LIMITS, NOW) == Plan(("s1",), 200)
    assert plan(four, Limits(1, HOUR, 900.0), NOW) == Plan(("s1", "s2"), 300)
    assert plan(four, Limits(1, HOUR, 900.0), NOW + 900) == Plan(("s1", "s2", "s3"), 400)


def test_first_snapshot_frees_the_log_only_after_a_while() -> None:
    """Standbys that follow are a moment behind it."""
    first = [Kept("s1", 100, NOW - 5)]
    assert plan(first, LIMITS, NOW) == Plan()
    assert plan(first, LIMITS, NOW + 895) == Plan((), 100)


@given(snapshot_lists, limits, st.floats(0, 3 * NOW))
def test_newest_stays_and_the_log_that_is_needed(found: list[Kept], limit: Limits, now: float) -> None:
    """Whatever there is: the newest one stays, and the log after the oldest one that does."""
    done = plan(found, limit, now)
    staying = [one for one in found if one.name not in done.delete]
    assert len(staying) == len(found) - len(set(done.delete))
    if found:
        assert max(one.sequence for one in found) in [one.sequence for one in staying]
        assert done.purge <= min(one.sequence for one in staying)
    else:
        assert done == Plan()


@given(snapshot_lists, limits, st.floats(0, 3 * NOW))
def test_nothing_goes_before_its_successor_has_been_there_for_a_while(
    found: list[Kept], limit: Limits, now: float
) -> None:
    """What is deleted, and what the log is purged up to, has a settled snapshot at or after it."""
    done = plan(found, limit, now)
    settled = [one for one in found if one.created <= now - limit.grace_seconds]
    for name in done.delete:
        doomed = next(one for one in found if one.name == name)
        assert any(one.sequence >= doomed.sequence and one is not doomed for one in settled)
    assert done.purge == 0 or done.purge <= max(one.sequence for one in settled)


@given(snapshot_lists, limits, st.floats(0, 3 * NOW), st.floats(0, NOW))
def test_plan_only_grows_with_time(found: list[Kept], limit: Limits, now: float, later: float) -> None:
    """What may go now may go later, and after it is gone nothing that was to stay goes sooner."""
    first, second = plan(found, limit, now), plan(found, limit, now + later)
    assert set(first.delete) <= set(second.delete)
    assert first.purge <= second.purge
    rest = [one for one in found if one.name not in first.delete]
    assert plan(rest, limit, now) == Plan((), first.purge)


@given(snapshot_lists, limits)
def test_in_the_end_the_limits_hold(found: list[Kept], limit: Limits) -> None:
    """When nothing new has come for long, there are at most as many as the limit says, and the newest."""
    done = plan(found, limit, 100 * NOW)
    assert len(found) - len(done.delete) <= max(1, limit.count)

"""Health decisions: thresholds, dependencies, verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.decide.health import Rule, Tally, Verdict, judge, running, waits_for
from phalanx.types import Health

OK, ILL, UNKNOWN = Health.HEALTHY, Health.UNHEALTHY, Health.UNKNOWN
GOOD, BAD, NEW = Tally(OK), Tally(ILL), Tally()


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ("", UNKNOWN),
        ("+", OK),  # the first good one is enough
        ("-", UNKNOWN),
        ("--", UNKNOWN),
        ("---", ILL),
        ("--+", OK),
        ("--+--", OK),  # in a row
        ("+---", ILL),
        ("---+", ILL),
        ("---++", OK),
        ("---+-+", ILL),  # in a row
        ("---++--", OK),
    ],
)
def test_thresholds(runs: str, expected: Health) -> None:
    """Three failures in a row make ill, two good runs in a row well again, the very first one at once."""
    rule, tally = Rule("web", failures=3, successes=2), Tally()
    for run in runs:
        tally = tally.after(run == "+", rule)
    assert tally.health is expected


@given(
    runs=st.lists(st.booleans(), min_size=1, max_size=60), failures=st.integers(1, 5), more=st.integers(1, 5)
)
def test_thresholds_hold_for_any_history(runs: list[bool], failures: int, more: int) -> None:
    """Whatever happened: a change to ill is the last of N failures, a change to well follows good runs."""
    rule, tally = Rule("web", failures=failures, successes=more), Tally()
    for n, passed in enumerate(runs):
        before, tally = tally, tally.after(passed, rule)
        if tally.health is before.health:
            continue
        wanted = failures if tally.health is ILL else (more if before.health is ILL else 1)
        assert len(runs[: n + 1]) >= wanted
        assert all(run is passed for run in runs[n + 1 - wanted : n + 1])
        assert tally.health is (OK if passed else ILL)


def test_standbys_run_what_always_runs() -> None:
    """when="active" runs in the active section only, when="always" in both."""
    rules = (Rule("web"), Rule("disk", always=True))
    assert [rule.name for rule in running(rules, active=False)] == ["disk"]
    assert [rule.name for rule in running(rules, active=True)] == ["web", "disk"]


def test_dependencies_reach_over_several_steps() -> None:
    """A check waits for everything it stands on, also indirectly; what does not run holds nobody up."""
    rules = (Rule("db"), Rule("web", depends_on=("db",)), Rule("page", depends_on=("web", "elsewhere")))
    page = rules[2]
    assert waits_for(page, rules, {"db": GOOD, "web": GOOD}) == ()
    assert waits_for(page, rules, {"db": BAD, "web": GOOD}) == ("db",)
    assert waits_for(page, rules, {"db": GOOD}) == ("web",)
    assert waits_for(page, rules[2:], {}) == ()


def test_circle_of_dependencies_ends() -> None:
    """Configuration refuses circles; should one get here, nobody hangs, and nobody is called healthy."""
    rules = (Rule("a", depends_on=("b",)), Rule("b", depends_on=("a",)))
    assert waits_for(rules[0], rules, {}) == ("b",)
    assert judge(rules, {}, {}).health is UNKNOWN


def test_ill_check_gives_its_reason() -> None:
    """The verdict is the worst of those that count, and names each with what it saw."""
    rules = (Rule("web"), Rule("db"), Rule("disk"))
    tallies = {"web": BAD, "db": BAD, "disk": GOOD}
    assert judge(rules, tallies, {"web": "HTTP 500"}) == Verdict(ILL, "web: HTTP 500; db: failed")


def test_unknown_is_between() -> None:
    """One that has not answered makes the app unknown, but an ill one is worse; no checks: unknown."""
    rules = (Rule("web"), Rule("db"))
    assert judge(rules, {"web": GOOD}, {}) == Verdict(UNKNOWN, "db: no result yet")
    assert judge(rules, {"web": BAD}, {}).health is ILL
    assert judge(rules, {"web": GOOD, "db": GOOD}, {"db": "fine"}) == Verdict(OK)
    assert judge((), {}, {}).health is UNKNOWN


def test_ill_check_that_waits_does_not_count() -> None:
    """While the database is ill, the web check's own illness is no second reason."""
    rules = (Rule("db"), Rule("web", depends_on=("db",)))
    assert judge(rules, {"db": BAD, "web": BAD}, {"db": "refused"}) == Verdict(ILL, "db: refused")
    assert judge(rules, {"db": NEW, "web": BAD}, {}).health is UNKNOWN

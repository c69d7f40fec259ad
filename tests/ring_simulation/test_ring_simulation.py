"""G2 and G6 hold over many seeded schedules of a ring, and the checks that say so are not blind."""

from __future__ import annotations

import os

import pytest
from tests.schedules import digests_elsewhere, simulate

from .__main__ import MODULE
from .breaks import BREAKS
from .run import FAULTS, run_one

SCHEDULES = int(os.environ.get("PHALANX_RING_SCHEDULES", "400"))
FIRST_SEED = int(os.environ.get("PHALANX_SEED", "1"))
BREAK_SCHEDULES = 3000
"""Within so many a planted break has to show."""

RARE = {"begun-while-given-back": 650}
"""Breaks that take thousands of schedules to show: the seed to begin with, near one that is known to."""

MUST_HAPPEN = (
    "a host is lost for good",
    "excused: host stood still",
    "fenced writes refused",
    "graceful ends",
    "hooks that failed",
    "hooks that were deaf",
    "lost replies",
    "messages lost",
    "owner changes",
    "plans",
    "recoveries checked",
    "refused writes",
    "sessions ended by their keeper",
    "sessions expired",
    "spurious refusals",
    *sorted({f"fault {fault.__name__.strip('_')}" for fault in FAULTS}),
)
"""What 400 schedules or more must have contained: who tries nothing finds nothing."""


def test_g6_one_owner_of_each_and_all_are_owned_in_the_end() -> None:
    """No schedule of joins, leaves, crashes, freezes and losses has two owners; all of them recover."""
    found = simulate(MODULE, "--schedules", str(SCHEDULES), "--seed", str(FIRST_SEED))
    assert found["violations"] == []
    assert found["schedules"] == SCHEDULES
    if SCHEDULES >= 400:
        assert [what for what in MUST_HAPPEN if not found["coverage"].get(what)] == []


@pytest.mark.parametrize("broken", BREAKS)
def test_a_rule_break_planted_in_the_ring_is_found_and_its_seed_replays_it(broken: str) -> None:
    """Each planted break shows soon; its seed shows it again, and holds without it."""
    first = str(RARE.get(broken, 1))
    found = simulate(MODULE, "--schedules", str(BREAK_SCHEDULES), "--seed", first, "--break", broken)
    violations = found["violations"]
    assert violations, f"{broken} ({BREAKS[broken]}) was not found"
    again = run_one(violations[0]["seed"], broken, tracing=True)
    assert again.violation == violations[0]["text"]
    assert "VIOLATION" in again.lines[-1]
    assert run_one(violations[0]["seed"]).violation == ""


def test_a_ring_schedule_is_the_same_in_another_process_with_another_hash_seed() -> None:
    """What is printed can be replayed elsewhere; tracing does not change it."""
    assert digests_elsewhere(MODULE, range(1, 12), "1") == digests_elsewhere(MODULE, range(1, 12), "4711")
    traced, untraced = run_one(7, tracing=True), run_one(7)
    assert traced.lines
    assert (traced.counts, traced.seconds) == (untraced.counts, untraced.seconds)

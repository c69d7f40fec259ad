"""G1 holds for apps that go on without NATS, and they do go on."""

from __future__ import annotations

import os

import pytest
from tests.schedules import simulate

from .__main__ import MODULE
from .hold_faults import FAULTS
from .run import run_one

SCHEDULES = int(os.environ.get("PHALANX_HOLD_SCHEDULES", "0"))
"""How many exactly; 0: up to MOST in SECONDS."""

MOST, SECONDS, FEWEST = 5_000, 60, 300

MUST_HAPPEN = (
    "ends of a hold checked",
    "handed over when NATS was back",
    "holds checked",
    "members admitted",
    "promises given",
    "promises refused",
    "sections that outlived their session",
    *(f"fault {fault.__name__}" for fault in FAULTS),
)


def test_g1_holds_in_every_schedule_of_an_app_that_goes_on_without_nats(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nodes cut off from NATS and from each other, restarts, who joins and who is forgotten: no two sections
    overlap; with all reached the active one goes on for three TTLs without NATS, and else it ends."""
    found = simulate(
        MODULE, "--hold", "--schedules", str(SCHEDULES or MOST), "--seconds", str(0 if SCHEDULES else SECONDS)
    )
    coverage = found["coverage"]
    with capsys.disabled():
        held = coverage.get("sections that outlived their session", 0)
        print(f"\n{found['schedules']} schedules in {found['seconds']:.0f} s, {held} with a hold")
    assert found["violations"] == []
    if found["schedules"] >= FEWEST:
        assert [what for what in MUST_HAPPEN if not coverage.get(what)] == []


def test_the_same_seed_gives_the_same_trace_also_where_the_app_holds() -> None:
    """What a failure prints can be replayed."""
    first, second = run_one(7, tracing=True, holds=True), run_one(7, tracing=True, holds=True)
    assert first.lines
    assert first.lines == second.lines

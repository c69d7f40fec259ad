"""Never too many holders, each in its turn, nobody waits for ever; and the checks that say so are not
blind."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from .run import BREAKS, run_one

SCHEDULES = int(os.environ.get("PHALANX_LOCK_SCHEDULES", "40"))
FIRST_SEED = int(os.environ.get("PHALANX_SEED", "1"))
BREAK_SCHEDULES = 40
MUST_HAPPEN = (
    "grants",
    "handed over",
    "late writes stored",
    "lost replies",
    "refused writes",
    "sessions ended",
    "spurious refusals",
    "3 hold at once",
)


def test_never_more_holders_than_permits_in_every_schedule() -> None:
    """Crashes, lost replies, writes that come late, sessions that end: locks, and semaphores of two and
    three."""
    happened: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + SCHEDULES):
        violation, counts = run_one(seed)
        assert violation == "", f"seed {seed}"
        happened.update(counts)
    if SCHEDULES >= 40:
        assert [what for what in MUST_HAPPEN if not happened[what]] == []


@pytest.mark.parametrize("broken", BREAKS)
def test_planted_break_is_found(broken: str) -> None:
    """Each rule that is broken on purpose shows within some schedules."""
    assert any(run_one(seed, broken)[0] for seed in range(1, BREAK_SCHEDULES + 1))

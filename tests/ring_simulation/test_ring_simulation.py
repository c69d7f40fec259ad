"""G2 and G6 hold over many seeded schedules of a ring, and the checks that say so are not blind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .breaks import BREAKS
from .run import FAULTS, run_one

ROOT = Path(__file__).parents[2]
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


def simulate(*arguments: str) -> dict[str, Any]:
    """Many schedules in processes of their own: nothing is forked from pytest, which may have threads."""
    command = [sys.executable, "-m", "tests.ring_simulation", "--json", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stderr
    return json.loads(run.stdout)


def test_g6_one_owner_of_each_and_all_are_owned_in_the_end() -> None:
    """No schedule of joins, leaves, crashes, freezes and losses has two owners; all of them recover."""
    found = simulate("--schedules", str(SCHEDULES), "--seed", str(FIRST_SEED))
    assert found["violations"] == []
    assert found["schedules"] == SCHEDULES
    if SCHEDULES >= 400:
        assert [what for what in MUST_HAPPEN if not found["coverage"].get(what)] == []


@pytest.mark.parametrize("broken", BREAKS)
def test_a_rule_break_planted_in_the_ring_is_found_and_its_seed_replays_it(broken: str) -> None:
    """Each planted break shows soon; its seed shows it again, and holds without it."""
    first = str(RARE.get(broken, 1))
    found = simulate("--schedules", str(BREAK_SCHEDULES), "--seed", first, "--break", broken)
    violations = found["violations"]
    assert violations, f"{broken} ({BREAKS[broken]}) was not found"
    again = run_one(violations[0]["seed"], broken, tracing=True)
    assert again.violation == violations[0]["text"]
    assert "VIOLATION" in again.lines[-1]
    assert run_one(violations[0]["seed"]).violation == ""


def test_a_ring_schedule_is_the_same_in_another_process_with_another_hash_seed() -> None:
    """What is printed can be replayed elsewhere; tracing does not change it."""
    code = (
        "import zlib\nfrom tests.ring_simulation.run import run_one\n"
        "print([zlib.crc32(chr(10).join(run_one(s, tracing=True).lines).encode()) for s in range(1, 12)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4711")
    }
    assert len(outputs) == 1
    traced, untraced = run_one(7, tracing=True), run_one(7)
    assert traced.lines
    assert (traced.counts, traced.seconds) == (untraced.counts, untraced.seconds)

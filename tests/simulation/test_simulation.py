"""G1, G2, G4, G9 and G10 hold over many seeded schedules, and the checks that say so are not blind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.schedules import ROOT, digest, digests_elsewhere, simulate

from .__main__ import MODULE
from .breaks import BREAKS
from .plan import FAULTS
from .run import run_one

SCHEDULES = int(os.environ.get("PHALANX_SCHEDULES", "0"))
"""How many exactly; 0: up to MOST in SECONDS, as a machine that has other things to do manages fewer."""

MOST, SECONDS, FEWEST = 10_000, 150, 500
FIRST_SEED = int(os.environ.get("PHALANX_SEED", "1"))

MUST_HAPPEN = (
    "G4 checked",
    "G10 checked",
    "excused: both were stopped",
    "addresses removed by the kernel",
    "addresses that somebody else still answered for",
    "excused: a program that nobody could end",
    "failures held in a pause",
    "fenced writes refused",
    "hand-overs to a named successor",
    "hosts fenced",
    "leader changes",
    "led by a named node without failover",
    "keepers alone in a pause",
    "lost replies",
    "nodes killed by their keeper in an active section",
    "left-overs ended by the next keeper",
    "nodes that fenced themselves",
    "needed no fencing any more",
    "nominations",
    "pauses that ended while nobody was active",
    "programs adopted",
    "programs that had to be killed",
    "re-elections of the bucket",
    "recoveries checked",
    "resumed while the node was away",
    "resumptions checked",
    "second lives refused",
    "sessions taken up by a next life",
    "sections that failed",
    "servers back without their last writes",
    "session streams wiped",
    "sessions lost by their keeper",
    "spurious refusals",
    "stand-downs before the deadline",
    "starts of a program that failed",
    "stream lists replaced",
    "things ended by a warden",
    "to be fenced by others, passed on",
    "tombstones by observers",
    "tombstones refused",
    "wardens checked",
    "watch restarts",
    *(f"fault {fault.__name__}" for fault in FAULTS),
)
"""What a run of FEWEST schedules or more must have contained: who tries nothing finds nothing."""

RARE = (
    "fence commands ended by an operator's word",
    "fence commands that failed",
    "leader key taken in a pause by who had not heard of it",
    "not started by a node without a fence command",
)
"""The same, of ten thousand or more."""


@pytest.mark.alone  # it takes all cores
def test_g1_g2_g4_g9_g10_hold_in_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """No seeded schedule of faults breaks a promise, and together they contain every kind of fault."""
    found = simulate(
        MODULE,
        "--schedules",
        str(SCHEDULES or MOST),
        "--seed",
        str(FIRST_SEED),
        "--seconds",
        str(0 if SCHEDULES else SECONDS),
    )
    coverage = found["coverage"]
    with capsys.disabled():
        print(f"\n{found['schedules']} schedules in {found['seconds']:.0f} s; of them contained:")
        print("\n".join(f"  {count:7d}  {what}" for what, count in coverage.items()))
    assert found["violations"] == []
    assert found["schedules"] == SCHEDULES or FEWEST <= found["schedules"] <= MOST
    if found["schedules"] >= FEWEST:
        assert [what for what in MUST_HAPPEN if not coverage.get(what)] == []
    if found["schedules"] >= 10_000:
        assert [what for what in RARE if not coverage.get(what)] == []


@pytest.mark.parametrize("broken", BREAKS)
def test_a_planted_rule_break_is_found_and_its_seed_replays_it(broken: str) -> None:
    """Each planted break shows within 10,000 schedules; its seed shows it again, and holds without it."""
    violations = simulate(MODULE, "--schedules", "10000", "--break", broken)["violations"]
    assert violations, f"{broken} ({BREAKS[broken]}) was not found"
    again = run_one(violations[0]["seed"], broken, tracing=True)
    assert again.violation == violations[0]["text"]
    assert "VIOLATION" in again.lines[-1]
    assert run_one(violations[0]["seed"], holds=broken.startswith("hold-")).violation == ""


def test_the_same_seed_gives_the_same_trace() -> None:
    """A schedule is its seed: traced twice it is the same, line by line; tracing does not change it."""
    first, second, untraced = run_one(7, tracing=True), run_one(7, tracing=True), run_one(7)
    assert first.lines
    assert first.lines == second.lines
    assert (first.counts, first.seconds) == (untraced.counts, untraced.seconds)
    assert digest(first) != digest(run_one(8, tracing=True))


def test_a_seed_means_the_same_in_another_process_and_with_another_hash_seed() -> None:
    """What CI prints can be replayed elsewhere: no schedule depends on PYTHONHASHSEED."""
    here = [digest(run_one(seed, tracing=True)) for seed in range(1, 30)]
    assert digests_elsewhere(MODULE, range(1, 30), "1") == here
    assert digests_elsewhere(MODULE, range(1, 30), "4711") == here


def test_the_command_line_prints_the_seed_and_replays_it() -> None:
    """A violation exits 1 and names a command; that command shows the trace up to the same violation."""
    arguments = ["--schedules", "300", "--jobs", "1", "--break", "tombstone-into-fresh-stream"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    [command] = [line.partition("replay: ")[2] for line in run.stdout.splitlines() if "replay: " in line][:1]
    replay = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert replay.returncode == 1
    assert "VIOLATION" in replay.stdout

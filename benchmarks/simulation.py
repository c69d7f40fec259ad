"""The simulator: schedules of faults in virtual time, and whether it finds what is planted."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import Run

SCHEDULES = 20_000
ROOT = Path(__file__).parents[1]


async def simulate(run: Run) -> None:
    """Violations in 20,000 schedules; then each rule break that can be planted must be found."""
    from tests.simulation.breaks import BREAKS

    summary = await _simulate()
    run.say(f"{summary['schedules']} schedules, {summary['virtual_seconds']:.0f} s of virtual time")
    run.add(
        len(summary["violations"]), f"{len(summary['violations'])} violations in {summary['seconds']:.0f} s"
    )
    run.problems += [f"{found['text']}; replay: {found['replay']}" for found in summary["violations"]]
    if summary["schedules"] < SCHEDULES:
        run.problems.append(f"only {summary['schedules']} of {SCHEDULES} schedules ran")
    for name, wrong in BREAKS.items():
        planted = await _simulate("--break", name)
        if found := planted["violations"]:
            run.say(f"planted: {wrong}; found with seed {found[0]['seed']}, {planted['schedules']} schedules")
        else:
            run.problems.append(f"planted, and not found in {planted['schedules']} schedules: {wrong}")


async def _simulate(*arguments: str) -> dict[str, Any]:
    """One run of the simulator, which ends at the first violation."""
    command = ("-m", "tests.simulation", "--schedules", str(SCHEDULES), "--json", *arguments)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode not in (0, 1):
        raise RuntimeError(f"the simulator ended with exit code {process.returncode}")
    return msgspec.json.decode(output)

"""``scripts/validate-messaging.sh``: load, kills and hand-overs, and a checker for what came of them.

Exit code 0: every promise was kept; 1: one was broken (the files are kept, and named); 2: bad arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import running
from benchmarks.messaging_validation.chaos import Chaos, Say, Stage
from benchmarks.messaging_validation.checker import Evidence, Figures, figures, judge
from benchmarks.messaging_validation.program import APP, LOCK, PERMITS, SEMAPHORE
from phalanx import system
from phalanx.errors import BusError

RECOVERY_SECONDS = 60.0
LEAST_AVAILABLE = 0.4
"""Of the windows between the first and the last answer; less proves nothing."""


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = running.validation_parser(
        "validate-messaging.sh", __doc__, seconds=120.0, lasts="how long there are faults"
    )
    return running.validation_arguments(parser, arguments)


async def validate(seed: int, seconds: float, ttl: float, *, keep: bool = False) -> list[str]:
    """Faults, recovery, judgement; prints what happens. What is broken; empty: nothing."""
    began = system.now()

    def say(text: str) -> None:
        print(f"{system.now() - began:7.2f}  {text}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix=f"phalanx-validate-{seed}-"))
    problems = ["it was interrupted"]
    try:
        async with Stage(folder, ttl) as stage:
            say("ready")
            chaos = Chaos(stage, random.Random(seed), say)
            await chaos.run(seconds)
            problems = await _judged(stage, chaos, seconds, say)
    finally:
        if problems or keep:
            print(f"history and logs are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for problem in problems[:30]:
        print(f"VIOLATION: {problem}")
    if len(problems) > 30:
        print(f"… and {len(problems) - 30} more")
    if not problems:
        print("nothing ran twice, nothing acknowledged was lost, nothing was held by too many")
    return problems


async def _judged(stage: Stage, chaos: Chaos, seconds: float, say: Say) -> list[str]:
    try:
        await stage.nodes.wait_for_active(APP, timeout=RECOVERY_SECONDS)
        await stage.nodes.wait_for_standbys(APP, 2, timeout=RECOVERY_SECONDS)
    except TimeoutError as error:
        return [f"no recovery: {str(error).partition(chr(10))[0]}"]
    for name in stage.clients:
        stage.kill_client(name)
    evidence = await _evidence(stage, say)
    found = figures(evidence)
    _report(chaos, found)
    return [*judge(evidence), *too_little(found, seconds)]


async def _evidence(stage: Stage, say: Say) -> Evidence:
    """The history, once everything that was published before the calm has been handled or given up."""
    say("waiting until the events are handled")
    until = system.now()
    deadline = until + RECOVERY_SECONDS
    permits = {LOCK: 1, SEMAPHORE: PERMITS}
    while True:
        dead = await _dead(stage)
        # What is published meanwhile is not judged: it is still on its way.
        events = [e for e in stage.history.events() if e.kind != "published" or e.at <= until]
        evidence = Evidence(events, dead, permits)
        if not [each for each in judge(evidence) if "neither handled" in each] or system.now() > deadline:
            return evidence
        await asyncio.sleep(0.5)


async def _dead(stage: Stage) -> frozenset[tuple[str, int, int]]:
    found: set[tuple[str, int, int]] = set()
    try:
        async with stage.client() as client:
            async for letter in client.dead_letters.list(APP):
                data = msgspec.json.decode(letter.data, type=dict[str, int])
                found.add((letter.key, data["epoch"], data["number"]))
    except BusError as error:
        print(f"dead letters cannot be read: {error}")
    return frozenset(found)


def too_little(found: Figures, seconds: float) -> list[str]:
    """Where nothing ran, nothing can have been broken: that proves nothing."""
    problems: list[str] = []
    if found.available < LEAST_AVAILABLE:
        problems.append(f"calls were answered only {100 * found.available:.0f} % of the time")
    if found.answered < 10 * seconds or found.touched < seconds:
        problems.append(f"only {found.answered} calls were answered, {found.touched} of them by the ring")
    if found.reigns < 2 or found.reigns < seconds / 20:
        problems.append(f"only {found.reigns} reigns")
    if found.published < 2 * seconds or not found.dead:
        problems.append(f"only {found.published} events were published, {found.dead} given up")
    for name in (LOCK, SEMAPHORE):
        if found.grants.get(name, 0) < 2 * seconds:
            problems.append(f"{name} was granted only {found.grants.get(name, 0)} times")
    return problems


def _report(chaos: Chaos, found: Figures) -> None:
    print()
    print("inflicted: " + ", ".join(f"{kind} {count}" for kind, count in sorted(chaos.inflicted.items())))
    failed = ", ".join(f"{code} {count}" for code, count in sorted(found.failed.items())) or "none"
    print(
        f"{found.called} calls in {found.seconds:.0f} s, {found.answered} answered, by {found.reigns} reigns"
        f"; failed: {failed}; {found.touched} by the ring"
    )
    print(
        f"available {100 * found.available:.1f} %, {found.answered / max(found.seconds, 0.001):.0f} answers/s"
        f", longest gap of calls to the leader {found.longest_gap_seconds:.1f} s"
    )
    print(f"{found.published} events published, {found.handled} handled, {found.dead} given up")
    grants = ", ".join(f"{name} {count}" for name, count in sorted(found.grants.items()))
    print(f"grants: {grants}; lost while held {found.lost}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parsed = _arguments(arguments)
    print(
        f"scripts/validate-messaging.sh --seconds {parsed.seconds:g} --ttl {parsed.ttl:g} "
        f"--seed {parsed.seed}",
        flush=True,
    )
    return 1 if running.run(validate(parsed.seed, parsed.seconds, parsed.ttl, keep=parsed.keep)) else 0


if __name__ == "__main__":
    sys.exit(main())

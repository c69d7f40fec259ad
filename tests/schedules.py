"""Running the schedules of a simulator: one, or many over all cores; its command line; how tests call it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.virtual_time import Violation, VirtualTime

ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Outcome:
    """What one schedule came to."""

    seed: int
    violation: str = ""
    promise: str = ""
    counts: dict[str, int] = field(default_factory=lambda: {})
    seconds: float = 0.0
    lines: list[str] = field(default_factory=lambda: [])


@dataclass
class Summary:
    """What many schedules came to. ``coverage``: in how many schedules something happened."""

    schedules: int = 0
    coverage: Counter[str] = field(default_factory=lambda: Counter[str]())
    violations: list[Outcome] = field(default_factory=lambda: [])
    virtual_seconds: float = 0.0
    seconds: float = 0.0


class RunOne(Protocol):
    """Runs the schedule of a seed. It can be pickled."""

    def __call__(self, seed: int, /, *, tracing: bool = False) -> Outcome: ...


def outcome_of(world: VirtualTime, drive: Callable[[], None]) -> Outcome:
    """Run one schedule to its end, or to the first promise that it breaks."""
    outcome = Outcome(world.seed)
    try:
        drive()
    except Violation as violation:
        outcome.violation, outcome.promise = str(violation), violation.promise
    outcome.counts, outcome.seconds, outcome.lines = world.counts, world.now, world.lines or []
    return outcome


def digest(outcome: Outcome) -> int:
    """A number that differs when two traces differ."""
    return zlib.crc32("\n".join(outcome.lines).encode())


def _batch(run_one: RunOne, seeds: range) -> Summary:
    summary = Summary(len(seeds))
    for seed in seeds:
        outcome = run_one(seed)
        summary.coverage.update(outcome.counts.keys())
        summary.virtual_seconds += outcome.seconds
        if outcome.violation:
            summary.violations.append(outcome)
    return summary


def run_many(
    run_one: RunOne,
    seeds: range,
    jobs: int,
    *,
    batch: int,
    seconds: float = 0.0,
    stop_at: int = 1,
    progress: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """The schedules of *seeds*, *batch* at a time, over *jobs* processes, until *stop_at* violations, or
    *seconds* have passed (0: however long it takes)."""
    summary, began = Summary(), time.monotonic()
    batches = (seeds[at : at + batch] for at in range(0, len(seeds), batch))
    work = partial(_batch, run_one)

    def take(results: Iterator[Summary]) -> None:
        for done in results:
            summary.schedules += done.schedules
            summary.coverage += done.coverage
            summary.violations += done.violations
            summary.virtual_seconds += done.virtual_seconds
            summary.seconds = time.monotonic() - began
            progress(summary)
            if len(summary.violations) >= stop_at or 0 < seconds <= summary.seconds:
                return

    if jobs <= 1:
        take(map(work, batches))
    else:
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            take(pool.imap(work, batches))
    summary.seconds = time.monotonic() - began
    return summary


# --- the command line


def parser(
    module: str, description: str | None, breaks: Iterable[str], number: int
) -> argparse.ArgumentParser:
    """What every simulator, ``python -m`` *module*, understands; *number*: how many schedules by default."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--schedules", type=int, default=number, help=f"how many (default {number})")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    made.add_argument("--seed", type=int, default=1, help="the first seed; with --trace the only one")
    made.add_argument("--trace", action="store_true", help="replay exactly one schedule, readably")
    made.add_argument("--break", dest="broken", default="", choices=["", *breaks], help="plant a rule break")
    made.add_argument("--seconds", type=float, default=0.0, help="stop after that many seconds")
    made.add_argument("--violations", type=int, default=1, help="stop after that many violations")
    made.add_argument("--json", action="store_true", help="one JSON object at the end")
    return made


def command(
    module: str, run_one: RunOne, arguments: argparse.Namespace, options: str = "", *, batch: int
) -> int:
    """Do what *arguments*, of ``parser``, say: the exit code, 1 for a violation.

    *run_one*: with the planted break of *arguments*, if any. *options*: what else it was made by, as one has
    to type it to replay a schedule.
    """
    if arguments.trace:
        return _replay(run_one(arguments.seed, tracing=True))
    summary = run_many(
        run_one, range(arguments.seed, arguments.seed + arguments.schedules), arguments.jobs, batch=batch,
        seconds=arguments.seconds, stop_at=arguments.violations, progress=_progress,
    )  # fmt: skip
    planted = f" --break {arguments.broken}" if arguments.broken else ""
    replay = f"python -m {module} --seed %d --trace{options}{planted}"
    if arguments.json:
        print(json.dumps(_as_json(summary, replay)))
    else:
        print(_report(summary, replay))
    return 1 if summary.violations else 0


def _replay(outcome: Outcome) -> int:
    print("\n".join(outcome.lines))
    print(f"\nseed {outcome.seed}: {outcome.violation or 'no violation'}")
    return 1 if outcome.violation else 0


def _progress(summary: Summary) -> None:
    if sys.stderr.isatty():
        print(f"\r{summary.schedules} schedules, {summary.seconds:.0f} s", end="", file=sys.stderr)


def _as_json(summary: Summary, replay: str) -> dict[str, Any]:
    return {
        "schedules": summary.schedules,
        "seconds": round(summary.seconds, 3),
        "virtual_seconds": round(summary.virtual_seconds, 1),
        "violations": [
            {"seed": o.seed, "promise": o.promise, "text": o.violation, "replay": replay % o.seed}
            for o in summary.violations
        ],
        "coverage": dict(sorted(summary.coverage.items())),
    }


def _report(summary: Summary, replay: str) -> str:
    """The summary, for people."""
    lines = [
        f"{summary.schedules} schedules ({summary.virtual_seconds:.0f} s of virtual time) "
        f"in {summary.seconds:.1f} s, {len(summary.violations)} violations",
        "schedules that contained:",
    ]
    lines += [f"  {count:7d}  {what}" for what, count in sorted(summary.coverage.items())]
    for outcome in summary.violations:
        lines.append(f"VIOLATION, seed {outcome.seed}: {outcome.violation}")
        lines.append(f"  replay: {replay % outcome.seed}")
    return "\n".join(lines)


# --- for tests


def simulate(module: str, *arguments: str) -> dict[str, Any]:
    """Many schedules in processes of their own: nothing is forked from pytest, which may have threads."""
    run = subprocess.run(
        [sys.executable, "-m", module, "--json", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    return json.loads(run.stdout)


def digests_elsewhere(module: str, seeds: range, hash_seed: str) -> list[int]:
    """The digests of *seeds* in another process, with that PYTHONHASHSEED."""
    code = (
        f"from tests.schedules import digest; from {module}.run import run_one\n"
        f"print(*(digest(run_one(seed, tracing=True)) for seed in {seeds!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in run.stdout.split()]

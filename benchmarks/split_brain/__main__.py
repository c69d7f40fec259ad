"""``scripts/validate-split-brain.sh``: network faults, freezes and kills on five hosts, judged by clients.

Exit code 0: every promise was kept; 1: one was broken, or too little ran (the files are kept, and named);
2: bad arguments, or no root.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence

from benchmarks import running
from benchmarks.split_brain.chaos import Chaos, Say
from benchmarks.split_brain.checker import Verdict, judge
from benchmarks.split_brain.stage import Stage
from phalanx import system
from phalanx.testing.netlab import NetLabError


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = running.validation_parser(
        "validate-split-brain.sh", __doc__, seconds=600.0, lasts="how long there are faults"
    )
    parser.add_argument(
        "--available",
        type=float,
        default=80.0,
        help="percent; less to the majority is a failure (default 80)",
    )
    parser.add_argument(
        "--no-vip", action="store_true", help="without a virtual address: clients look around"
    )
    return running.validation_arguments(parser, arguments)


async def validate(
    seed: int, seconds: float, ttl: float, *, available: float = 80.0, vip: bool = True, keep: bool = False
) -> list[str]:
    """Faults for *seconds*, then recovery and judgement → what is wrong. Prints what happens.

    *available*: less than that, in percent, to clients in the majority is wrong, too.
    """
    began = system.now()

    def say(text: str) -> None:
        print(f"{system.now() - began:7.2f}  {text}", flush=True)

    stage = Stage(ttl, vip=vip)
    problems = ["it was interrupted"]
    try:
        async with stage:
            say(f"ready, with NATS on h1 to h3; {seconds:g} s of faults")
            problems = await _validated(stage, random.Random(seed), seconds, available, say)
    finally:
        if problems or keep:
            print(f"history, databases and logs are kept in {stage.folder}")
        else:
            shutil.rmtree(stage.folder, ignore_errors=True)
    return problems


async def _validated(
    stage: Stage, rng: random.Random, seconds: float, available: float, say: Say
) -> list[str]:
    chaos = Chaos(stage, rng, say)
    await chaos.run(seconds)
    problems: list[str] = []
    try:
        await stage.served(system.now())
        await stage.whole()
    except TimeoutError as error:
        problems.append(f"no recovery: {error}")
    say("the clients end: looking at what they were answered")
    stage.stop_clients()
    active = next(iter(stage.nodes.actives("wiki")), "")
    stored = await asyncio.to_thread(stage.stored, active) if active else {}
    verdict = judge(stage.history.events(), stored)
    problems += verdict.problems
    if 100 * verdict.availability < available:
        problems.append(f"available {100 * verdict.availability:.1f} %, less than {available:g} %")
    if not verdict.confirmed or verdict.reigns < 2:
        problems.append(f"{verdict.reigns} reigns and {verdict.confirmed} confirmed writes prove nothing")
    _report(stage, verdict, stored)
    for problem in problems[:30]:
        print(f"VIOLATION: {problem}")
    if len(problems) > 30:
        print(f"… and {len(problems) - 30} more")
    if not problems:
        print("nobody saw two, no epoch went back, nothing that was confirmed is lost, and it recovered")
    return problems


def _report(stage: Stage, verdict: Verdict, stored: dict[str, int]) -> None:
    kinds = Counter(event.data["fault"] for event in stage.history.events("fault"))
    print()
    print("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    print(
        f"{verdict.reigns} reigns gave {verdict.answers} answers; {verdict.confirmed} writes were confirmed"
    )
    print(f"{len(stored)} rows are in the database at the end")
    print(
        f"available to the majority {100 * verdict.availability:.1f} % of {verdict.asked} questions, longest "
        f"silence {verdict.longest_silence_seconds:.1f} s"
    )
    if verdict.excused:
        print(f"{verdict.excused} answers in the documented window of stopped hosts (docs/guarantees.md, G1)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parsed = _arguments(arguments)
    again = (
        f"scripts/validate-split-brain.sh --seconds {parsed.seconds:g} --seed {parsed.seed} "
        f"--ttl {parsed.ttl:g}{' --no-vip' * parsed.no_vip}"
    )
    print(f"seed {parsed.seed}; the same faults again: {again}", flush=True)
    try:
        problems = running.run(
            validate(
                parsed.seed,
                parsed.seconds,
                parsed.ttl,
                available=parsed.available,
                vip=not parsed.no_vip,
                keep=parsed.keep,
            ),
            as_nodes=False,
        )
    except NetLabError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

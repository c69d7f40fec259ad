"""``python -m tests.ring_simulation``: many schedules, or one with its trace. Exit code 1: a violation."""

from __future__ import annotations

import argparse
import json
import os
import sys

from .breaks import BREAKS
from .run import run_many, run_one


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ring_simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="the first one's seed (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after that time (default: never)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("--trace", action="store_true", help="run the one of --seed and print its trace")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--break", dest="broken", default="", choices=["", *BREAKS], help="plant this break")
    return parser.parse_args()


def _replay(seed: int, broken: str) -> int:
    outcome = run_one(seed, broken, tracing=True)
    print("\n".join(outcome.lines))
    return 1 if outcome.violation else 0


def replay_command(seed: int, broken: str) -> str:
    """How to see that schedule again."""
    planted = f" --break {broken}" if broken else ""
    return f"python -m tests.ring_simulation --seed {seed} --trace{planted}"


def main() -> int:
    """The command line."""
    arguments = _arguments()
    broken: str = arguments.broken
    if arguments.trace:
        return _replay(arguments.seed, broken)
    summary = run_many(arguments.seed, arguments.schedules, arguments.jobs, broken, seconds=arguments.seconds)
    violations = [
        {"seed": o.seed, "promise": o.promise, "text": o.violation, "replay": replay_command(o.seed, broken)}
        for o in summary.violations
    ]
    coverage = dict(sorted(summary.coverage.items()))
    if arguments.json:
        found = {"schedules": summary.schedules, "seconds": round(summary.seconds, 3)}
        found |= {"virtual_seconds": round(summary.virtual_seconds, 1)}
        print(json.dumps({**found, "violations": violations, "coverage": coverage}))
    else:
        print(f"{summary.schedules} schedules in {summary.seconds:.0f} s; so many of them contained:")
        print("\n".join(f"  {count:7d}  {what}" for what, count in coverage.items()))
        print(
            "\n".join(f"{each['text']}\n  replay: {each['replay']}" for each in violations) or "no violation"
        )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

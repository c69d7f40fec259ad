"""``python -m tests.simulation``: run schedules, or replay one."""

from __future__ import annotations

import argparse
import json
import os
import sys

from .breaks import BREAKS
from .run import Summary, run_many, run_one


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20_000, help="how many (default 20000)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--seed", type=int, default=1, help="the first seed; with --trace the only one")
    parser.add_argument("--hold", action="store_true", help="the app holds when NATS is lost")
    parser.add_argument("--trace", action="store_true", help="replay exactly one schedule, readably")
    parser.add_argument(
        "--break", dest="broken", default="", choices=["", *BREAKS], help="plant a rule break"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after that many seconds")
    parser.add_argument("--violations", type=int, default=1, help="stop after that many violations")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    return parser.parse_args()


def replay_command(seed: int, broken: str, holds: bool) -> str:
    """What to type to see a schedule again."""
    options = (" --hold" if holds else "") + (f" --break {broken}" if broken else "")
    return f"python -m tests.simulation --seed {seed} --trace{options}"


def _replay(seed: int, broken: str, holds: bool) -> int:
    outcome = run_one(seed, broken, tracing=True, holds=holds)
    print("\n".join(outcome.lines))
    print(f"\nseed {seed}: {outcome.violation or 'no violation'}")
    return 1 if outcome.violation else 0


def _progress(summary: Summary) -> None:
    if sys.stderr.isatty():
        print(f"\r{summary.schedules} schedules, {summary.seconds:.0f} s", end="", file=sys.stderr)


def report(summary: Summary, broken: str = "", *, holds: bool = False) -> str:
    """The summary, for people."""
    lines = [
        f"{summary.schedules} schedules ({summary.virtual_seconds:.0f} s of virtual time) "
        f"in {summary.seconds:.1f} s, {len(summary.violations)} violations",
        "schedules that contained:",
    ]
    lines += [f"  {count:7d}  {what}" for what, count in sorted(summary.coverage.items())]
    for outcome in summary.violations:
        lines.append(f"VIOLATION, seed {outcome.seed}: {outcome.violation}")
        lines.append(f"  replay: {replay_command(outcome.seed, broken, holds)}")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    arguments = _arguments()
    if arguments.trace:
        return _replay(arguments.seed, arguments.broken, arguments.hold)
    summary = run_many(
        arguments.seed, arguments.schedules, arguments.jobs, arguments.broken, holds=arguments.hold,
        seconds=arguments.seconds, stop_at=arguments.violations, progress=_progress,
    )  # fmt: skip
    if arguments.json:
        print(
            json.dumps(
                {
                    "schedules": summary.schedules,
                    "seconds": round(summary.seconds, 3),
                    "virtual_seconds": round(summary.virtual_seconds, 1),
                    "violations": [
                        {
                            "seed": o.seed,
                            "promise": o.promise,
                            "text": o.violation,
                            "replay": replay_command(o.seed, arguments.broken, arguments.hold),
                        }
                        for o in summary.violations
                    ],
                    "coverage": dict(sorted(summary.coverage.items())),
                }
            )
        )
    else:
        print(report(summary, arguments.broken, holds=arguments.hold))
    return 1 if summary.violations else 0


if __name__ == "__main__":
    sys.exit(main())

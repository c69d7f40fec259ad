"""``python -m benchmarks [NAME…] [--runs N] [--json]``.

Exit code 0: every bar that ran is met; 1: one is missed, or a benchmark failed; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import os
import sys
import traceback
from collections.abc import Sequence

import msgspec

from benchmarks import running
from benchmarks.figures import HEADER, Benchmark, Run, bar_text, figures, line, row
from benchmarks.table import BENCHMARKS


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "whole number above 0"  # argparse shows it


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures what Phalanx promises, on real processes and real nats-servers.",
        epilog="Exit code 0: every bar that ran is met; 1: one is missed; 2: bad arguments.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; 'failover.*' works (default: all)")
    parser.add_argument("--runs", type=_positive, help="how many measurements each (default: see --list)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parsed = parser.parse_args(arguments)
    try:
        parsed.chosen = chosen(parsed.names)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks that *names* (or patterns) mean, in the table's order. Raises ValueError."""
    wanted: set[str] = set()
    every = [benchmark.name for benchmark in BENCHMARKS]
    for name in names:
        found = fnmatch.filter(every, name)
        if not found:
            near = difflib.get_close_matches(name, every, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(every)}"
            raise ValueError(f"no benchmark {name!r}; {hint}")
        wanted.update(found)
    return [benchmark for benchmark in BENCHMARKS if not names or benchmark.name in wanted]


async def measure(benchmark: Benchmark, runs: int | None) -> Run:
    """Run one benchmark. What goes wrong is a problem of the run, never an exception."""
    run = Run(benchmark.name, benchmark.runs if benchmark.fixed or runs is None else runs)
    run.say(f"{benchmark.work} (load average {os.getloadavg()[0]:.1f})")
    if benchmark.fixed and runs is not None and runs != benchmark.runs:
        run.say("--runs means nothing here")
    try:
        await benchmark.measure(run)
    except Exception as error:
        traceback.print_exc()
        run.problems.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if len(run.values) < run.runs and not run.problems:
        run.problems.append(f"only {len(run.values)} of {run.runs} measurements")
    for problem in run.problems:
        run.say(f"PROBLEM: {problem}")
    return run


def _show_list() -> None:
    for benchmark in BENCHMARKS:
        runs = f"{benchmark.runs} runs" + (", always" if benchmark.fixed else "")
        print(f"{benchmark.name:22} {benchmark.work}; {bar_text(benchmark)} {benchmark.unit}; {runs}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parsed = _arguments(arguments)
    if parsed.list:
        _show_list()
        return 0
    every_bar_met = True
    if not parsed.json:
        print(line(HEADER), flush=True)
    for benchmark in parsed.chosen:
        run = running.run(measure(benchmark, parsed.runs))
        result = figures(benchmark, run)
        every_bar_met = every_bar_met and result.met
        text = msgspec.json.encode(result).decode() if parsed.json else line(row(benchmark, run, result))
        print(text, flush=True)
    return 0 if every_bar_met else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

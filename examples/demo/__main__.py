"""``make demo``. Exit codes: 0 every promise was kept, 1 one was broken, 2 bad arguments, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import signal
import sys
from pathlib import Path
from types import FrameType

from examples.demo import vip_part
from examples.demo.client import Client
from examples.demo.database_part import DatabasePart
from examples.demo.hosts import Hosts
from examples.demo.http_part import HttpPart
from examples.demo.node import NOTES, WIKI
from examples.demo.part import Failed, Part
from examples.demo.programs import Programs
from examples.demo.promises import FAULTS, Fault, Outcome
from examples.demo.timeline import Timeline
from examples.demo.writer import Writer

VIP = "vip"
"""The part with a virtual address, as --only knows it."""


def main() -> int:
    """Run it."""
    arguments = _arguments()
    wanted: tuple[Fault, ...] = FAULTS
    if arguments.only:
        wanted = tuple(each for each in FAULTS if each.key in arguments.only)
    if sys.platform != "linux":
        print("the demo needs Linux: it looks into /proc to see which programs run", file=sys.stderr)
        return 2
    timeline = Timeline(as_json=arguments.json)
    # The second Ctrl-C must not interrupt the clean-up after the first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return _run(wanted, timeline, arguments.keep_logs, not arguments.only or VIP in arguments.only)
    except KeyboardInterrupt:
        timeline.close()
        print("interrupted; everything was stopped", file=sys.stderr)
        return 130


def _run(wanted: tuple[Fault, ...], timeline: Timeline, keep_logs: Path | None, with_vip: bool) -> int:
    outcomes: list[Outcome] = []
    problems: list[str] = []
    requests = 0
    for app in (WIKI, NOTES):
        faults = tuple(each for each in wanted if each.app == app)
        if not faults:
            continue
        with contextlib.ExitStack() as stack:
            stack.callback(timeline.close)
            part = _part(app, stack, timeline, keep_logs)
            try:
                part.run(faults, len(outcomes) + 1, len(wanted))
            except Failed as error:
                part.fail(str(error))
            outcomes += part.outcomes
            problems += part.problems
            requests += part.requests
    if with_vip:
        found, sent = vip_part.run(timeline)
        problems += found
        requests += sent
    timeline.summary(outcomes, problems, requests)
    kept = not problems and all(outcome.is_kept for outcome in outcomes)
    if not kept and not timeline.is_json:
        hint = f"the logs are in {keep_logs}" if keep_logs else "run it again with --keep-logs DIR"
        print(f"To find out why: {hint}")
    return 0 if kept else 1


def _part(app: str, stack: contextlib.ExitStack, timeline: Timeline, keep_logs: Path | None) -> Part:
    """With hosts of its own, all of which end with *stack*."""
    run = secrets.token_hex(8)
    programs = Programs(run)
    stack.callback(programs.kill_left)
    hosts = Hosts(run, app)
    stack.callback(hosts.stop, keep_logs)
    stack.enter_context(programs)
    if app == WIKI:
        return HttpPart(hosts, stack.enter_context(Client(hosts.backend_port)), programs, timeline)
    return DatabasePart(hosts, stack.enter_context(Writer(hosts.backend_port)), programs, timeline)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Three hosts on this machine, nine faults, and what clients see of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="faults:\n"
        + "\n".join(f"  {each.key:<13} {each.title}" for each in FAULTS)
        + f"\n  {VIP:<13} all of the part with a virtual address (as root)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="copy all logs there at the end")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*(each.key for each in FAULTS), VIP],
        metavar="FAULT",
        help="only this fault (may be given several times)",
    )
    return parser.parse_args()


def _interrupt(number: int, _: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""``scripts/validate-replication.sh``: kills under load, and a checker for what came of them.

Exit code 0: every promise was kept; 1: one was broken (the files are kept, and named); 2: bad arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import running
from benchmarks.replication_validation.chaos import Chaos, Say
from benchmarks.replication_validation.checker import Evidence, Figures, figures, judge, spread
from benchmarks.replication_validation.evidence import Reader, collect, told
from benchmarks.stage import Stage
from phalanx import system
from phalanx.errors import PhalanxError
from phalanx.testing.nats import NatsCluster

RECOVERY_SECONDS = 60.0
LEAST_AVAILABLE = 0.2
"""Of the time between the first commit and the last; less proves nothing."""


class Verdict(msgspec.Struct, frozen=True):
    """What came of it. ``problems`` is empty when every promise was kept."""

    problems: tuple[str, ...]
    figures: Figures | None = None


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = running.validation_parser(
        "validate-replication.sh", __doc__, seconds=900.0, lasts="within which the kills happen"
    )
    parser.add_argument("--failovers", type=int, default=30, help="kills of the writer (default 30)")
    parsed = running.validation_arguments(parser, arguments)
    if parsed.failovers < 1:
        parser.error("--failovers must be 1 or more")
    return parsed


async def validate(seed: int, failovers: int, seconds: float, ttl: float, *, keep: bool = False) -> Verdict:
    """Faults, recovery, judgement; prints what happens."""
    began = system.now()

    def say(text: str) -> None:
        print(f"{system.now() - began:7.2f}  {text}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix=f"phalanx-validate-{seed}-"))
    stage = Stage(
        ttl=ttl,
        nats=NatsCluster(3),
        tick_seconds=0.02,
        database=str(folder / "{node}" / "wiki.db"),
        commit_seconds=0.04,
        storms=True,
        stop_file=str(folder / "stop"),
    )
    verdict = Verdict(("it was interrupted",))
    try:
        async with stage:
            try:
                say(f"ready: {stage.active()} is active")
                verdict = await _validated(stage, folder, random.Random(seed), failovers, seconds, say)
            finally:
                if verdict.problems or keep:
                    _keep(stage, folder)
    finally:
        if verdict.problems or keep:
            print(f"databases, history and logs are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return verdict


async def _validated(
    stage: Stage, folder: Path, rng: random.Random, failovers: int, seconds: float, say: Say
) -> Verdict:
    chaos = Chaos(stage, rng, say)
    async with contextlib.AsyncExitStack() as stack:
        reader = await stack.enter_async_context(Reader(stage, folder))
        await chaos.run(failovers, seconds)
        problems = list(chaos.problems)
        try:
            await _rest(stage, folder, say)
        except TimeoutError as error:
            said = str(error).partition("\n")[0]
            try:
                said = f"{said}\n{await told(stage)}"
            except PhalanxError as unheard:
                said = f"{said}\n{unheard}"
            return _told(Verdict((*problems, f"no recovery: {said}")))
    say("all nodes have settled: looking at what is there")
    try:
        evidence = await collect(stage, folder, chaos.inflicted, reader.samples)
    except (PhalanxError, OSError, TimeoutError) as error:
        return _told(Verdict((*problems, f"what is there cannot be read: {type(error).__name__}: {error}")))
    for kind in ("inflicted", "samples", "audit"):
        lines = [msgspec.json.encode(each) + b"\n" for each in getattr(evidence, kind)]
        await asyncio.to_thread((folder / kind).write_bytes, b"".join(lines))
    problems += judge(evidence)
    found = figures(evidence)
    problems += _too_little(found, failovers)
    _report(evidence, found)
    return _told(Verdict(tuple(problems), found))


async def _rest(stage: Stage, folder: Path, say: Say) -> None:
    """Wait until something is confirmed again, then let nobody write any more, and all settle."""
    await _event(stage, "confirmed", system.now())
    moment = system.now()
    await asyncio.to_thread((folder / "stop").touch)
    await _event(stage, "rested", moment)
    say("the writer is at rest")
    await stage.wait_steady(timeout=RECOVERY_SECONDS)


async def _event(stage: Stage, kind: str, since: float) -> None:
    deadline = system.now() + RECOVERY_SECONDS
    while not stage.since(since, kind):
        if system.now() > deadline:
            raise TimeoutError(f"nothing was {kind} within {RECOVERY_SECONDS:g} s\n{stage.last_words()}")
        await asyncio.sleep(0.05)


def _too_little(found: Figures, failovers: int) -> list[str]:
    """Where nothing ran, nothing can have been lost: that proves nothing."""
    problems: list[str] = []
    if found.reigns < failovers:
        problems.append(f"only {found.reigns} reigns wrote anything, in {failovers} failovers")
    if found.available < LEAST_AVAILABLE:
        problems.append(f"there were commits only {100 * found.available:.0f} % of the time")
    if found.confirmed < failovers or found.committed < 50 * failovers:
        problems.append(f"only {found.committed} commits and {found.confirmed} confirmed barriers")
    if not found.lag_ms:
        problems.append("no replica could be read")
    return problems


def _report(evidence: Evidence, found: Figures) -> None:
    kinds: dict[str, int] = {}
    for each in evidence.inflicted:
        kinds[each.kind] = kinds.get(each.kind, 0) + 1
    lags = sorted(found.lag_ms)
    print()
    print("inflicted: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    print(
        f"{found.reigns} reigns wrote {found.committed} rows; {found.confirmed} barriers were confirmed, "
        f"{found.failed_barriers} failed; {found.failed_commits} commits failed"
    )
    print(f"available {100 * found.available:.1f} %, longest gap {found.longest_gap_seconds:.1f} s")
    for kind, losses in sorted(found.losses.items()):
        print(f"lost transactions, {kind} ({len(losses)}): min/median/max {spread(losses)}")
    if lags:
        median, at_95 = lags[len(lags) // 2], lags[min(len(lags) - 1, int(0.95 * len(lags)))]
        print(
            f"{len(lags)} looks at replicas of running nodes: lag median/p95/max "
            f"{median:.0f} / {at_95:.0f} / {lags[-1]:.0f} ms"
        )
    print(f"{len(evidence.aside)} databases were set aside")
    print("audit: " + ", ".join(f"{action} {count}" for action, count in sorted(found.actions.items())))


def _told(verdict: Verdict) -> Verdict:
    for problem in verdict.problems[:30]:
        print(f"VIOLATION: {problem}")
    if len(verdict.problems) > 30:
        print(f"… and {len(verdict.problems) - 30} more")
    if not verdict.problems:
        print("nothing confirmed was lost, no loss was unreported, all databases are sound and the same")
    return verdict


def _keep(stage: Stage, folder: Path) -> None:
    shutil.copy(stage.history.path, folder / "history")
    for node in stage.nodes:
        (folder / f"{node.node}.log").write_text(node.log())
    if stage.nats is not None:
        for i in range(stage.nats.size):
            (folder / f"nats-{stage.nats.name(i)}.log").write_text(stage.nats.log(i))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parsed = _arguments(arguments)
    again = (
        f"scripts/validate-replication.sh --failovers {parsed.failovers} --seconds {parsed.seconds:g} "
        f"--seed {parsed.seed} --ttl {parsed.ttl:g}"
    )
    print(f"seed {parsed.seed}; the same faults again: {again}", flush=True)
    verdict = running.run(
        validate(parsed.seed, parsed.failovers, parsed.seconds, parsed.ttl, keep=parsed.keep), as_nodes=False
    )
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""``scripts/validate-election.sh``: random faults on real processes, and a checker for what came of them.

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

from benchmarks import running
from benchmarks.chaos import Chaos
from benchmarks.checker import WRITE_KEY, Verdict, judge
from benchmarks.stage import APP, Stage
from phalanx import system
from phalanx.testing.faults import TcpProxy
from phalanx.testing.nats import HOST, NatsCluster

NODES = 3
RECOVERY_SECONDS = 60.0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = running.validation_parser(
        "validate-election.sh", __doc__, seconds=60.0, lasts="how long there are faults"
    )
    return running.validation_arguments(parser, arguments)


async def validate(seed: int, seconds: float, ttl: float, *, keep: bool = False) -> Verdict:
    """Faults for *seconds*, then recovery; prints what happens."""
    began = system.now()

    def say(text: str) -> None:
        print(f"{system.now() - began:7.2f}  {text}", flush=True)

    async with contextlib.AsyncExitStack() as stack:
        # Where nobody listens: clients that are told of other servers would find a way around their proxies.
        nats = NatsCluster(3, advertise=[f"{HOST}:{port}" for port in (1, 2, 3)])
        links: dict[str, list[TcpProxy]] = {}
        for i in range(NODES):
            own = [TcpProxy(HOST, nats.port((i + j) % nats.size)) for j in range(nats.size)]
            links[f"n{i + 1}"] = [await stack.enter_async_context(link) for link in own]
        stage = Stage(
            ttl=ttl,
            nats=nats,
            count=NODES,
            urls_of=lambda i: tuple(link.url for link in links[f"n{i + 1}"]),
            tick_seconds=0.004,
            writes=True,
            distinct_keys=True,
            write_seconds=0.02,
        )
        await stack.enter_async_context(stage)
        say(f"ready: {stage.active()} is active")
        chaos = Chaos(stage, {node: tuple(own) for node, own in links.items()}, random.Random(seed), ttl, say)
        await chaos.run(seconds)
        problems = await _recover(stage)
        stage.read()
        verdict = judge(stage.events, await stored_writes(stage), chaos.wakings)
        verdict = Verdict(
            (*problems, *chaos.problems, *verdict.problems),
            verdict.sections,
            verdict.acknowledged,
            verdict.refused + chaos.refused,
            verdict.excused,
        )
        _report(chaos, verdict)
        if verdict.problems or keep:
            _keep(stage, seed)
        return verdict


async def _recover(stage: Stage) -> list[str]:
    """G9: the platform comes back by itself, and works."""
    try:
        active = await stage.wait_steady(timeout=RECOVERY_SECONDS)
    except TimeoutError as error:
        return [f"G9: no recovery: {error}"]
    began = system.now()
    while not stage.since(began, "written"):
        if system.now() > began + 10:
            return [f"G9: {active} is active, but writes nothing"]
        await asyncio.sleep(0.05)
    return []


async def stored_writes(stage: Stage) -> dict[str, int]:
    """Key → revision of all writes of the test program that the server has."""
    subjects = stage.names.key_subject(stage.names.app_bucket(APP), ">")
    records = await stage.bus.snapshot(stage.app_stream(), subjects, timeout=60)
    named = [(".".join(record.subject.rsplit(".", 3)[-3:]), record.revision) for record in records]
    return {key: revision for key, revision in named if key.startswith(WRITE_KEY)}


def _report(chaos: Chaos, verdict: Verdict) -> None:
    print()
    print("faults: " + ", ".join(f"{name} {count}" for name, count in sorted(chaos.inflicted.items())))
    print(
        f"{verdict.sections} active sections, {verdict.acknowledged} acknowledged writes, "
        f"{verdict.refused} writes of old leaders refused"
    )
    if verdict.excused:
        print(f"{verdict.excused} signs of life of hosts that had just been continued (docs/guarantees.md)")
    for problem in verdict.problems[:20]:
        print(f"VIOLATION: {problem}")
    if len(verdict.problems) > 20:
        print(f"… and {len(verdict.problems) - 20} more")
    if not verdict.problems:
        print(
            "no overlap, epochs grew, old leaders wrote nothing, no acknowledged write was lost; it recovered"
        )


def _keep(stage: Stage, seed: int) -> None:
    kept = Path(tempfile.mkdtemp(prefix=f"phalanx-validate-{seed}-"))
    shutil.copy(stage.history.path, kept / "history")
    for node in stage.nodes:
        (kept / f"{node.node}.log").write_text(node.log())
    if stage.nats is not None:
        for i in range(stage.nats.size):
            (kept / f"nats-{stage.nats.name(i)}.log").write_text(stage.nats.log(i))
    print(f"history and logs are kept in {kept}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parsed = _arguments(arguments)
    again = (
        f"scripts/validate-election.sh --seconds {parsed.seconds:g} --seed {parsed.seed} --ttl {parsed.ttl:g}"
    )
    print(f"seed {parsed.seed}; the same faults again: {again}", flush=True)
    verdict = running.run(validate(parsed.seed, parsed.seconds, parsed.ttl, keep=parsed.keep), as_nodes=False)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""The nats-servers die one after the other, under an app that writes all the time."""

from __future__ import annotations

import asyncio
import itertools

from benchmarks.figures import Run
from benchmarks.stage import APP, Stage
from phalanx import system
from phalanx.ports import Record

TTL = 2.0
WRITE_SECONDS = 0.02
DOWN_SECONDS = 3.0
"""How long a killed server stays away: longer than the TTL, so that a session which needs it would end."""

WRITING_SECONDS = 1.0
"""Of writes before each kill, with everything healthy."""


async def kill_in_turn(run: Run) -> None:
    """SIGKILL each server in turn → failovers caused + acknowledged writes lost, by each kill."""
    async with Stage(ttl=TTL, writes=True, distinct_keys=True, write_seconds=WRITE_SECONDS) as stage:
        assert stage.nats is not None
        acknowledged: dict[str, int] = {}
        led = failovers = 0
        for number in range(run.runs):
            victim = number % stage.nats.size
            # The worst case: the victim leads the app's stream. Steering objects on the active node's host.
            leads = await stage.move_stream_leader(stage.nats.name(victim))
            led += leads
            await asyncio.sleep(WRITING_SECONDS)
            began = system.now()
            stage.nats.kill(victim)
            await asyncio.sleep(DOWN_SECONDS)
            stage.nats.start(victim)
            await stage.nats.ready(60)
            await stage.wait_steady()
            await _writes_again(stage, began)
            changes = stage.since(began, "active")
            written = stage.since(0.0, "written")
            acknowledged |= {str(e.data["key"]): int(e.data["revision"]) for e in written}
            lost = await _lost(stage, acknowledged)
            failovers += len(changes)
            run.add(
                len(changes) + len(lost),
                f"{len(changes)} failovers, {len(lost)} of {len(acknowledged)} acknowledged writes lost; "
                f"{stage.nats.name(victim)} killed{', the leader of the stream' if leads else ''}; "
                f"no write for {_longest_gap(stage, began):.2f} s",
            )
            stage.forget()
        run.say(f"{led} of {run.runs} servers led the app's stream; {failovers} failovers")
        if run.runs >= stage.nats.size and not led:
            run.problems.append("no server was killed that led the app's stream")


async def _writes_again(stage: Stage, since: float) -> None:
    deadline = system.now() + 30
    while not [e for e in stage.since(system.now() - 0.5, "written") if e.at > since]:
        if system.now() > deadline:
            raise TimeoutError(f"no write was acknowledged for 30 s\n{stage.last_words()}")
        await asyncio.sleep(0.1)


async def _lost(stage: Stage, acknowledged: dict[str, int]) -> list[str]:
    """The keys of writes that were acknowledged and are not there, or not as they were written."""
    found = {_key(stage, record): record.revision for record in await _records(stage)}
    return [key for key, revision in acknowledged.items() if found.get(key) != revision]


async def _records(stage: Stage) -> list[Record]:
    subjects = stage.names.key_subject(stage.names.app_bucket(APP), ">")
    return await stage.bus.snapshot(stage.app_stream(), subjects, timeout=30)


def _key(stage: Stage, record: Record) -> str:
    """The app's own name of a stored key: its last three parts."""
    return ".".join(record.subject.rsplit(".", 3)[-3:])


def _longest_gap(stage: Stage, since: float) -> float:
    """The longest time without an acknowledged write, in seconds."""
    at = [since, *(e.at for e in stage.since(since, "written"))]
    return max((b - a for a, b in itertools.pairwise(at)), default=0.0)

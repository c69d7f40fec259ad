"""What is promised for each fault, and whether it was kept. Pure: numbers in, words out.

The bounds are those of the faults table in docs/guarantees.md. They are Phalanx's share: from the fault to
the start of the program on another node. How long the program then takes until it answers is its own affair,
is measured apart, and is part of the outage that the client sees.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from examples.demo.ledger import Rows
from examples.demo.node import NOTES, STALL_LIMIT_SECONDS, TTL_SECONDS, WIKI

Key = Literal[
    "kill", "handover", "nats", "freeze", "host", "db-litestream", "db-handover", "db-kill", "db-power"
]

_MOST_BUSY_SECONDS = 0.25
"""Three hosts share this machine with whatever else it does. For what the kernel says that processes had to
wait for a CPU a bound is longer, by this much at most: a busy laptop is no broken promise."""

_CLIENT_GRAIN_SECONDS = 0.02
"""The client asks every 5 ms, and an answer takes some: so exactly is an outage known."""


class Fault(msgspec.Struct, frozen=True):
    """One fault. ``bound_seconds``: the new program is started within; None: nothing may move at all.

    ``app``: to which app, so in which part of the run."""

    key: Key
    short: str
    title: str
    promise: str
    bound_seconds: float | None
    since: Literal["fault", "old program's end"] = "fault"
    app: Literal["wiki", "notes"] = WIKI


FAULTS: tuple[Fault, ...] = (
    Fault(
        "kill",
        "node killed",
        "SIGKILL of the active node's process",
        "what ran is killed, the keeper releases, another node takes over, whatever the TTL (G4)",
        0.5,
    ),
    Fault(
        "handover",
        "hand-over",
        "graceful hand-over (stepdown)",
        "the old program has ended before the new one starts, and nobody waits for a timeout (G10)",
        0.1,
        "old program's end",
    ),
    Fault(
        "nats",
        "NATS server killed",
        "SIGKILL of the NATS server that leads the app's stream",
        "no failover, no failed request",
        None,
    ),
    Fault(
        "freeze",
        "node frozen",
        "SIGSTOP of the active node",
        "its keeper fences it before another node begins: no overlap (G1)",
        STALL_LIMIT_SECONDS + 0.5,
    ),
    Fault(
        "host",
        "host dead",
        "a whole host dies: node, keeper, NATS server, program",
        "the session expires, another node takes over",
        TTL_SECONDS * 1.05 + 0.2,
    ),
    Fault(
        "db-litestream",
        "Litestream killed",
        "SIGKILL of Litestream, which reads the active node's database",
        "no failover, no failed write, no row lost",
        None,
        app=NOTES,
    ),
    Fault(
        "db-handover",
        "hand-over",
        "graceful hand-over (stepdown) under writes",
        "the rest of the database is in the log before another node leads: no acknowledged row is lost",
        0.5,
        "old program's end",
        app=NOTES,
    ),
    Fault(
        "db-kill",
        "node killed",
        "SIGKILL of the active node's process in the middle of a write",
        "no confirmed row is lost (G3); what the log lacked is kept in a file, and counted",
        0.5,
        app=NOTES,
    ),
    Fault(
        "db-power",
        "power lost",
        "a whole host dies in the middle of a write: node, keeper, Litestream, program, NATS server",
        "no confirmed row is lost (G3); what the log lacked is kept in a file, and counted",
        TTL_SECONDS * 1.05 + 0.5,
        app=NOTES,
    ),
)


class Outcome(msgspec.Struct, frozen=True):
    """What came of a fault. Times in seconds; ``None`` where nothing of the kind happened.

    ``takeover``: from the fault to the start of the new program; of a hand-over, from the end of the old
    program, which may take its time to end: ``program_stop``. ``program_start``: from the new program's start
    to its first answer. ``outage``: what the client saw, the longest one. ``ended``: how the old one ended.
    ``waited_for_cpu``: how long, of that time, the kernel saw processes of this machine wait for a CPU.
    ``rows``: what became of those that the client wrote, where there is a database.
    """

    fault: Key
    before: str
    epoch_before: int
    after: str
    epoch_after: int
    ended: str
    takeover: float | None = None
    program_start: float | None = None
    program_stop: float = 0.0
    waited_for_cpu: float = 0.0
    outage: float = 0.0
    failed_requests: int = 0
    rows: Rows | None = None
    broken: tuple[str, ...] = ()

    @property
    def is_kept(self) -> bool:
        """Whether every promise about this fault was kept."""
        return not self.broken


def fault(key: str) -> Fault:
    """The fault of that name."""
    return next(each for each in FAULTS if each.key == key)


def allowance(outcome: Outcome) -> float:
    """What is added to the bound because the machine was busy, in seconds."""
    return min(_MOST_BUSY_SECONDS, outcome.waited_for_cpu)


def judge(outcome: Outcome, overlaps: tuple[str, ...] = ()) -> Outcome:
    """*outcome* with all that contradicts the promises; *overlaps*: sightings of two programs at once."""
    promised = fault(outcome.fault)
    broken = list(overlaps)
    if promised.bound_seconds is None:
        broken += _moved(outcome)
    else:
        broken += _late(outcome, promised.bound_seconds + allowance(outcome))
    return msgspec.structs.replace(outcome, broken=tuple(broken))


def judge_rows(outcome: Outcome, rows: Rows) -> Outcome:
    """*outcome*, judged already, with what became of the rows."""
    return msgspec.structs.replace(outcome, rows=rows, broken=(*outcome.broken, *rows.broken))


def _moved(outcome: Outcome) -> list[str]:
    problems: list[str] = []
    if (outcome.before, outcome.epoch_before) != (outcome.after, outcome.epoch_after):
        problems.append(
            f"it caused a failover: {outcome.before} (epoch {outcome.epoch_before}) → "
            f"{outcome.after or 'nobody'} (epoch {outcome.epoch_after})"
        )
    if outcome.failed_requests:
        problems.append(f"{outcome.failed_requests} requests failed, for {milliseconds(outcome.outage)}")
    return problems


def _late(outcome: Outcome, bound: float) -> list[str]:
    if not outcome.after:
        return ["nobody took over"]
    problems: list[str] = []
    if outcome.after == outcome.before:
        problems.append(f"{outcome.before} is active again, nobody else took over")
    if outcome.epoch_after <= outcome.epoch_before:
        problems.append(f"the epoch did not grow: {outcome.epoch_before}, then {outcome.epoch_after} (G2)")
    if outcome.takeover is None or outcome.takeover > bound:
        shown = "never seen" if outcome.takeover is None else f"after {milliseconds(outcome.takeover)}"
        problems.append(f"the new program was started {shown}, promised: {milliseconds(bound)}")
    allowed = bound + outcome.program_stop + (outcome.program_start or 0.0) + _CLIENT_GRAIN_SECONDS
    if outcome.outage > allowed:
        problems.append(f"the client saw {milliseconds(outcome.outage)}, allowed: {milliseconds(allowed)}")
    return problems


def milliseconds(seconds: float) -> str:
    """For people."""
    return f"{seconds * 1000:,.0f} ms"

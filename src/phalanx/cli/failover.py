"""``phalanx failover``: a forced one, and what happened in those that were."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

from cyclopts import App, Parameter

from phalanx.cli import exits, output
from phalanx.cli.switchover import by_option, check_wait, show
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_operator import FailoverPlan, Loss, Switched
from phalanx.errors import ConfigError
from phalanx.observe.failovers import Failover

failover = App(
    name="failover",
    help="""Force an app to another node, or show how apps changed hands (`failover show`).

    For when the active node is ill or does not answer. It says what would be lost and asks. A node that
    answers ends at once, without grace; of one that does not the end of its session is waited for: also by
    force no two nodes are ever active. Exit code 1 when the answer was no or nobody took over, 2 for an
    unknown app or a node that cannot take over, and without a terminal and `--yes`.
    """,
)

_WHERE = Where()


@failover.default
def force(
    app: Annotated[str, Parameter(help="The app that another node should run.")],
    /,
    *,
    to: Annotated[
        str | None, Parameter(help="The node that should take over; else the best standby.")
    ] = None,
    yes: Annotated[bool, Parameter(help="Do not ask.")] = False,
    reason: Annotated[str, Parameter(help="Why, for the audit log.")] = "",
    wait: Annotated[float, Parameter(help="How long to wait for the next one, in seconds.")] = 60.0,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Have another node run an app although the active one is ill or does not answer."""
    check_wait(wait)
    if not (yes or sys.stdin.isatty()):
        raise ConfigError("--yes", None, "a failover by force has to be confirmed", "give --yes")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    try:
        plan = asyncio.run(_plan(client, app, to))
        for line in described(plan):
            output.note(line) if json or not yes else output.say(line)
        # Outside of any event loop, or Ctrl-C would wait for a thread that waits for the answer.
        if not yes and not _confirmed(f"fail {app} over to {plan.target}?"):
            output.note("nothing was changed")
            return exits.NO
        done = asyncio.run(_force(client, plan, reason, wait))
    except ConfigError as error:
        raise by_option(error) from None
    show(done, json=json)
    return exits.OK


async def _plan(client: PlatformClient, app: str, to: str | None) -> FailoverPlan:
    async with client:
        return await client.operator.failover_plan(app, to)


async def _force(client: PlatformClient, plan: FailoverPlan, reason: str, wait: float) -> Switched:
    async with client:
        return await client.operator.failover(plan, reason=reason, timeout=wait)


# --- what happened


@failover.command(name="show")
def show_failovers(
    failover_id: Annotated[
        str | None, Parameter(name="ID", help="Which, as the list names it: app/epoch. Else the last ones.")
    ] = None,
    /,
    *,
    app: Annotated[str | None, Parameter(help="Only those of this app.")] = None,
    limit: Annotated[int, Parameter(help="The newest so many.")] = 20,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show how apps changed hands: a list, or one of them step by step.

    From the audit log: from the end of the previous leader as it was seen to the first healthy answer of the
    next. Exit code 2 for one that the audit log does not have.
    """
    if not 1 <= limit <= 100_000:
        raise ConfigError("--limit", limit, "out of range", "choose 1 to 100000")
    wanted = _parsed(failover_id) if failover_id is not None else None
    if wanted is not None and app not in (None, wanted[0]):
        raise ConfigError("--app", app, f"{failover_id} is of another app", "leave it out")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    if wanted is not None:
        found = asyncio.run(_timeline(client, *wanted))
        output.emit(found, pretty=True) if json else _show_timeline(found)
        return exits.OK
    listed = asyncio.run(_listed(client, app, limit))
    if json:
        output.emit({"platform": platform, "failovers": listed}, pretty=True)
    elif not listed:
        output.say(f"the audit log of {platform} has no failover")
    else:
        output.table(("ID", "TIME", "FROM", "TO", "BECAUSE", "FREE", "ACTIVE", "HEALTHY"), _rows(listed))
    return exits.OK


def _parsed(text: str) -> tuple[str, int]:
    app, separator, epoch = text.partition("/")
    if not separator or not epoch.isascii() or not epoch.isdigit() or len(epoch) > 18:
        raise ConfigError("ID", text, "not app/epoch", "take one of: phalanx failover show")
    return app, int(epoch)


async def _timeline(client: PlatformClient, app: str, epoch: int) -> Failover:
    async with client:
        return await client.operator.failover_timeline(app, epoch)


async def _listed(client: PlatformClient, app: str | None, limit: int) -> list[Failover]:
    async with client:
        return await client.operator.failovers(app, limit=limit)


def _rows(listed: list[Failover]) -> list[tuple[str | tuple[str, str], ...]]:
    return [
        (
            each.id,
            output.clock(each.at),
            each.previous or "-",
            (each.node, "bold" if each.outcome == "active" else "red"),
            _because(each),
            _optional(each.vacant_seconds if each.previous else None),
            _optional(each.activation_seconds) if each.outcome != "failed" else ("failed", "red"),
            _optional(each.healthy_seconds),
        )
        for each in listed
    ]


def _because(each: Failover) -> str:
    if not each.previous:
        return "the first known"
    how = {"session-over": "session over", "released": "released"}.get(each.how, each.how)
    return f"{how}: {each.reason}" if each.reason else how


def _optional(seconds: float | None) -> str:
    return output.span(seconds) if seconds is not None else "-"


def _show_timeline(found: Failover) -> None:
    whom = f" from {found.previous} (epoch {found.previous_epoch})" if found.previous else ""
    output.say((found.id, "bold"), f": {found.node} took over{whom}, {_because(found)}")
    rows: list[tuple[str | tuple[str, str], ...]] = [
        (
            f"+{step.offset_seconds:.3f} s",
            step.node,
            step.what,
            _optional(step.duration_seconds),
            step.detail,
        )
        for step in found.steps
    ]
    if found.steps:
        output.say((f"from {output.clock(found.steps[0].at - found.steps[0].offset_seconds)} on", "dim"))
    output.table(("AFTER", "NODE", "WHAT", "TOOK", "DETAIL"), rows)
    output.say(
        f"key free for {_optional(found.vacant_seconds)}, ",
        f"active {_optional(found.activation_seconds)} after it was taken, ",
        f"first healthy answer {_optional(found.healthy_seconds)} after; ",
        (f"in all {_optional(found.total_seconds)}", "bold"),
    )
    if found.missing:
        output.say(f"database: missing at the start: {found.missing}")
    if found.loss:
        output.say(f"database: {found.previous} returned: {found.loss}")


# --- small things


def _confirmed(question: str) -> bool:
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def described(plan: FailoverPlan) -> list[str]:
    """What a forced failover would do, lose and guarantee, in sentences."""
    lines: list[str] = []
    if plan.leader is None:
        lines.append(f"{plan.app}: nobody leads; {plan.target} may take it up at once")
    else:
        lines.append(f"{plan.app}: from {plan.leader} (epoch {plan.epoch}) to {plan.target}")
    if plan.loss is not None:
        lines += _lost(plan.loss, plan.target)
    if plan.leader is not None:
        lines.append(f"  fencing: {_fencing(plan)}")
    return lines


def _lost(loss: Loss, target: str | None) -> list[str]:
    """Unknown is said to be unknown."""
    end = f"sequence {loss.position.sequence}, transaction {loss.position.txid}"
    if not loss.known:
        ago = (
            f"its last record is {output.span(loss.silent_seconds)} old"
            if loss.silent_seconds is not None
            else "there is no record in it"
        )
        lost = f"unknown: what {loss.node} has committed after the end of the log ({end}); {ago}"
    elif loss.transactions or loss.size_bytes:
        records = f"{loss.transactions} record{'' if loss.transactions == 1 else 's'}"
        lost = f"{records}, {output.size(loss.size_bytes)}, that {loss.node} has not put into the log ({end})"
    else:
        lost = f"nothing that is known; what {loss.node} commits until its end, if that is not in the log"
    lines = [f"  lost: {lost}", f"  it is set aside when {loss.node} returns: phalanx db diverged"]
    if loss.target_position is None:
        lines.append(f"  {target}: how far its replica is, is unknown")
    elif loss.target_lag_records:
        lines.append(
            f"  {target} is {loss.target_lag_records} records behind the log, and applies them first"
        )
    else:
        lines.append(f"  {target} is at the end of the log ({loss.target_position})")
    return lines


def _fencing(plan: FailoverPlan) -> str:
    leader = plan.leader
    if plan.answers:
        return f"{leader} answers: it kills what it runs, without grace, and only then gives the app back"
    if not plan.is_live:
        return f"the session of {leader} is over: whoever may take over is free to"
    return (
        f"{leader} does not answer: nobody becomes active before its session is over, by force neither; "
        f"that takes about {output.span(plan.longest_seconds)} at most"
    )


__all__ = ["described", "failover"]

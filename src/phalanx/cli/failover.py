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

failover = App(name="failover", help="Force an app to another node; or show what happened in failovers.")

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
    """Have another node run an app although the active one is ill or does not answer.

    It says what would be lost and asks. If the active node answers it ends at once, without grace; if not,
    nobody takes over before its session is over: also by force no two nodes are ever active. Exit code 1 when
    the answer was no or nobody took over, 2 for an unknown app or a node that cannot take over, and without
    a terminal and `--yes`.
    """
    check_wait(wait)
    if not (yes or sys.stdin.isatty()):
        raise ConfigError("--yes", None, "a failover by force has to be confirmed", "give --yes")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    try:
        done = asyncio.run(_force(client, app, to, reason, wait, ask=not yes, json=json))
    except ConfigError as error:
        raise by_option(error) from None
    if done is None:
        output.note("nothing was changed")
        return exits.NO
    show(done, json=json)
    return exits.OK


async def _force(
    client: PlatformClient,
    app: str,
    to: str | None,
    reason: str,
    wait: float,
    *,
    ask: bool,
    json: bool,
) -> Switched | None:
    async with client:
        plan = await client.operator.failover_plan(app, to)
        for line in described(plan):
            output.note(line) if json or ask else output.say(line)
        if ask and not await asyncio.to_thread(_confirmed, f"fail {app} over to {plan.target}?"):
            return None
        return await client.operator.failover(plan, reason=reason, timeout=wait)


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

"""The present state of an app in sentences: why it is where it is, why not elsewhere, what it waits for.

Pure: from facts that were collected to text, for ``phalanx why``.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from phalanx.types import AppStatus, Health, PlannedSwitchover, Role, Succession

LAG_WORTH_TELLING_SECONDS = 0.5
"""A replica is always a little behind."""


class NodeFacts(msgspec.Struct, frozen=True):
    """One node with the app. ``status`` is None for one that does not answer; ``is_live``: its session is not
    over."""

    node: str
    is_live: bool
    status: AppStatus | None = None


class Facts(msgspec.Struct, frozen=True):
    """What was found. ``now`` is Unix seconds. ``last_failure``: of the newest attempt to become active, from
    the audit log; empty: none."""

    app: str
    now: float
    nodes: tuple[NodeFacts, ...]
    planned: PlannedSwitchover | None = None
    last_failure: str = ""


class NotThere(msgspec.Struct, frozen=True):
    """Why a node does not run the app."""

    node: str
    because: str


class Explanation(msgspec.Struct, frozen=True):
    """``active``: who is active (None: nobody), ``leader``: who holds the leader key, as the nodes know."""

    app: str
    active: str | None
    leader: str | None
    epoch: int
    here: tuple[str, ...]
    not_there: tuple[NotThere, ...]
    waits_for: tuple[str, ...]
    hints: tuple[str, ...]


def explain(facts: Facts) -> Explanation:
    """The sentences."""
    leader, epoch = _leader(facts)
    active = next((s for s in _statuses(facts) if s[0] == leader and s[1].role is Role.ACTIVE), None)
    return Explanation(
        facts.app,
        leader if active is not None else None,
        leader,
        epoch,
        tuple(_here(facts, leader, epoch)),
        tuple(
            NotThere(node.node, _why_not(facts, node, leader)) for node in facts.nodes if node.node != leader
        ),
        tuple(_waits(facts, leader)),
        tuple(_hints(facts, leader)),
    )


def _statuses(facts: Facts) -> list[tuple[str, AppStatus]]:
    return [(node.node, node.status) for node in facts.nodes if node.status is not None]


def _leader(facts: Facts) -> tuple[str | None, int]:
    """Who leads by the newest leader key that any node knows. Its own word counts before it is known."""
    known = [(status.epoch, status.leader) for _, status in _statuses(facts) if status.leader]
    epoch, leader = max(known, default=(0, None))
    return leader, epoch


def _node(facts: Facts, name: str | None) -> NodeFacts | None:
    return next((node for node in facts.nodes if node.node == name), None)


# --- why here


def _here(facts: Facts, leader: str | None, epoch: int) -> Iterable[str]:
    if leader is None:
        yield f"nobody leads {facts.app}"
        return
    node = _node(facts, leader)
    status = node.status if node is not None else None
    if status is None:
        yield f"{leader} leads {facts.app} (epoch {epoch}), but does not answer"
        return
    what = {
        Role.ACTIVE: "is active for",
        Role.ACTIVATING: "is becoming active for",
        Role.STANDING_DOWN: "is standing down from",
    }.get(status.role, "leads, but is not active for")
    since = f", for {_span(facts.now - status.since)}" if status.since else ""
    yield f"{leader} {what} {facts.app} (epoch {epoch}){since}"
    came = status.standing.succession
    if came is not None and came.epoch == epoch:
        yield from _how(facts, leader, came)
    if status.role is Role.ACTIVE:
        yield _health(leader, status)
        if status.hold:
            yield f"it {status.hold}"


def _how(facts: Facts, leader: str, came: Succession) -> Iterable[str]:
    when = _ago(facts.now - came.at)
    why = f": {came.reason}" if came.reason else ""
    if not came.previous:
        yield f"it took the leader key {when}; nobody whom it knew of had led before"
    elif came.how == "session-over":
        whose = "an earlier life of it" if came.previous == leader else came.previous
        yield (
            f"it took over {when} from {whose} (epoch {came.previous_epoch}), whose session had ended{why}; "
            f"the key was free for {_span(came.vacant_seconds)}"
        )
    else:
        whose = "it had itself" if came.previous == leader else f"{came.previous} had"
        yield f"it took over {when}: {whose} given the key back (epoch {came.previous_epoch}){why}"
    if came.by:
        yield f"{came.by} had named it"
    elif came.named:
        yield "it was named as the successor"
    else:
        yield from _preferred(facts, leader)


def _preferred(facts: Facts, leader: str) -> Iterable[str]:
    mine = next((status for name, status in _statuses(facts) if name == leader), None)
    others = [status.standing.priority for name, status in _statuses(facts) if name != leader]
    if mine is not None and others and mine.standing.priority > max(others):
        yield f"it has the highest priority ({mine.standing.priority})"


def _health(node: str, status: AppStatus) -> str:
    if status.health is Health.UNHEALTHY:
        reason = status.health_reason or status.reason
        return f"{node} is unhealthy{f': {reason}' if reason else ''}"
    if status.health is Health.UNKNOWN and status.health_reason:
        return f"not yet known to be healthy: {status.health_reason}"
    if status.health is Health.UNKNOWN:
        return "its checks have not answered yet" if not status.standing.healthy_since else "it has no checks"
    return "its checks are healthy"


# --- why not there


def _why_not(facts: Facts, node: NodeFacts, leader: str | None) -> str:
    status = node.status
    if status is None:
        if node.is_live:
            return "it does not answer, though its session lives: it is frozen or cut off"
        return "its session is over: it is dead, or cut off for long"
    if status.role in (Role.ACTIVE, Role.ACTIVATING):
        return f"it still says that it is {status.role}: it has not heard yet that it does not lead any more"
    if status.role is Role.STANDING_DOWN:
        return f"it is standing down{f': {status.reason}' if status.reason else ''}"
    if status.role in (Role.STARTING, Role.STOPPED):
        return f"it is {status.role}"
    standing = status.standing
    if status.role is Role.INELIGIBLE:
        return f"it is no candidate: {status.reason or 'it does not say why'}"
    if standing.aside_until > facts.now:
        left = _span(standing.aside_until - facts.now)
        after = f"after {_count(standing.failures, 'failure')} in a row" if standing.failures else ""
        reason = f" ({status.reason})" if status.reason and standing.failures else ""
        return f"it steps aside for another {left} {after or 'after a hand-over'}{reason}"
    if not standing.eligible:
        return f"it is no candidate: {status.reason or 'it does not say why'}"
    return _ready(facts, node.node, status, leader)


def _ready(facts: Facts, node: str, status: AppStatus, leader: str | None) -> str:
    parts: list[str] = []
    if status.standing.no_failover:
        parts.append("it never takes over by itself (no_failover), only when an operator names it")
    elif leader is not None:
        parts.append(f"it is ready, but {leader} leads, and nothing is taken away from it")
    else:
        parts.append("it is ready to take over")
    database = status.database
    if database is not None and database.lag_seconds > LAG_WORTH_TELLING_SECONDS:
        parts.append(f"its replica is {_span(database.lag_seconds)} behind")
    if status.reason:
        parts.append(status.reason)
    return "; ".join(parts)


# --- what it waits for


def _waits(facts: Facts, leader: str | None) -> Iterable[str]:
    pause = next((status.pause for _, status in _statuses(facts) if status.pause is not None), None)
    if pause is not None:
        yield f"it is {pause}: nothing changes hands until it is resumed"
    node = _node(facts, leader)
    if leader is None:
        yield from _vacant(facts)
    elif node is None or node.status is None:
        yield from _silent(facts, leader, node)
    else:
        yield from _under_way(facts, leader, node.status)
    if facts.planned is not None:
        yield _planned(facts, facts.planned)


def _vacant(facts: Facts) -> Iterable[str]:
    able = [(name, s.standing) for name, s in _statuses(facts) if s.standing.eligible]
    willing = [name for name, standing in able if not standing.no_failover]
    named = next((s.standing.named for _, s in _statuses(facts) if s.standing.named), "")
    if willing:
        yield f"{' or '.join(willing)} is about to take the leader key" + (
            f" ({named} is named)" if named else ""
        )
    elif able:
        names = ", ".join(name for name, _ in able)
        yield (
            f"only nodes that never take over by themselves are left: {names}; "
            f"phalanx failover {facts.app} --to {able[0][0]}"
        )
    else:
        yield "no node is an eligible candidate"
    if facts.last_failure:
        yield f"the last attempt failed: {facts.last_failure}"


def _silent(facts: Facts, leader: str, node: NodeFacts | None) -> Iterable[str]:
    able = [name for name, s in _statuses(facts) if s.standing.eligible and not s.standing.no_failover]
    then = f"then {' or '.join(able)} takes over" if able else "then nobody could take over by itself"
    if node is not None and node.is_live:
        ttl = max((s.standing.ttl_seconds for _, s in _statuses(facts)), default=0.0)
        within = f" (TTL {ttl:g} s)" if ttl else ""
        yield f"{leader} to answer again, or its session to end{within}; {then}"
    else:
        yield f"the session of {leader} is over; {then}"


def _under_way(facts: Facts, leader: str, status: AppStatus) -> Iterable[str]:
    standing = status.standing
    if standing.step:
        since = _span(max(0.0, facts.now - standing.step_since))
        if standing.step == "fence":
            came = standing.succession
            whom = came.previous if came is not None and came.previous else "the previous leader"
            yield (
                f"{whom} to be fenced, for {since}: the fence command has not confirmed it yet; "
                f"see that it is off, then: phalanx fence {whom} --confirm-off"
            )
        else:
            yield f"{leader} to become active: step {standing.step} since {since}"
    if status.role is Role.STANDING_DOWN:
        follows = f"; {standing.named} is named to follow" if standing.named else ""
        yield f"{leader} to have stood down{f' ({status.reason})' if status.reason else ''}{follows}"
    elif status.role is Role.ACTIVE:
        if status.reason:
            yield f"{leader}: {status.reason}"
        if not standing.healthy_since:
            yield f"the first healthy answer of {leader}"
    if status.program is not None and status.program.restarts:
        times = _count(status.program.restarts, "time")
        yield f"its program was restarted in place {times} in this section; it is {status.program.state} now"


def _planned(facts: Facts, planned: PlannedSwitchover) -> str:
    whom = planned.to or "the best standby"
    why = f" ({planned.reason})" if planned.reason else ""
    ahead = planned.at - facts.now
    when = f"in {_span(ahead)}" if ahead > 0 else f"due for {_span(-ahead)}"
    return f"a switchover to {whom}, planned by {planned.by or 'somebody'}{why}, {when}"


# --- hints


def _hints(facts: Facts, leader: str | None) -> Iterable[str]:
    """What surprises people: a preferred node gets nothing back by itself."""
    active = next((s for name, s in _statuses(facts) if name == leader), None)
    if active is None or active.role is not Role.ACTIVE:
        return
    for name, status in _statuses(facts):
        standing = status.standing
        if name == leader or not standing.eligible or standing.no_failover:
            continue
        if standing.priority > active.standing.priority:
            yield (
                f"{name} has a higher priority ({standing.priority}) than {leader} "
                f"({active.standing.priority}), but there is no fail-back by itself: "
                f"phalanx switchover {facts.app} --to {name}"
            )
    if active.standing.no_failover:
        yield f"{leader} never takes over by itself: an operator has put {facts.app} there"


# --- words


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


__all__ = ["Explanation", "Facts", "NodeFacts", "NotThere", "explain"]

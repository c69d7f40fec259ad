"""The present state of a pool in sentences, for ``phalanx why``: who is active, who not, and why."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.decide.pool import replicas_text
from phalanx.decide.why import Explanation, Facts, NodeFacts, NotThere
from phalanx.types import AppStatus, PoolState, Role


def explain_pool(facts: Facts) -> Explanation:
    """The sentences. Nobody leads a pool."""
    statuses = {node.node: node.status for node in facts.nodes if node.status is not None}
    pool = next((status.pool for status in statuses.values() if status.pool is not None), PoolState())
    active = [node for node, status in statuses.items() if status.role is Role.ACTIVE]
    return Explanation(
        facts.app,
        None,
        None,
        0,
        tuple(_here(facts, pool, active, statuses)),
        tuple(
            NotThere(n.node, _why_not(facts, n, pool, len(active)))
            for n in facts.nodes
            if n.node not in active
        ),
        tuple(_waits(statuses)),
        tuple(_hints(facts, pool, len(active), statuses)),
    )


def _here(facts: Facts, pool: PoolState, active: list[str], statuses: dict[str, AppStatus]) -> Iterator[str]:
    wanted = replicas_text(pool.replicas)
    yield f"{facts.app} is a pool: {len(active)} of {wanted} instances are active"
    if pool.scaled_by:
        yield f"{pool.scaled_by} has scaled it to {wanted}; declared are {replicas_text(pool.declared)}"
    for node in active:
        status = statuses[node]
        ready = "is ready" if status.pool is not None and status.pool.ready else "is not ready for calls"
        reason = status.reason or status.health_reason
        yield f"{node} is active (epoch {status.epoch}), and {ready}{f': {reason}' if reason else ''}"


def _why_not(facts: Facts, node: NodeFacts, pool: PoolState, active: int) -> str:
    status = node.status
    if status is None:
        return "it does not answer, though its session lives" if node.is_live else "its session is over"
    if status.role in (Role.STANDBY, Role.INELIGIBLE) and status.standing.aside_until > facts.now:
        left = status.standing.aside_until - facts.now
        return f"it steps aside for another {left:.1f} s{f': {status.reason}' if status.reason else ''}"
    if status.role is not Role.STANDBY:
        return f"it is {status.role}{f': {status.reason}' if status.reason else ''}"
    if pool.replicas is not None and active >= pool.replicas:
        return "it stands by: as many as are wanted are active"
    return status.reason or "it is about to take a seat"


def _waits(statuses: dict[str, AppStatus]) -> Iterator[str]:
    for node, status in statuses.items():
        if status.standing.step:
            yield f"{node} to become active: step {status.standing.step}"
        elif status.role is Role.STANDING_DOWN:
            yield f"{node} to have stood down{f' ({status.reason})' if status.reason else ''}"


def _hints(facts: Facts, pool: PoolState, active: int, statuses: dict[str, AppStatus]) -> Iterator[str]:
    pause = next((status.pause for status in statuses.values() if status.pause is not None), None)
    if pause is not None:
        yield f"{pause}; nothing changes hands"
    if pool.replicas is not None and pool.replicas > max(active, len(facts.nodes)):
        yield f"there are fewer nodes ({len(facts.nodes)}) than instances wanted ({pool.replicas})"
    if pool.replicas == 0:
        yield f"it is scaled to nothing: phalanx scale {facts.app} N"


__all__ = ["explain_pool"]

"""The present state of a ring in sentences, for ``phalanx why``: who owns how much, who nothing, and why."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.decide.why import Explanation, Facts, NodeFacts, NotThere
from phalanx.types import RingState


def explain_ring(facts: Facts) -> Explanation:
    """The sentences. No one node is active for a ring, and nobody leads it."""
    states = {node.node: state for node in facts.nodes if (state := _state(node)) is not None}
    return Explanation(
        facts.app,
        None,
        None,
        0,
        tuple(_here(facts, states)),
        tuple(
            NotThere(node.node, _why_not(node))
            for node in facts.nodes
            if node.node not in states or not states[node.node].owned
        ),
        tuple(_waits(states)),
        tuple(_hints(facts)),
    )


def _state(node: NodeFacts) -> RingState | None:
    return node.status.ring if node.status is not None else None


def _here(facts: Facts, states: dict[str, RingState]) -> Iterator[str]:
    count = max((state.partitions for state in states.values()), default=0)
    owned = sum(state.owned for state in states.values())
    yield f"{facts.app} is a ring: {owned} of its {count} partitions have an owner that serves them"
    for node, state in states.items():
        if state.owned:
            yield f"{node} owns {state.owned}, and shall own {state.planned} (weight {state.weight})"


def _why_not(node: NodeFacts) -> str:
    if node.status is None:
        return "it does not answer" if node.is_live else "its session is over"
    if node.status.reason:
        return node.status.reason
    state = node.status.ring
    if state is None:
        return "the node has no session"
    return "its weight is 0" if not state.weight else "the plan gives it nothing (yet)"


def _waits(states: dict[str, RingState]) -> Iterator[str]:
    for node, state in states.items():
        if state.moving:
            yield f"the hooks of {state.moving} partitions on {node}"


def _hints(facts: Facts) -> Iterator[str]:
    pauses = [node.status.pause for node in facts.nodes if node.status is not None and node.status.pause]
    if pauses:
        yield f"{pauses[0]}; nothing changes hands"
    yield f"phalanx ring show {facts.app} says more"


__all__ = ["explain_ring"]

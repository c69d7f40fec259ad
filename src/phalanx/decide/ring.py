"""Who shall own which partition of a ring: balanced, and with the fewest moves.

A node's *share* is ``partitions × its weight ÷ all weights``, a fraction. :func:`plan` gives each node its
share rounded down or up, so it is never off by a whole partition, and keeps as many partitions where they
are as any assignment within those bounds could (see :func:`targets` for why). The same arguments give the
same plan everywhere: only whole numbers are compared, and nodes are taken by name.

Consequences, each of which has a test that counts: when a node leaves a balanced ring of equal weights,
exactly its partitions move; when one comes, exactly those it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_WEIGHT = 1000
"""A node may have this many times the share of one with weight 1. Weight 0: it gets nothing."""


def targets(partitions: int, weights: Mapping[str, int], owned: Mapping[str, int]) -> dict[str, int]:
    """How many partitions each node of *weights* gets: its share rounded down or up; all of them together.

    *owned*: how many each has now. The shares rounded down leave some partitions over, fewer than there are
    nodes whose share is no whole number; each of those nodes may get one. It keeps one more partition where
    it is only if that node owns more than its share rounded down, so those go first: hence no choice within
    the bounds moves fewer. Next the larger fraction counts, then the name. Empty without any weight.
    """
    total = sum(weights.values())
    if not total:
        return {}
    found = {node: partitions * weight // total for node, weight in weights.items()}

    def preference(node: str) -> tuple[bool, int, str]:
        return owned.get(node, 0) <= found[node], -(partitions * weights[node] % total), node

    rounded = [node for node, weight in weights.items() if partitions * weight % total]
    for node in sorted(rounded, key=preference)[: partitions - sum(found.values())]:
        found[node] += 1
    return found


def plan(owners: Sequence[str | None], weights: Mapping[str, int]) -> tuple[str | None, ...]:
    """The owner that each partition shall have; its number is its place in *owners*, those of now.

    An owner that is not in *weights* has left. Of a node that has too many, those with the highest numbers
    move. What is to be given away goes round the nodes that have too few, so that the load of one that has
    left is spread over all. Without any weight nobody shall own anything.
    """
    held: dict[str, list[int]] = {node: [] for node in weights}
    free: list[int] = []
    for partition, owner in enumerate(owners):
        (free if owner is None or owner not in held else held[owner]).append(partition)
    wanted = targets(len(owners), weights, {node: len(kept) for node, kept in held.items()})
    if not wanted:
        return (None,) * len(owners)
    for node, kept in held.items():
        free += kept[wanted[node] :]
        del kept[wanted[node] :]
    planned = list(owners)
    takers = _takers({node: wanted[node] - len(held[node]) for node in sorted(weights)})
    for partition, node in zip(sorted(free), takers, strict=True):
        planned[partition] = node
    return tuple(planned)


def _takers(missing: Mapping[str, int]) -> list[str]:
    """Each node as often as it misses partitions, round by round."""
    rounds: list[tuple[int, str]] = [(n, node) for node, count in missing.items() for n in range(count)]
    return [node for _, node in sorted(rounds)]


def moves(before: Sequence[str | None], after: Sequence[str | None]) -> int:
    """How many partitions have another owner in *after*; those that had none count, too."""
    return sum(1 for old, new in zip(before, after, strict=True) if old != new)

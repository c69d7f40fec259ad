"""Who shall own which partition, and which partition a key belongs to."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.decide.partition import MAX_PARTITIONS, partition_of
from phalanx.decide.ring import moves, plan, targets

NOBODY: tuple[str | None, ...] = (None,)

names = st.integers(0, 30).map(lambda n: f"n{n}")
weightings = st.dictionaries(names, st.integers(0, 9), max_size=12)
ownerships = st.lists(st.one_of(st.none(), names), max_size=80)


def equal(*nodes: str) -> dict[str, int]:
    """Nodes of one weight."""
    return dict.fromkeys(nodes, 1)


def share(node: str, partitions: int, weights: Mapping[str, int]) -> Fraction:
    """The share of *node*, exactly."""
    return Fraction(partitions * weights[node], sum(weights.values()))


def fewest_moves(owners: Sequence[str | None], weights: Mapping[str, int]) -> int:
    """Of all ways to give each node its share rounded down or up, the moves of the one with the fewest."""
    owned = Counter(owner for owner in owners if owner in weights)
    choices = [
        sorted({math.floor(share(n, len(owners), weights)), math.ceil(share(n, len(owners), weights))})
        for n in weights
    ]
    kept = [
        sum(min(owned[node], count) for node, count in zip(weights, counts, strict=True))
        for counts in itertools.product(*choices)
        if sum(counts) == len(owners)
    ]
    return len(owners) - max(kept)


# --- plan


@given(ownerships, weightings)
def test_plan_is_balanced_within_one_partition_and_complete(
    owners: list[str | None], weights: dict[str, int]
) -> None:
    """Whatever was before: everybody has its share rounded down or up, and every partition has an owner."""
    planned = plan(owners, weights)
    assert len(planned) == len(owners)
    if not any(weights.values()):
        assert set(planned) <= {None}
        return
    assert set(planned) <= set(weights)
    counts = Counter(planned)
    for node in weights:
        exact = share(node, len(owners), weights)
        assert math.floor(exact) <= counts[node] <= math.ceil(exact)


@given(ownerships.map(lambda o: o[:14]), st.dictionaries(names, st.integers(0, 5), min_size=1, max_size=5))
def test_no_balanced_assignment_moves_less(owners: list[str | None], weights: dict[str, int]) -> None:
    """Against every other distribution of the roundings, tried one by one."""
    if any(weights.values()):
        assert moves(owners, plan(owners, weights)) == fewest_moves(owners, weights)


@given(ownerships, weightings)
def test_planning_again_changes_nothing_and_the_order_of_the_nodes_does_not_count(
    owners: list[str | None], weights: dict[str, int]
) -> None:
    """A plan is its own plan, and everybody who has the same facts has the same plan."""
    planned = plan(owners, weights)
    assert plan(planned, weights) == planned
    assert plan(owners, dict(reversed(weights.items()))) == planned


@pytest.mark.parametrize("partitions", [1, 7, 256, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_leaving_moves_exactly_the_share_of_the_node_that_leaves(partitions: int, count: int) -> None:
    """From a balanced ring, one node after the other, down to the last; and nobody else's move."""
    nodes = [f"n{n}" for n in range(count + 1)]
    now = plan(NOBODY * partitions, equal(*nodes))
    while len(nodes) > 1:
        gone = nodes.pop(partitions % len(nodes))
        after = plan(now, equal(*nodes))
        changed = [p for p in range(partitions) if now[p] != after[p]]
        assert [now[p] for p in changed] == [gone] * now.count(gone)
        assert moves(now, after) == now.count(gone)
        now = after


@pytest.mark.parametrize("partitions", [1, 7, 256, 1000])
def test_joining_moves_exactly_what_the_newcomer_gets(partitions: int) -> None:
    """From one node to thirty: each partition that moves, moves to the newcomer, its share rounded down."""
    now = plan(NOBODY * partitions, equal("n0"))
    for number in range(1, 30):
        nodes = [f"n{n}" for n in range(number + 1)]
        after = plan(now, equal(*nodes))
        moved = [after[p] for p in range(partitions) if now[p] != after[p]]
        assert moved == [nodes[-1]] * (partitions // len(nodes))
        now = after


def test_partitions_of_one_that_leaves_are_spread_over_all_others() -> None:
    """No other node has to bear the whole load of a dead one."""
    now = plan(NOBODY * 256, equal("a", "b", "c", "d"))
    after = plan(now, equal("a", "b", "c"))
    assert sorted(Counter(after[p] for p in range(256) if now[p] == "d").values()) == [21, 21, 22]


def test_weights_give_multiples_and_zero_gives_nothing() -> None:
    """Three times the weight, three times the partitions; a weight of 0 empties a node."""
    assert Counter(plan(NOBODY * 256, {"a": 3, "b": 1, "c": 0})) == {"a": 192, "b": 64}
    assert set(plan(("a",) * 8, {"a": 0, "b": 2})) == {"b"}
    assert set(plan(("a",) * 8, {"a": 0})) == {None}


def test_an_even_ring_is_even_from_the_start_and_neighbours_are_apart() -> None:
    """The first plan goes round the nodes."""
    assert plan(NOBODY * 6, equal("b", "a", "c")) == ("a", "b", "c", "a", "b", "c")


@given(st.integers(0, 300), weightings, st.dictionaries(names, st.integers(0, 300)))
def test_targets_add_up(partitions: int, weights: dict[str, int], owned: dict[str, int]) -> None:
    """Whatever is owned at present, wrongly counted too."""
    found = targets(partitions, weights, owned)
    assert sum(found.values()) == (partitions if any(weights.values()) else 0)


def test_long_life_of_a_ring_moves_no_more_than_each_change_needs() -> None:
    """Two hundred comings and goings of nodes of equal weight: every single one costs its share, no more."""
    rng = Random(4711)
    nodes = ["n0"]
    now = plan(NOBODY * 1024, equal(*nodes))
    for number in range(1, 201):
        if len(nodes) > 1 and rng.random() < 0.45:
            gone = nodes.pop(rng.randrange(len(nodes)))
            after = plan(now, equal(*nodes))
            assert moves(now, after) == now.count(gone)
        else:
            nodes.append(f"n{number}")
            after = plan(now, equal(*nodes))
            assert moves(now, after) == 1024 // len(nodes)
        now = after


def test_plan_is_the_same_in_another_process_with_another_hash_seed() -> None:
    """Nothing hangs on the order of a set."""
    code = (
        "from phalanx.decide.ring import plan\n"
        "import zlib\n"
        "one = plan((None,) * 500, {f'n{i}': i % 4 for i in range(40)})\n"
        "two = plan(one, {f'n{i}': 1 for i in range(5, 45)})\n"
        "print(zlib.crc32(repr((one, two)).encode()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "4711")
    }
    assert len(outputs) == 1


# --- partition_of


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("", 0xE3B0C442),
        ("a", 0xCA978112),
        ("customer-42", 0xA045EB33),
        ("München", 0xC075B9C2),
        (b"\x00\xff", 0x06EB7D6A),
    ],
)
def test_hash_of_a_key_is_what_is_published(key: str | bytes, number: int) -> None:
    """The vectors of docs/ring.md: they must never change, as data lies where they say."""
    for partitions in (1, 2, 256, 1000, 16_384):
        assert partition_of(key, partitions) == number % partitions


def test_keys_are_spread_evenly() -> None:
    """Of 100,000 keys that differ little, no partition of 256 has a fifth more or less than its share."""
    counts = Counter(partition_of(f"user-{n}", 256) for n in range(100_000))
    assert len(counts) == 256
    assert max(counts.values()) < 1.2 * 100_000 / 256
    assert min(counts.values()) > 0.8 * 100_000 / 256


def test_vectors_of_the_docs_are_right() -> None:
    """Each row of the table in docs/ring.md: the number, and the partition of 256, 1,000 and 16,384."""
    text = (Path(__file__).parents[2] / "docs" / "ring.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?:`(.*)`|\(empty\)) \| `([0-9a-f]{8})` \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M
    )
    assert len(rows) == 4
    for key, number, *partitions in rows:
        assert [partition_of(key, n) for n in (256, 1000, 16_384)] == [int(each) for each in partitions]
        assert int(number, 16) % 16_384 == int(partitions[-1])


@pytest.mark.parametrize("partitions", [0, -1, MAX_PARTITIONS + 1])
def test_ring_without_or_with_too_many_partitions_is_refused(partitions: int) -> None:
    """Beyond what a ring can have."""
    with pytest.raises(ValueError, match="choose 1 to 16384"):
        partition_of("a", partitions)


def test_text_that_is_no_unicode_is_refused() -> None:
    """A lone surrogate has no UTF-8 bytes."""
    with pytest.raises(ValueError, match="surrogates"):
        partition_of("\ud800", 8)

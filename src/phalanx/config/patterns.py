"""Patterns besides active-passive: how the instances of an app share its work."""

from __future__ import annotations

from typing import Annotated

from phalanx.config import rules
from phalanx.config.aliases import Seconds, default
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About

MAX_PARTITIONS = 16_384
MAX_WEIGHT = 1000
MAX_REPLICAS = 1024
"""As in decide.partition, decide.ring and decide.pool, which layer 0 cannot import; tests hold them equal."""


class Ring(Declaration, frozen=True, kw_only=True, tag="ring", tag_field="type"):
    """The app's work is cut into partitions, and each partition has one owner among the nodes."""

    partitions: Annotated[
        int,
        About(
            "Into how many parts the keys are cut. The same on all nodes, and for ever: data lies by it.",
            rules.Whole(1, MAX_PARTITIONS),
            trade_off="Some ten to a hundred for each node that there will ever be: few move in lumps, each "
            "costs a key in NATS and, when its owner changes, a write.",
        ),
    ] = 256
    weight: Annotated[
        int,
        About(
            "This node's share, compared with the weights of the others. 0: it owns nothing.",
            rules.Whole(0, MAX_WEIGHT),
        ),
    ] = 1
    parallel: Annotated[
        int,
        About(
            "Hooks of partitions that run side by side on this node; others wait for their turn.",
            rules.Whole(1, 4096),
        ),
    ] = 16
    settle: Annotated[
        Seconds,
        About(
            "Nodes that come are given partitions once nothing has changed for this long, after 5 s at the "
            "latest; what has lost its owner never waits.",
            rules.Duration(0, 60),
        ),
    ] = default(0.5)


class Pool(Declaration, frozen=True, kw_only=True, tag="pool", tag_field="type"):
    """Several active instances, one on a node, that all do the same."""

    replicas: Annotated[
        int | None,
        About(
            "How many nodes are active at a time, at most; the others stand by. `phalanx scale` goes first.",
            rules.Whole(0, MAX_REPLICAS, optional=True),
            default="all nodes",
            trade_off="With one node fewer than there are, the death of one costs no capacity.",
        ),
    ] = None
